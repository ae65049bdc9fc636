from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saving import save_into
from tiny import in_precision, save_llama, scale
from torch import Tensor

from nemo_selfpref.algorithms.base import Averaging, Reference
from nemo_selfpref.checkpoint.training_state import save_weights
from nemo_selfpref.config.model_schema import LoRAConfig, ModelConfig, RopeScalingConfig
from nemo_selfpref.config.schema import Precision, RefMode
from nemo_selfpref.data.batching import StepPlan
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.objectives.objective import DPOObjective, Objective, Pass, SrDPOObjective
from nemo_selfpref.training.convert import single_process_policy
from nemo_selfpref.training.copies import StageCopies
from nemo_selfpref.training.places import Seeded, WeightPlaces
from nemo_selfpref.training.reference_cache import HIT_RATE, context_of, key_of, open_cache
from nemo_selfpref.training.reference_version import hash_folder, hash_parameters
from nemo_selfpref.training.session import Start
from nemo_selfpref.training.steps import FixedSteps, Passes
from nemo_selfpref.types import PreferencePair, WeightSet

DPO, SR_DPO = DPOObjective(0.1), SrDPOObjective(0.1, 0.3)
PAIRS = [
    PreferencePair("a", (5, 6), (8, 9, 2), (10, 2), augmented_prompt_ids=(90, 5, 6)),
    PreferencePair("b", (30,), (31, 2), (32, 33, 2), augmented_prompt_ids=(90, 30)),
    PreferencePair("c", (40, 41), (44, 2), (45, 2), augmented_prompt_ids=(90, 40, 41)),
]
PLAN = StepPlan(num_rows=3, global_batch_size=3, max_epochs=9, shuffle=False)


class Stage:
    """A stage over some pairs, with a cache in `root` (None for none). `asked` has how many
    sequences the network was given in each call, `said` the console's lines."""

    def __init__(
        self,
        policy: Policy,
        start: Start,
        root: Path | None,
        *,
        mode: RefMode = RefMode.last,
        every: int = 2,
        objective: Objective = DPO,
        pairs: Sequence[PreferencePair] = PAIRS,
    ) -> None:
        self.policy, self.asked, self.said = policy, list[int](), list[str]()
        self.weights = WeightSets(policy)
        self.places = WeightPlaces(self.weights, start, seed=1)
        model = ModelConfig(reference_cache_dir=str(root) if root else None)
        cache = open_cache(model, policy, self.places, self.said.append)
        averaging = Averaging(0.5, 1) if mode is RefMode.ema else None
        copies = StageCopies(self.weights, Reference(mode, every), averaging)
        self.passes = Passes(policy, copies, objective, self.places.ready, cache)
        self.steps = FixedSteps(pairs, replace(PLAN, num_rows=len(pairs)), copies, self.passes)
        self._count(policy)

    def _count(self, policy: Policy) -> None:
        score = type(policy).score

        def counted(sequences: Sequence, *rest: object) -> object:
            self.asked.append(len(sequences))
            return score(policy, sequences, *rest)  # type: ignore[arg-type]

        policy.score = counted  # type: ignore[method-assign]

    def score_once(self, path: Path) -> tuple[dict[str, Tensor], float | None]:
        """The log-probs by pass and side, and the hit rate."""
        measured = self.steps.score_once(path, unmoved=True)
        return load_file(path), measured.get(HIT_RATE)

    def live(self, number: int) -> tuple[list[float], float | None]:
        """Log-probs of a step's reference pass, and the hit rate."""
        step = self.steps.step(number)
        found = step.inputs.passes[Pass.REFERENCE]
        return [*found.chosen.tolist(), *found.rejected.tolist()], step.metrics.get(HIT_RATE)

    def train(self, done: int, factor: float = 1.5) -> None:
        """An optimizer step that changes every weight."""
        scale(self.policy, factor)
        self.steps.after_step(done)


MakeStage = Callable[..., Stage]


@pytest.fixture
def make_stage(llama_folder: Path, tmp_path: Path) -> MakeStage:
    """Stages of runs of their own, which share a cache and start from llama_folder."""

    def make(
        root: Path | None = tmp_path / "cache", folder: Path = llama_folder, **settings: object
    ) -> Stage:
        return Stage(*single_process_policy(folder), root, **settings)  # type: ignore[arg-type]

    return make


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


