"""A resumed run is the straight one bit for bit; and would not be if any part of the state were not
taken back. Each mutant forgets one part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_llama

from nemo_selfpref import cli
from nemo_selfpref.algorithms import spliced
from nemo_selfpref.checkpoint import training_state
from nemo_selfpref.data.batching import StepPlan
from nemo_selfpref.models import strategy
from nemo_selfpref.pairing.replay import ReplayBuffer
from nemo_selfpref.training import fit
from nemo_selfpref.training.copies import StageCopies
from nemo_selfpref.training.rollouts import EngineRollouts
from nemo_selfpref.types import WeightSet

pytestmark = pytest.mark.slow
STEPS, CUT = 4, 2
SETTINGS = {
    "dpo": [],
    "self_augmented_po": [
        *("algorithm.segment_length=6", "algorithm.replay_capacity=10"),
        # The reference was moved at the first step, and will be again only at the third and fourth.
        *("algorithm.ema_every=1", "algorithm.ref_every=3", "algorithm.ema_alpha=0.7"),
    ],
}
Patch = pytest.MonkeyPatch
Found = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A method's straight run of four steps, in FOLDER/NAME/run."""

    name: str
    folder: Path

    def train(self, place: Path) -> int:
        params = "exp_manager.checkpoint_callback_params"
        return cli.main(
            [
                *("train", "--config-name", self.name, "name=run", f"exp_manager.exp_dir={place}"),
                *(f"model.restore_from_path={self.folder / 'llama'}", "export.hf=false"),
                *(f"data.train_path=[{self.folder / 'rows.jsonl'}]", f"trainer.max_steps={STEPS}"),
                *("data.max_length=250", "data.max_prompt_length=200"),
                *("model.micro_batch_size=2", "model.global_batch_size=4", "model.optim.lr=1e-3"),
                *("model.optim.sched.warmup_steps=0", "model.optim.sched.warmup_ratio=0"),
                *("model.optim.sched.name=LinearAnnealing", "rollout.max_new_tokens=8"),
                *(f"{params}.every_n_train_steps=1", f"{params}.save_top_k=-1"),
                *("exp_manager.create_tensorboard_logger=false", *SETTINGS[self.name]),
                "trainer.enable_progress_bar=false",
            ]
        )

    @property
    def straight(self) -> Path:
        return self.folder / self.name / "run"

    def resumed(self, place: Path) -> Path:
        """The straight run cut after two steps and gone on with, in PLACE/run."""
        run = place / "run"
        cut(self.straight, run)
        assert self.train(place) == 0
        return run


def cut(run: Path, copy: Path) -> None:
    """Copy a run as a kill after the second step of its only stage would leave it."""
    shutil.copytree(run, copy)
    (stage,) = (copy / "stages").iterdir()
    for step in range(CUT + 1, STEPS + 1):
        shutil.rmtree(stage / "checkpoints" / f"step-{step:06d}")
        (stage / "pairs" / f"step-{step:06d}.parquet").unlink(missing_ok=True)
    for later in (stage / "weights", copy / "checkpoint"):
        shutil.rmtree(later)
    for later in (stage / "done.json", copy / "summary.json"):
        later.unlink()


def state_of(run: Path) -> Found:
    """What a run came to: each metric over the steps, and each file of the end."""
    (stage,) = (run / "stages").iterdir()
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    found: Found = {f"metric {n}": [row.get(n) for row in rows] for n in sorted({*rows[-1]})}
    last = stage / "checkpoints" / f"step-{STEPS:06d}"
    kept = [*last.rglob("*.safetensors"), *last.glob("rollouts/*")]
    kept += [*(stage / "pairs").glob("*"), *(run / "checkpoint").rglob("*.safetensors")]
    found |= {str(p.relative_to(run)): p.read_bytes() for p in sorted(kept)}
    # Lightning's own loops also count what was done since the process began.
    lightning = json.loads((last / "lightning.json").read_text())
    return found | {name: lightning[name] for name in ("global_step", "lr_schedulers")}


