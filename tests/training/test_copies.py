from __future__ import annotations

from pathlib import Path

import pytest
import torch
from saving import save_into
from tiny import MakePolicy, in_precision

from nemo_selfpref.algorithms.base import Averaging, Reference
from nemo_selfpref.config.schema import Precision, RefMode
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.training.copies import StageCopies
from nemo_selfpref.types import WeightSet

POLICY, FROZEN, EMA, LAGGED = (WeightSet(n) for n in ("policy", "frozen", "ema", "lagged"))
EVERY_SECOND = Averaging(alpha=0.5, every=2)
START = 10
"""Optimizer steps before the stage; it counts its own from 1."""


def copies_of(
    policy: Policy, mode: RefMode, every: int = 3, averaging: Averaging | None = EVERY_SECOND
) -> StageCopies:
    """Of a policy whose every weight is 0, START steps old."""
    set_weights(policy, 0.0, START)
    return StageCopies(WeightSets(policy), Reference(mode, every), averaging)


@torch.no_grad()
def set_weights(policy: Policy, value: float, version: int) -> None:
    for parameter in policy.module.parameters():
        parameter.fill_(value)
    policy.weight_version = version


def take_steps(copies: StageCopies, first: int, last: int) -> dict[str, list[tuple[int, float]]]:
    """Steps of a stage, after step n of which every weight is n; (version, weight) of each copy
    after each step."""
    seen: dict[str, list[tuple[int, float]]] = {}
    for done in range(first, last + 1):
        set_weights(copies.weights.policy, float(done), START + done)
        copies.after_step(done)
        for name in copies.weights.held():
            seen.setdefault(name, []).append(facts_of(copies.weights, name))
    return seen


def facts_of(weights: WeightSets, name: WeightSet) -> tuple[int, float]:
    with weights.using(name) as version:
        values = {float(v) for p in weights.policy.module.parameters() for v in p.unique()}
    assert len(values) == 1
    return version, values.pop()


# Steps 2, 4, 6: (0 + 2) / 2, (1 + 4) / 2, (2.5 + 6) / 2.
AVERAGES = [(10, 0.0), (12, 1.0), (12, 1.0), (14, 2.5), (14, 2.5), (16, 4.25), (16, 4.25)]


def test_the_reference_follows_the_average(policy: Policy) -> None:
    copies = copies_of(policy, RefMode.ema)
    copies.begin(keep_reference=True)
    # At step 3 the average of step 2; at step 6 that of step 6, which is made first.
    lagged = [(10, 0.0), (10, 0.0), (12, 1.0), (12, 1.0), (12, 1.0), (16, 4.25), (16, 4.25)]
    assert take_steps(copies, 1, 7) == {"ema": AVERAGES, "lagged": lagged}


def test_the_reference_follows_the_policy(policy: Policy) -> None:
    copies = copies_of(policy, RefMode.policy)
    copies.begin(keep_reference=True)
    lagged = [(10, 0.0), (10, 0.0), (13, 3.0), (13, 3.0), (13, 3.0), (16, 6.0), (16, 6.0)]
    assert take_steps(copies, 1, 7) == {"ema": AVERAGES, "lagged": lagged}


def test_a_reference_that_follows_needs_no_average(policy: Policy) -> None:
    copies = copies_of(policy, RefMode.policy, every=2, averaging=None)
    copies.begin(keep_reference=True)
    assert take_steps(copies, 1, 4) == {"lagged": [(10, 0.0), (12, 2.0), (12, 2.0), (14, 4.0)]}


def test_the_last_policy_stays_the_reference(policy: Policy) -> None:
    copies = copies_of(policy, RefMode.last)
    copies.begin(keep_reference=True)
    assert take_steps(copies, 1, 7) == {"ema": AVERAGES, "lagged": [(10, 0.0)] * 7}


