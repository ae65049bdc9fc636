from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saving import save_into
from tiny import scale

from nemo_selfpref.algorithms.base import Averaging, Reference
from nemo_selfpref.config.schema import RefMode
from nemo_selfpref.data.batching import StepPlan
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.objectives.objective import (
    DPOObjective,
    Objective,
    ORPOObjective,
    Pass,
    SFTObjective,
    SPCEObjective,
    SrDPOObjective,
)
from nemo_selfpref.training.copies import StageCopies
from nemo_selfpref.training.steps import FixedSteps, Passes
from nemo_selfpref.types import Demonstration, PreferencePair, TokenIds, WeightSet

POLICY, FROZEN, EMA, LAGGED = (WeightSet(n) for n in ("policy", "frozen", "ema", "lagged"))
DPO, SR_DPO = DPOObjective(0.1), SrDPOObjective(0.1, 0.3)
PAIRS = [
    PreferencePair("a", (5, 6), (8, 9, 2), (10, 2), 0.75, augmented_prompt_ids=(90, 91, 5, 6)),
    PreferencePair("b", (30,), (31, 2), (32, 33, 2), augmented_prompt_ids=(90, 91, 30)),
    PreferencePair("c", (40, 41), (44, 2), (45, 2), 0.5, augmented_prompt_ids=(90, 91, 40, 41)),
]
PLAN = StepPlan(num_rows=3, global_batch_size=2, max_epochs=2, shuffle=False)
Scores = dict[str, tuple[float, float]]


class Stage:
    """Steps over PAIRS, three policies apart: FROZEN, the policy the stage begins with, and the
    policy of its first step. Notes which weights were asked for."""

    def __init__(
        self, policy: Policy, mode: RefMode, objective: Objective, plan: StepPlan = PLAN
    ) -> None:
        self.policy = policy
        self.weights = WeightSets(policy)
        self.weights.take(FROZEN, POLICY)
        scale(policy)
        averaging = Averaging(0.5, 1) if mode is RefMode.ema else None
        copies = StageCopies(self.weights, Reference(mode, every=1), averaging)
        self.asked: list[WeightSet] = []
        passes = Passes(policy, copies, objective, self.asked.append)
        self.steps = FixedSteps(PAIRS, plan, copies, passes)

    def score_once(self, path: Path, unmoved: bool = False) -> None:
        self.steps.score_once(path, unmoved)

    def scores(self, weights: WeightSet, augmented: bool = False) -> Scores:
        """(chosen, rejected) log-probs of PAIRS by id, asked of the policy itself."""
        return scores(self.weights, weights, augmented)


def scores(weights: WeightSets, name: WeightSet, augmented: bool = False) -> Scores:
    def prompt(pair: PreferencePair) -> TokenIds:
        return (pair.augmented_prompt_ids or ()) if augmented else pair.prompt_ids

    chosen = [(prompt(p), p.chosen_ids) for p in PAIRS]
    rejected = [(prompt(p), p.rejected_ids) for p in PAIRS]
    with weights.using(name):
        sums = weights.policy.score(chosen + rejected).sums.tolist()
    return {p.id: (sums[i], sums[i + len(PAIRS)]) for i, p in enumerate(PAIRS)}


def given(steps: FixedSteps, number: int) -> dict[Pass, Scores]:
    """What the loss is given in a step, by pass and row."""
    step = steps.step(number)
    return {
        name: {
            row.id: (float(logps.chosen[i]), float(logps.rejected[i]))
            for i, row in enumerate(step.rows)
        }
        for name, logps in step.inputs.passes.items()
    }


def assert_scores(got: Scores, want: Scores, rows: str) -> None:
    assert sorted(got) == sorted(rows)
    for id in rows:
        assert got[id] == pytest.approx(want[id], abs=1e-4), id


REF, REFINED, REFINED_REF = Pass.REFERENCE, Pass.REFINED, Pass.REFINED_REFERENCE