def different(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mutants")
    save_llama(made / "llama", initializer_range=0.3)
    rows = [
        {
            "id": f"r{n}",
            "prompt": f"How much is {n} plus {n + 3}?",
            "chosen": f"It is {2 * n + 3}, gladly. " * (1 + n % 3),
            "rejected": f"{2 * n + 3}. Go away.",
        }
        for n in range(4 * STEPS)
    ]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, Case]:
    made = {name: Case(name, folder) for name in SETTINGS}
    for case in made.values():
        assert case.train(case.straight.parent) == 0
    return made


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_is_the_straight_one(
    name: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    straight, resumed = cases[name].straight, cases[name].resumed(tmp_path)
    found = state_of(straight)
    assert len(found["metric loss"]) == STEPS and len(set(found["metric lr"])) == STEPS
    assert different(found, state_of(resumed)) == []


# -- mutants ------------------------------------------------------------------------------------


def no_optimizer(patch: Patch) -> None:
    patch.setattr(strategy, "load_optimizer", lambda *_: None)


def no_moments(patch: Patch) -> None:
    """The optimizer's step count is taken back, its averages are not."""
    load = strategy.load_optimizer

    def forget(folder: Path, optimizer: Any) -> None:
        load(folder, optimizer)
        for _, state in optimizer.state.items():
            for name in {"exp_avg", "exp_avg_sq", "square_avg"} & set(state):
                state[name].zero_()

    patch.setattr(strategy, "load_optimizer", forget)


def no_weights(patch: Patch) -> None:
    patch.setattr(training_state, "fill_policy", lambda *_: None)


def first_rows_again(patch: Patch) -> None:
    rows = StepPlan.rows_of_step
    patch.setattr(StepPlan, "rows_of_step", lambda plan, step: rows(plan, step - CUT))


def first_steps_again(patch: Patch) -> None:
    patch.setattr(fit, "step_of", lambda _: 0)


def schedule_again(patch: Patch) -> None:
    load = strategy.load_training

    def forget(*given: Any) -> dict[str, Any]:
        found = load(*given)
        begun = [{**s, "last_epoch": 0, "_step_count": 1} for s in found["lr_schedulers"]]
        return {**found, "lr_schedulers": begun}

    patch.setattr(strategy, "load_training", forget)


def draws_of_tokens_again(patch: Patch) -> None:
    within = EngineRollouts.within

    def again(self: Any, scope: str, step: int, *more: Any) -> EngineRollouts:
        return within(self, scope, step - CUT, *more)

    patch.setattr(EngineRollouts, "within", again)


def draws_from_replay_again(patch: Patch) -> None:
    seed_of = spliced.seed_of

    def again(seed: int, name: str, step: int, *more: Any) -> int:
        return seed_of(seed, name, step - CUT if name == "replay" else step, *more)

    patch.setattr(spliced, "seed_of", again)


def draws_of_segments_again(patch: Patch) -> None:
    seed_of = spliced.seed_of

    def again(seed: int, name: str, step: int, *more: Any) -> int:
        return seed_of(seed, name, step - CUT if name == "segment" else step, *more)

    patch.setattr(spliced, "seed_of", again)


def replay_counts_zeroed(patch: Patch) -> None:
    restore = ReplayBuffer.restore

    def forget(capacity: int, pairs: Any, state: Mapping[str, Any]) -> ReplayBuffer:
        assert any(state["counts"].values())
        return restore(capacity, pairs, {**state, "counts": dict.fromkeys(state["counts"], 0)})

    patch.setattr(ReplayBuffer, "restore", forget)


def replay_emptied(patch: Patch) -> None:
    restore, nothing = ReplayBuffer.restore, {"counts": {}, "pushed_steps": {}}
    patch.setattr(
        ReplayBuffer, "restore", lambda capacity, _, state: restore(capacity, [], state | nothing)
    )


def _taken_from_policy(patch: Patch, name: WeightSet) -> None:
    load = StageCopies.load

    def forget(self: StageCopies, folder: Path) -> None:
        load(self, folder)
        assert name in self.weights.held()
        self.weights.take(name, WeightSet.POLICY)

    patch.setattr(StageCopies, "load", forget)


def average_begun_anew(patch: Patch) -> None:
    _taken_from_policy(patch, WeightSet.EMA)


def reference_lost(patch: Patch) -> None:
    _taken_from_policy(patch, WeightSet.LAGGED)


SHARED: dict[Callable[[Patch], None], str] = {
    # mutant: the first thing it must change
    no_optimizer: "optimizer/shard-00000.safetensors",
    no_moments: "optimizer/shard-00000.safetensors",
    no_weights: "metric loss",
    first_rows_again: "metric loss",
    first_steps_again: "metric step",
    schedule_again: "metric lr",
}
OF_SAPO: dict[Callable[[Patch], None], str] = {
    draws_of_tokens_again: "pairs/step-000004.parquet",
    draws_from_replay_again: "pairs/step-000003.parquet",
    draws_of_segments_again: "pairs/step-000004.parquet",
    replay_counts_zeroed: "rollouts/state.json",
    replay_emptied: "rollouts/pairs.parquet",
    average_begun_anew: "copies/ema/shard-00000.safetensors",
    reference_lost: "metric loss",
}
MUTANTS = [
    pytest.param(name, mutant, named, id=f"{name}-{mutant.__name__}")
    for name in SETTINGS
    for mutant, named in (SHARED | (OF_SAPO if name == "self_augmented_po" else {})).items()
]


@pytest.mark.parametrize(("name", "mutant", "named"), MUTANTS)
def test_a_mutant_is_found(
    name: str,
    mutant: Callable[[Patch], None],
    named: str,
    cases: dict[str, Case],
    tmp_path: Path,
    monkeypatch: Patch,
) -> None:
    mutant(monkeypatch)
    torch.manual_seed(5)  # nothing may hang on torch's own generator
    try:
        resumed = cases[name].resumed(tmp_path)
    except ValueError as error:
        assert mutant is first_steps_again and "the step of the last push" in str(error)
        return  # the replay buffer refuses steps of the past
    found = different(state_of(cases[name].straight), state_of(resumed))
    print(f"\n{name} {mutant.__name__}: {len(found)} differ; {', '.join(found[:4])}", end="")
    assert any(quantity.endswith(named) for quantity in found), found