def segments(root: Path) -> list[Path]:
    return sorted((root / "cache").glob("*/*.safetensors"))


# -- keys ---------------------------------------------------------------------------------------


def test_a_key() -> None:
    wanted = hashlib.sha256(bytes(32) + struct.pack("<6q", 2, 5, 6, 8, 9, 2)).digest()
    assert key_of(bytes(32), (5, 6), (8, 9, 2)) == wanted
    others = [((5,), (6, 8, 9, 2)), ((5, 6), (8, 9)), ((6, 5), (8, 9, 2)), ((), (5, 6, 8, 9, 2))]
    keys = {wanted, *(key_of(bytes(32), *o) for o in others), key_of(b"x" * 32, (5, 6), (8, 9, 2))}
    assert len(keys) == 6


def test_what_makes_a_context(policy: Policy) -> None:
    arch, config, first = policy.arch, policy.config, context_of(policy, "w")
    assert len(first) == 32 and context_of(policy, "w") == first
    found = {first, context_of(policy, "v")}
    scaled = RopeScalingConfig("linear", 2.0)
    for changed in (
        replace(arch, rope_scaling=scaled),
        replace(arch, rotary_base=5e5),
        replace(arch, layernorm_epsilon=1e-6),
    ):
        policy.arch = changed
        found.add(context_of(policy, "w"))
    policy.arch, policy.precision = arch, Precision.bf16
    found.add(context_of(policy, "w"))
    policy.precision = Precision.fp32
    for alpha in (16.0, 32.0):
        policy.config = replace(config, lora=LoRAConfig(rank=4, alpha=alpha))
        found.add(context_of(policy, "w"))
    assert len(found) == 8
    policy.config = replace(config, tensor_model_parallel_size=2, micro_batch_size=1)
    assert context_of(policy, "w") == first  # the layout is left out


# -- names of weights -----------------------------------------------------------------------------


def test_a_hugging_face_folder_is_named_by_its_files(tmp_path: Path) -> None:
    one = save_llama(tmp_path / "one")
    name = hash_folder(one)
    assert hash_folder(save_llama(tmp_path / "same")) == name
    assert hash_folder(save_llama(tmp_path / "other", seed=7)) != name
    (one / "tokenizer.json").unlink()  # no weight
    assert hash_folder(one) == name
    data = bytearray((one / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (one / "model.safetensors").write_bytes(data)
    assert hash_folder(one) != name


def test_a_hugging_face_folder_of_several_files(tmp_path: Path, policy: Policy) -> None:
    from transformers import LlamaForCausalLM

    whole = save_llama(tmp_path / "whole")
    LlamaForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "cut", max_shard_size="50KB")
    name = hash_folder(tmp_path / "cut")
    last = sorted((tmp_path / "cut").glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1] + b"\x01")
    assert hash_folder(tmp_path / "cut") != name


def test_a_checkpoint_is_named_by_its_index(make_stage: MakeStage, tmp_path: Path) -> None:
    stage = make_stage()
    tokenizer = stage.places.start.tokenizer
    names = []
    for n, factor in enumerate((1.0, 1.5, 1 / 1.5)):
        scale(stage.policy, factor)
        save_weights(tmp_path / str(n), stage.policy, tokenizer)
        names.append(hash_folder(tmp_path / str(n)))
    assert names[0] != names[1] != names[2]
    index = tmp_path / "1" / "weights" / "index.json"
    files = json.loads(index.read_text())["files"]
    wanted = json.dumps(["checkpoint", files], sort_keys=True).encode()
    assert names[1] == hashlib.sha256(wanted).hexdigest()