@pytest.mark.parametrize(
    ("mode", "objective", "once", "live"),
    [
        (RefMode.frozen, DPO, {REF}, set()),
        (RefMode.last, DPO, {REF}, set()),
        (RefMode.policy, DPO, set(), {REF}),
        (RefMode.ema, DPO, set(), {REF}),
        (RefMode.frozen, SR_DPO, {REF, REFINED_REF}, {REFINED}),
        (RefMode.last, SR_DPO, {REF, REFINED_REF}, {REFINED}),
        (RefMode.policy, SR_DPO, set(), {REF, REFINED, REFINED_REF}),
        (RefMode.ema, SR_DPO, set(), {REF, REFINED, REFINED_REF}),
        (RefMode.none, ORPOObjective(0.1), set(), set()),
        (RefMode.last, SFTObjective(), set(), set()),
    ],
    ids=lambda v: getattr(v, "name", type(v).__name__),
)
def test_what_is_scored_once(
    policy: Policy, mode: RefMode, objective: Objective, once: set[Pass], live: set[Pass]
) -> None:
    steps = Stage(policy, mode, objective).steps
    assert steps.scored_once == once and steps.live == live


def test_a_frozen_reference(policy: Policy, tmp_path: Path) -> None:
    stage = Stage(policy, RefMode.frozen, DPO)
    want = stage.scores(FROZEN)
    stage.score_once(tmp_path / "reference.safetensors")
    stage.steps.begin()
    assert stage.asked == [FROZEN] and stage.weights.held() == [FROZEN]
    scale(policy)
    assert_scores(given(stage.steps, 0)[REF], want, "ab")
    assert_scores(given(stage.steps, 1)[REF], want, "c")
    assert_scores(given(stage.steps, 2)[REF], want, "ab")  # the second epoch
    assert stage.asked == [FROZEN]
    assert abs(want["a"][0] - stage.scores(POLICY)["a"][0]) > 0.1


@pytest.mark.parametrize("mode", [RefMode.last, RefMode.frozen])
def test_a_reference_the_policy_still_is(policy: Policy, mode: RefMode, tmp_path: Path) -> None:
    """No copy is kept of it: it is scored before the policy moves."""
    stage = Stage(policy, mode, DPO)
    stage.weights.drop(FROZEN)
    want = stage.scores(POLICY)
    stage.score_once(tmp_path / "reference.safetensors", unmoved=True)
    stage.steps.begin()
    assert stage.asked == [POLICY] and stage.weights.held() == []
    scale(policy)
    assert_scores(given(stage.steps, 0)[REF], want, "ab")


@pytest.mark.parametrize("mode", [RefMode.policy, RefMode.ema])
def test_a_reference_that_moves(policy: Policy, mode: RefMode) -> None:
    stage = Stage(policy, mode, DPO)
    begun = stage.scores(POLICY)
    stage.steps.begin()
    scale(policy)
    assert_scores(given(stage.steps, 0)[REF], begun, "ab")
    stage.steps.after_step(1)
    moved = stage.scores(POLICY if mode is RefMode.policy else EMA)
    scale(policy)
    assert_scores(given(stage.steps, 0)[REF], moved, "ab")
    assert stage.asked == [LAGGED] * 2
    assert abs(begun["a"][0] - moved["a"][0]) > 0.1


def test_refined_passes_beside_a_frozen_reference(policy: Policy, tmp_path: Path) -> None:
    stage = Stage(policy, RefMode.frozen, SR_DPO)
    plain, augmented = stage.scores(FROZEN), stage.scores(FROZEN, augmented=True)
    stage.score_once(tmp_path / "reference.safetensors")
    stage.steps.begin()
    scale(policy)
    found = given(stage.steps, 0)
    assert_scores(found[REF], plain, "ab")
    assert_scores(found[REFINED_REF], augmented, "ab")
    assert_scores(found[REFINED], stage.scores(POLICY, augmented=True), "ab")
    assert abs(plain["a"][0] - augmented["a"][0]) > 0.1
    scale(policy)
    found = given(stage.steps, 1)
    assert_scores(found[REFINED_REF], augmented, "c")
    assert_scores(found[REFINED], stage.scores(POLICY, augmented=True), "c")
    assert stage.asked == [FROZEN, FROZEN, POLICY, POLICY]


def test_refined_passes_beside_a_reference_that_moves(policy: Policy) -> None:
    stage = Stage(policy, RefMode.ema, SR_DPO)
    stage.steps.begin()
    for done in (1, 2):
        scale(policy)
        stage.steps.after_step(done)
    scale(policy)
    found = given(stage.steps, 0)
    assert_scores(found[REF], stage.scores(LAGGED), "ab")
    assert_scores(found[REFINED_REF], stage.scores(LAGGED, augmented=True), "ab")
    assert_scores(found[REFINED], stage.scores(POLICY, augmented=True), "ab")


