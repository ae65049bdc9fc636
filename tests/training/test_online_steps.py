from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from saving import save_into
from tiny import MakePolicy, scale

from nemo_selfpref.algorithms.base import Averaging, PairMaker, Reference, Rollouts
from nemo_selfpref.config.schema import RefMode, RolloutConfig, RunConfig
from nemo_selfpref.data.batching import StepPlan
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import TrainingError
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.objectives.objective import DPOObjective, Objective, ORPOObjective, Pass
from nemo_selfpref.training.copies import StageCopies
from nemo_selfpref.training.making import AtOnce, Making
from nemo_selfpref.training.rollouts import EngineRollouts
from nemo_selfpref.training.session import embedded_engine
from nemo_selfpref.training.steps import OnlineSteps, Passes
from nemo_selfpref.training.store import read_pairs
from nemo_selfpref.types import Completion, Demonstration, DropReport, PreferencePair, WeightSet

POLICY, EMA, LAGGED = WeightSet.POLICY, WeightSet.EMA, WeightSet.LAGGED
DPO = DPOObjective(0.1)
ROWS = [
    Demonstration("a", (), (5, 6), (8, 9, 2), "x", "f:1"),
    Demonstration("b", (), (30, 31, 32), (33, 2), "x", "f:2"),
    Demonstration("c", (), (40,), (41, 42, 2), "x", "f:3"),
]
PLAN = StepPlan(num_rows=3, global_batch_size=2, max_epochs=4, shuffle=False)
CONFIG = RunConfig(
    name="test", rollout=RolloutConfig(max_new_tokens=6, temperature=1.0, top_p=1.0, batch_size=2)
)


class OverSamples(PairMaker):
    """Each demonstration over a sample; the first `fruitless` attempts drop every pair."""

    def __init__(self, weights: WeightSet = POLICY, fruitless: int = 0) -> None:
        self.weights, self.fruitless = weights, fruitless
        self.drawn: list[list[Completion]] = []
        self.pushed: list[PreferencePair] = []
        self.restored: dict[str, Any] = {}

    def pairs(
        self, step: int, rollouts: Rollouts, rows: Sequence[Demonstration]
    ) -> list[PreferencePair]:
        prompts = [(r.id, r.prompt_ids) for r in rows]
        self.drawn.append(rollouts.sample("answer", prompts, weights=self.weights))
        report, made = DropReport(), []
        for row, found in zip(rows, self.drawn[-1], strict=True):
            if len(self.drawn) <= self.fruitless:
                report.drop("identical", row.source)
                continue
            pair = PreferencePair(
                f"{row.id}@{step}", row.prompt_ids, row.response_ids, found.token_ids, 0.75
            )
            made.append(pair)
        report.kept = len(made)
        self.pushed += made
        rollouts.note("pairs", report)
        rollouts.log({"replay/size": float(len(self.pushed))})
        return made

    def kept(self) -> tuple[Sequence[PreferencePair], Mapping[str, Any]]:
        return self.pushed, {"attempts": len(self.drawn)}

    def restore(self, pairs: Sequence[PreferencePair], state: Mapping[str, Any]) -> None:
        self.pushed, self.restored = list(pairs), dict(state)