def test_where_weights_stand(make_stage: MakeStage, llama_folder: Path, tmp_path: Path) -> None:
    places = make_stage().places
    policy, frozen = WeightSet.POLICY, WeightSet.FROZEN
    assert places.standing(policy) == places.standing(frozen) == llama_folder
    assert places.standing(WeightSet.LAGGED) is places.standing(WeightSet.EMA) is None
    places.leave()
    assert places.standing(policy) is None and places.standing(frozen) == llama_folder
    places.arrive(tmp_path / "one", 2, loaded=True)
    assert places.standing(policy) == tmp_path / "one"
    assert places.standing(frozen) == llama_folder
    places.freeze()
    assert places.standing(frozen) == tmp_path / "one"
    places.start = replace(places.start, folder=None)
    assert WeightPlaces(places.weights, places.start, seed=3).standing(policy) == Seeded(3)


def test_weights_in_memory_are_named_by_their_bits(policy: Policy) -> None:
    named = list(policy.module.named_parameters())
    name = hash_parameters(named)
    assert hash_parameters(named) == name
    with torch.no_grad():
        value = named[3][1].view(-1)
        kept = value[5].clone()
        value[5] = torch.nextafter(kept, torch.tensor(9.0))
        assert hash_parameters(named) != name
        value[5] = kept
    assert hash_parameters(named) == name
    assert hash_parameters([(n, p.bfloat16()) for n, p in named]) != name


# -- scoring once ---------------------------------------------------------------------------------


def test_a_second_run_asks_nothing(make_stage: MakeStage, tmp_path: Path) -> None:
    plain = make_stage(None)
    want, rate = plain.score_once(tmp_path / "0")
    assert plain.asked == [6] and rate is None
    for number, (asked, hits) in enumerate([([6], 0.0), ([], 1.0), ([], 1.0)]):
        stage = make_stage()
        got, rate = stage.score_once(tmp_path / f"run-{number}")
        assert stage.asked == asked and rate == hits and same(got, want)
    assert len(segments(tmp_path)) == 1


def test_progress_counts_what_is_not_asked(make_stage: MakeStage, tmp_path: Path) -> None:
    make_stage(pairs=PAIRS[:2]).score_once(tmp_path / "1")
    seen: list[int] = []
    make_stage(pairs=[*PAIRS, PAIRS[2]]).steps.score_once(tmp_path / "2", True, seen.append)
    assert seen == [6, 2]  # four found, two duplicates; two asked


def test_both_passes_of_a_loss_share_the_weights(make_stage: MakeStage, tmp_path: Path) -> None:
    stage = make_stage(objective=SR_DPO)
    _, rate = stage.score_once(tmp_path / "1")
    assert stage.asked == [6, 6] and rate == 0.0
    stage = make_stage(objective=SR_DPO)
    _, rate = stage.score_once(tmp_path / "2")
    assert stage.asked == [] and rate == 1.0


def test_duplicates_are_scored_once(make_stage: MakeStage, tmp_path: Path) -> None:
    twins = [PAIRS[0], replace(PAIRS[0], id="a2"), replace(PAIRS[0], rejected_ids=(8, 9, 2))]
    stage = make_stage(pairs=twins)
    got, rate = stage.score_once(tmp_path / "1")
    assert stage.asked == [2] and rate == 0.0
    chosen, rejected = got["reference.chosen"].tolist(), got["reference.rejected"].tolist()
    assert chosen[0] == chosen[1] == chosen[2] == rejected[2] != rejected[0] == rejected[1]
    want, _ = make_stage(None, pairs=twins).score_once(tmp_path / "2")
    assert chosen == pytest.approx(want["reference.chosen"].tolist(), abs=1e-5)


def test_another_prompt_misses(make_stage: MakeStage, tmp_path: Path) -> None:
    make_stage().score_once(tmp_path / "1")
    stage = make_stage(pairs=[replace(PAIRS[0], prompt_ids=(5, 7)), *PAIRS[1:]])
    _, rate = stage.score_once(tmp_path / "2")
    assert stage.asked == [2] and rate == pytest.approx(4 / 6)


def test_other_weights_miss(make_stage: MakeStage, tmp_path: Path) -> None:
    first, _ = make_stage().score_once(tmp_path / "1")
    stage = make_stage(folder=save_llama(tmp_path / "other", seed=7))
    second, rate = stage.score_once(tmp_path / "2")
    assert stage.asked == [6] and rate == 0.0 and not same(first, second)