@pytest.mark.parametrize(
    ("mode", "moves", "reference"),
    [
        (RefMode.frozen, False, FROZEN),
        (RefMode.last, False, LAGGED),
        (RefMode.policy, True, LAGGED),
        (RefMode.ema, True, LAGGED),
        (RefMode.none, False, LAGGED),
    ],
)
def test_modes(policy: Policy, mode: RefMode, moves: bool, reference: WeightSet) -> None:
    copies = copies_of(policy, mode)
    assert copies.reference_moves is moves
    assert copies.reference_set is reference


@pytest.mark.parametrize("mode", list(RefMode))
def test_a_stage_keeps_only_what_it_needs(policy: Policy, mode: RefMode) -> None:
    copies = copies_of(policy, mode, averaging=None)
    copies.begin(keep_reference=False)
    assert copies.weights.held() == []
    copies.begin(keep_reference=True)
    assert copies.weights.held() == ([] if mode is RefMode.frozen else [LAGGED])


def test_the_end_frees_the_copies_of_the_stage(policy: Policy) -> None:
    copies = copies_of(policy, RefMode.ema)
    copies.begin(keep_reference=True)
    copies.weights.take(FROZEN, POLICY)
    copies.end()
    assert copies.weights.held() == [FROZEN]


@pytest.mark.parametrize("mode", [RefMode.ema, RefMode.policy, RefMode.last])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_stage_goes_on_where_it_was_saved(
    make_policy: MakePolicy, llama_folder: Path, tmp_path: Path, mode: RefMode, cut: int
) -> None:
    straight = copies_of(make_policy(llama_folder), mode)
    straight.begin(keep_reference=True)
    take_steps(straight, 1, cut)
    save_into(tmp_path, straight.save)
    want = take_steps(straight, cut + 1, 7)

    resumed = copies_of(make_policy(llama_folder), mode)
    set_weights(resumed.weights.policy, float(cut), START + cut)
    resumed.load(tmp_path)
    assert take_steps(resumed, cut + 1, 7) == want


def test_a_saved_average_keeps_its_float32(
    policy: Policy, llama_folder: Path, tmp_path: Path
) -> None:
    def averaging() -> StageCopies:
        made = in_precision(policy, Precision.bf16, llama_folder)
        return copies_of(made, RefMode.frozen, averaging=Averaging(alpha=0.75, every=1))

    def averages(copies: StageCopies) -> set[float]:
        state = copies.weights.sharded_state_dict(EMA)
        assert state["output_layer.weight"].data.dtype == torch.float32
        return set(state["output_layer.weight"].data.unique().tolist())

    copies = averaging()
    copies.begin(keep_reference=False)
    for done, value in enumerate([1.0, 2.0, 3.0, 4.0], start=1):
        set_weights(copies.weights.policy, value, START + done)
        copies.after_step(done)
    # 1/4, 3/16 + 2/4, 33/64 + 3/4, 243/256 + 1: 499 needs 9 bits, bf16 has 8.
    assert averages(copies) == {499 / 256}
    save_into(tmp_path, copies.save)
    resumed = averaging()
    resumed.load(tmp_path)
    assert averages(resumed) == {499 / 256}


def test_nothing_held_is_nothing_saved(policy: Policy, tmp_path: Path) -> None:
    copies = copies_of(policy, RefMode.frozen, averaging=None)
    copies.weights.take(FROZEN, POLICY)
    save_into(tmp_path, copies.save)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    copies.load(tmp_path)
    assert copies.weights.held() == [FROZEN]


def test_what_is_saved_where(policy: Policy, tmp_path: Path) -> None:
    copies = copies_of(policy, RefMode.ema)
    copies.begin(keep_reference=True)
    save_into(tmp_path, copies.save)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("*/*")) == [
        "copies/ema",
        "copies/lagged",
        "copies/versions.json",
    ]


def test_a_damaged_copy_is_refused(policy: Policy, tmp_path: Path) -> None:
    copies = copies_of(policy, RefMode.last, averaging=None)
    copies.begin(keep_reference=True)
    save_into(tmp_path, copies.save)
    path = tmp_path / "copies" / "lagged" / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"lagged/shard-00000\.safetensors is damaged"):
        copies.load(tmp_path)