def test_rows_keep_their_scores_in_any_order(policy: Policy, tmp_path: Path) -> None:
    plan = replace(PLAN, global_batch_size=3, shuffle=True, seed=4)
    stage = Stage(policy, RefMode.frozen, DPO, plan)
    stage.score_once(tmp_path / "reference.safetensors")
    step = stage.steps.step(0)
    assert [row.id for row in step.rows] not in (["a", "b", "c"], ["c", "b", "a"])
    assert_scores(given(stage.steps, 0)[REF], stage.scores(FROZEN), "abc")
    strength = {row.id: float(s) for row, s in zip(step.rows, step.inputs.strength, strict=True)}
    assert strength == {"a": 0.75, "b": 1.0, "c": 0.5}


def test_scores_of_an_interrupted_stage_are_read_back(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "stage" / "reference.safetensors"
    first = Stage(policy, RefMode.last, SR_DPO)
    want = first.scores(POLICY, augmented=True)
    first.score_once(path, unmoved=True)
    assert load_file(path).keys() == {
        "reference.chosen",
        "reference.rejected",
        "refined_reference.chosen",
        "refined_reference.rejected",
    }
    scale(policy)  # checkpoints lie after the beginning of the stage
    again = Stage(policy, RefMode.last, SR_DPO)
    again.score_once(path, unmoved=True)
    assert again.asked == []
    assert_scores(given(again.steps, 0)[REFINED_REF], want, "ab")


def test_progress_counts_answers(policy: Policy, tmp_path: Path) -> None:
    seen: list[int] = []
    stage = Stage(policy, RefMode.last, SR_DPO)
    stage.steps.score_once(tmp_path / "reference.safetensors", True, seen.append)
    assert sum(seen) == 12  # two passes of three pairs


def test_demonstrations_count_in_full(policy: Policy) -> None:
    rows = [Demonstration(str(i), (), (5, 6), (7, 2), "x", "f:1") for i in range(3)]
    stage = Stage(policy, RefMode.last, SFTObjective())
    steps = FixedSteps(rows, PLAN, stage.steps.copies, stage.steps.passes)
    assert steps.num_steps == 4  # (2 + 1 rows) twice
    step = steps.step(1)
    assert list(step.rows) == rows[2:]
    assert step.inputs.strength.tolist() == [1.0] and step.inputs.passes == {}
    assert step.inputs.strength.dtype == torch.float32


def test_a_paired_loss_refuses_demonstrations(policy: Policy, tmp_path: Path) -> None:
    rows = [Demonstration("a", (), (5, 6), (7, 2), "x", "f:1")]
    stage = Stage(policy, RefMode.last, SPCEObjective(0.1))
    steps = FixedSteps(rows, PLAN, stage.steps.copies, stage.steps.passes)
    with pytest.raises(AssertionError, match="given demonstrations"):
        steps.score_once(tmp_path / "reference.safetensors", unmoved=True)


def test_a_refined_loss_needs_augmented_prompts(policy: Policy) -> None:
    stage = Stage(policy, RefMode.last, SR_DPO)
    pairs: Sequence[PreferencePair] = [PAIRS[0], replace(PAIRS[1], augmented_prompt_ids=None)]
    with pytest.raises(AssertionError, match="needs augmented prompts"):
        stage.steps.passes.score(REFINED, pairs, POLICY)
    stage.steps.passes.score(REF, pairs, POLICY)


@pytest.mark.parametrize("mode", [RefMode.policy, RefMode.ema])
def test_copies_are_saved_and_read_with_the_steps(
    policy: Policy, mode: RefMode, tmp_path: Path
) -> None:
    stage = Stage(policy, mode, DPO)
    stage.steps.begin()
    for done in (1, 2):
        scale(policy)
        stage.steps.after_step(done)
    save_into(tmp_path, stage.steps.save)
    want = given(stage.steps, 0)
    again = Stage(policy, mode, DPO)
    again.steps.load(tmp_path)
    assert_scores(given(again.steps, 0)[REF], want[REF], "ab")