class Stage:
    """Online steps over ROWS. Notes which weights were asked for."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: ChatTokenizer,
        folder: Path,
        maker: Any,
        objective: Objective = DPO,
        mode: RefMode = RefMode.last,
    ) -> None:
        self.policy, self.maker, self.folder = policy, maker, folder / "07-policy"
        self.weights = WeightSets(policy)
        self.asked: list[WeightSet] = []
        engine = embedded_engine(
            policy, tokenizer.stop_ids, CONFIG.rollout.batch_size, self.weights
        )
        rollouts = EngineRollouts(CONFIG, tokenizer, engine, self.asked.append, max_length=64)
        copies = StageCopies(self.weights, Reference(mode, every=2), Averaging(0.5, every=1))
        passes = Passes(policy, copies, objective, self.asked.append)
        making = Making(
            maker, lambda n: [ROWS[i] for i in PLAN.rows_of_step(n)], rollouts, self.folder.name
        )
        self.steps = OnlineSteps(PLAN, maker, AtOnce(making), self.folder, copies, passes)

    def answers(self) -> list[list[tuple[int, ...]]]:
        """Tokens of every attempt so far."""
        return [[c.token_ids for c in drawn] for drawn in self.maker.drawn]


@pytest.fixture
def stage(policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path) -> Stage:
    made = Stage(policy, tokenizer, tmp_path, OverSamples())
    made.steps.begin()
    return made


def tokens_in(drawn: Sequence[Completion]) -> int:
    return sum(len(c.token_ids) for c in drawn)


def test_a_step_makes_its_pairs(stage: Stage) -> None:
    first = stage.steps.step(0)
    assert stage.steps.num_steps == 8  # (2 + 1 rows) four times
    assert [row.id for row in first.rows] == ["a@0", "b@0"]
    assert first.inputs.strength.tolist() == [0.75, 0.75]
    assert first.metrics == {
        "rollout/generated_tokens": tokens_in(stage.maker.drawn[0]),
        "rollout/cached_tokens": 0.0,
        "replay/size": 2.0,
    }
    assert [row.id for row in stage.steps.step(1).rows] == ["c@1"]
    assert [row.id for row in stage.steps.step(2).rows] == ["a@2", "b@2"]


def test_the_pairs_are_scored_under_the_reference(stage: Stage) -> None:
    scale(stage.policy)
    step = stage.steps.step(0)
    reference = step.inputs.passes[Pass.REFERENCE]
    chosen = [(row.prompt_ids, row.response_ids) for row in ROWS[:2]]
    answers = zip(ROWS[:2], stage.maker.drawn[0], strict=True)
    rejected = [(row.prompt_ids, c.token_ids) for row, c in answers]
    with stage.weights.using(LAGGED):
        want = stage.policy.score(chosen + rejected).sums.tolist()
    now = stage.policy.score(chosen + rejected).sums.tolist()
    assert reference.chosen.tolist() == pytest.approx(want[:2], abs=1e-4)
    assert reference.rejected.tolist() == pytest.approx(want[2:], abs=1e-4)
    assert min(abs(a - b) for a, b in zip(want, now, strict=True)) > 0.01
    assert stage.asked == [POLICY, LAGGED]


def test_the_pairs_are_kept_beside_the_stage(stage: Stage) -> None:
    steps = [stage.steps.step(number) for number in (0, 1)]
    for number, step in enumerate(steps, start=1):
        path = stage.folder / "pairs" / f"step-{number:06d}.parquet"
        assert read_pairs(path) == list(step.rows)


def test_a_step_done_again_draws_the_same(stage: Stage) -> None:
    for number in (0, 0, 2):
        stage.steps.step(number)
    first, again, next_epoch = stage.answers()
    assert first == again
    assert first != next_epoch  # the same prompts


def test_sampling_follows_the_policy(stage: Stage) -> None:
    stage.steps.step(0)
    scale(stage.policy)
    stage.steps.step(0)
    before, after = stage.maker.drawn
    assert {c.weight_version for c in before} == {0} and {c.weight_version for c in after} == {1}
    assert stage.answers()[0] != stage.answers()[1]


def test_sampling_from_the_average(
    policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    stage = Stage(policy, tokenizer, tmp_path, OverSamples(EMA), ORPOObjective(0.1), RefMode.none)
    stage.steps.begin()
    assert stage.weights.held() == [EMA]
    stage.steps.step(0)
    for done in (1, 2):
        scale(policy)
        stage.steps.after_step(done)
    scale(policy)
    step = stage.steps.step(0)
    facts = [{(c.weight_set, c.weight_version) for c in drawn} for drawn in stage.maker.drawn]
    assert facts == [{(EMA, 0)}, {(EMA, 2)}]
    assert stage.answers()[0] != stage.answers()[1]
    assert step.inputs.passes == {} and stage.asked == [EMA, EMA]


def test_a_fruitless_step_samples_again(
    policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    stage = Stage(policy, tokenizer, tmp_path, OverSamples(fruitless=2))
    stage.steps.begin()
    step = stage.steps.step(0)
    assert [row.id for row in step.rows] == ["a@0", "b@0"]
    first, second, third = stage.answers()
    assert first != second != third != first
    report = stage.steps.reports["pairs"]
    assert report.kept == 2 and report.dropped == {"identical": 4}
    assert stage.steps.generated_tokens == sum(tokens_in(d) for d in stage.maker.drawn)


def test_three_fruitless_attempts_are_the_end(
    policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    stage = Stage(policy, tokenizer, tmp_path, OverSamples(fruitless=3))
    stage.steps.begin()
    message = (
        r"step 3: 2 prompts gave no usable pair in 3 attempts \(pairs: 0 kept, dropped identical: "
        r"6\)\. .* raise rollout\.temperature, or lower the learning rate"
    )
    with pytest.raises(TrainingError, match=message):
        stage.steps.step(2)
    assert len(stage.maker.drawn) == 3
    assert not stage.folder.exists()


def test_counts_grow_over_the_stage(stage: Stage) -> None:
    for number in range(4):
        stage.steps.step(number)
    assert stage.steps.reports["pairs"].kept == 6  # 2 + 1 + 2 + 1
    assert stage.steps.generated_tokens == sum(tokens_in(d) for d in stage.maker.drawn)


def test_a_stage_goes_on_where_it_was_saved(
    stage: Stage,
    make_policy: MakePolicy,
    llama_folder: Path,
    tokenizer: ChatTokenizer,
    tmp_path: Path,
) -> None:
    for number in (0, 1):
        stage.steps.step(number)
        scale(stage.policy)
        stage.steps.after_step(number + 1)
    save_into(tmp_path / "step-2", stage.steps.save)
    want = stage.steps.step(2)

    policy = make_policy(llama_folder)
    scale(policy)
    scale(policy)
    resumed = Stage(policy, tokenizer, tmp_path, OverSamples())
    resumed.steps.load(tmp_path / "step-2")
    assert resumed.maker.pushed == stage.maker.pushed[:3] and len(stage.maker.pushed) == 5
    assert resumed.maker.restored == {"attempts": 2}
    assert resumed.steps.reports["pairs"].kept == 3
    assert resumed.steps.generated_tokens == sum(tokens_in(d) for d in stage.maker.drawn[:2])
    assert resumed.weights.held() == [EMA, LAGGED]
    got = resumed.steps.step(2)
    assert got.rows == want.rows and got.metrics == want.metrics
    ours, theirs = got.inputs.passes[Pass.REFERENCE], want.inputs.passes[Pass.REFERENCE]
    assert torch.equal(ours.chosen, theirs.chosen) and torch.equal(ours.rejected, theirs.rejected)
    assert resumed.steps.reports == stage.steps.reports


class KeepsNothing(PairMaker):
    """Each demonstration over the next one's."""

    def pairs(
        self, step: int, rollouts: Rollouts, rows: Sequence[Demonstration]
    ) -> list[PreferencePair]:
        others = [*rows[1:], rows[0]]
        return [
            PreferencePair(row.id, row.prompt_ids, row.response_ids, other.response_ids)
            for row, other in zip(rows, others, strict=True)
        ]


def test_a_maker_that_keeps_nothing(
    policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    for _ in range(2):
        stage = Stage(policy, tokenizer, tmp_path, KeepsNothing())
        stage.steps.begin()
        nothing = {"rollout/generated_tokens": 0.0, "rollout/cached_tokens": 0.0}
        assert stage.steps.step(0).metrics == nothing
        save_into(tmp_path / "step-1", stage.steps.save)
        stage.steps.load(tmp_path / "step-1")
    assert stage.steps.generated_tokens == 0 and stage.steps.reports == {}