def test_another_rope_scaling_misses(make_stage: MakeStage, tmp_path: Path) -> None:
    """The same weights: only config.json differs."""
    first, _ = make_stage().score_once(tmp_path / "1")
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    stage = make_stage(folder=save_llama(tmp_path / "stretched", rope_parameters=rope))
    assert stage.policy.arch.rope_scaling.factor == 4.0
    second, _ = stage.score_once(tmp_path / "2")
    assert stage.asked == [6] and not same(first, second)


def test_another_precision_misses(
    make_stage: MakeStage, llama_folder: Path, tmp_path: Path
) -> None:
    first = make_stage()
    want, _ = first.score_once(tmp_path / "1")
    half = in_precision(first.policy, Precision.bf16, llama_folder)
    stage = Stage(half, first.places.start, tmp_path / "cache")
    got, _ = stage.score_once(tmp_path / "2")
    assert stage.asked == [6] and not same(want, got)


def test_a_trained_policy_misses_and_the_start_still_hits(
    make_stage: MakeStage, tmp_path: Path
) -> None:
    """The reference of the next stage is what this one made, or the start again."""
    stage = make_stage()
    stage.score_once(tmp_path / "1")
    scale(stage.policy)
    save_weights(tmp_path / "trained", stage.policy, stage.places.start.tokenizer)
    stage.places.arrive(tmp_path / "trained", 1, loaded=True)
    stage.score_once(tmp_path / "2")
    assert stage.asked == [6, 6]
    stage.places.reset()
    _, rate = stage.score_once(tmp_path / "3")
    assert stage.asked == [6, 6] and rate == 1.0
    assert len(segments(tmp_path)) == 2


def test_start_files_that_have_gone(make_stage: MakeStage, tmp_path: Path) -> None:
    """The weights in memory are named instead."""
    folder = save_llama(tmp_path / "start")
    stage = make_stage(folder=folder)
    (folder / "model.safetensors").unlink()
    got, _ = stage.score_once(tmp_path / "1")
    want, _ = make_stage(None).score_once(tmp_path / "2")
    assert same(got, want)


# -- live -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [RefMode.policy, RefMode.ema])
def test_a_reference_that_moves(make_stage: MakeStage, tmp_path: Path, mode: RefMode) -> None:
    """It moves every second step; between moves and in a second run its log-probs are there."""

    def curve(stage: Stage, factor: float = 1.5) -> list[tuple[list[float], float | None]]:
        stage.steps.begin()
        found = []
        for done in range(1, 6):
            found.append(stage.live(done - 1))
            stage.train(done, factor)
        stage.passes.flush()
        return found

    plain, stage = make_stage(None, mode=mode), make_stage(mode=mode)
    want, got = curve(plain), curve(stage)
    assert [values for values, _ in got] == [values for values, _ in want]
    assert [rate for _, rate in got] == [0.0, 1.0, 0.0, 1.0, 0.0] and stage.asked == [6, 6, 6]
    assert plain.asked == [6] * 5 and {rate for _, rate in want} == {None}
    assert len(segments(tmp_path)) == 3

    again = make_stage(mode=mode)
    assert [values for values, _ in curve(again)] == [values for values, _ in want]
    assert again.asked == []
    # Another trajectory shares the beginning alone.
    other = make_stage(mode=mode)
    assert [rate for _, rate in curve(other, factor=1.25)] == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert other.asked == [6, 6]


def test_a_move_keeps_the_entries_of_what_stands(make_stage: MakeStage, tmp_path: Path) -> None:
    make_stage().score_once(tmp_path / "1")
    moving = make_stage(mode=RefMode.policy, every=1)
    moving.steps.begin()
    for done in (1, 2):
        moving.live(done - 1)
        moving.train(done)
    assert moving.asked == [6, 6]
    again = make_stage()
    again.score_once(tmp_path / "2")
    assert again.asked == []


def test_a_resumed_stage(make_stage: MakeStage, tmp_path: Path) -> None:
    """From the checkpoint after the first of three steps; the same, with the cache and without."""
    stage = make_stage(mode=RefMode.policy, every=2)
    stage.steps.begin()
    whole = []
    for done in (1, 2, 3):
        whole.append(stage.live(done - 1)[0])
        stage.train(done)
        if done == 1:
            save_into(tmp_path / "checkpoint", stage.steps.save)
    stage.passes.flush()
    for root, asked in ((tmp_path / "cache", []), (None, [6, 6])):
        resumed = make_stage(root, mode=RefMode.policy, every=2)
        scale(resumed.policy)  # the policy of that checkpoint
        resumed.steps.load(tmp_path / "checkpoint")
        assert resumed.live(1)[0] == whole[1]
        resumed.train(2)
        assert resumed.live(2)[0] == whole[2]
        assert resumed.asked == asked


def test_a_checkpoint_has_the_entries_on_disk(make_stage: MakeStage, tmp_path: Path) -> None:
    stage = make_stage(mode=RefMode.policy)
    stage.steps.begin()
    stage.live(0)
    assert segments(tmp_path) == []
    save_into(tmp_path / "checkpoint", stage.steps.save)
    assert len(segments(tmp_path)) == 1


def test_the_policy_itself_is_never_looked_up(make_stage: MakeStage, tmp_path: Path) -> None:
    for asked in ([6, 6, 6, 6], [6, 6]):
        stage = make_stage(objective=SR_DPO)
        stage.score_once(tmp_path / str(len(asked)))
        stage.steps.begin()
        for number in range(2):
            assert HIT_RATE not in stage.steps.step(number).metrics
        assert stage.asked == asked


# -- damage ---------------------------------------------------------------------------------------


def flip(data: bytes, place: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "bit in the header": lambda data: flip(data, 20),
    "bit in the tensors": lambda data: flip(data, -20),
    "truncated": lambda data: data[:-7],
    "longer": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "a page of zeros": lambda data: bytes(min(4096, len(data))) + data[4096:],
    "zeros at its end": lambda data: data[:-64] + bytes(64),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_scored_again(
    make_stage: MakeStage, tmp_path: Path, damage: str
) -> None:
    want, _ = make_stage().score_once(tmp_path / "1")
    (path,) = segments(tmp_path)
    bad = DAMAGE[damage](path.read_bytes())
    path.write_bytes(bad)
    stage = make_stage(objective=SR_DPO)
    got, _ = stage.score_once(tmp_path / "2")
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert stage.asked == [6, 6]
    assert len(stage.said) == 1 and str(path) in stage.said[0] and "damaged" in stage.said[0]
    assert path.with_name(f"{path.name}.bad").read_bytes() == bad
    after = make_stage()
    got, rate = after.score_once(tmp_path / "3")
    assert same(got, want) and rate == 1.0 and after.said == []


def test_swapped_contents(make_stage: MakeStage, tmp_path: Path) -> None:
    want, _ = make_stage(pairs=PAIRS[:1]).score_once(tmp_path / "1")
    make_stage(pairs=PAIRS[1:]).score_once(tmp_path / "2")
    one, two = segments(tmp_path)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    stage = make_stage(pairs=PAIRS[:1])
    got, rate = stage.score_once(tmp_path / "3")
    assert same(got, want) and rate == 0.0
    assert len(stage.said) == 2 and str(one) in stage.said[0] and str(two) in stage.said[1]


def test_a_segment_under_another_context(make_stage: MakeStage, tmp_path: Path) -> None:
    """Entries say themselves what they belong to, wherever they are put."""
    make_stage().score_once(tmp_path / "1")
    other = save_llama(tmp_path / "other", seed=7)
    make_stage(folder=other, pairs=PAIRS[:1]).score_once(tmp_path / "2")
    ours, theirs = sorted(segments(tmp_path), key=lambda path: path.stat().st_mtime_ns)
    (theirs.parent / ours.name).write_bytes(ours.read_bytes())
    stage = make_stage(folder=other)
    got, rate = stage.score_once(tmp_path / "3")
    want, _ = make_stage(None, folder=other).score_once(tmp_path / "4")
    assert stage.asked == [4] and rate == pytest.approx(2 / 6)
    assert got["reference.chosen"].tolist() == pytest.approx(
        want["reference.chosen"].tolist(), abs=1e-5
    )
