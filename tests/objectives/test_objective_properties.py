"""What holds of the objectives at any log-probs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from one_pair import EVERY_PAIRED, Four, evaluate, repeatable, with_reference

from nemo_selfpref.objectives.objective import (
    DPOObjective,
    IPOObjective,
    SPCEObjective,
    SrDPOObjective,
    SrIPOObjective,
)

LN2 = math.log(2.0)
logps = st.floats(min_value=-500.0, max_value=-0.01)
fours = st.tuples(logps, logps, logps, logps)
anywhere = st.floats(min_value=-5000.0, max_value=-1e-8)
far_fours = st.tuples(anywhere, anywhere, anywhere, anywhere)
betas = st.floats(min_value=0.001, max_value=5.0)


@repeatable
@given(fours, fours, betas, st.floats(min_value=-100.0, max_value=100.0))
def test_only_the_ratio_to_the_reference_counts(
    values: Four, refined: Four, beta: float, shift: float
) -> None:
    def shifted(four: Four) -> Four:
        return four[0] + shift, four[1], four[2] + shift, four[3]

    for objective in with_reference(beta):
        plain = evaluate(objective, values, strength=0.3, refined=refined)
        other = evaluate(objective, shifted(values), strength=0.3, refined=shifted(refined))
        assert other.value == pytest.approx(plain.value, rel=1e-9, abs=1e-9)


@repeatable
@given(fours, betas, st.floats(min_value=0.0, max_value=0.49))
def test_gradients_of_the_two_sides_are_opposite(
    values: Four, beta: float, smoothing: float
) -> None:
    for objective in (*with_reference(beta), DPOObjective(beta, smoothing)):
        found = evaluate(objective, values, strength=1 - smoothing)
        assert found.chosen == -found.rejected


@repeatable
@given(logps, logps, betas)
def test_a_policy_equal_to_its_reference(pc: float, pr: float, beta: float) -> None:
    for objective in (DPOObjective(beta), SPCEObjective(beta), SrDPOObjective(beta, 1.0)):
        found = evaluate(objective, (pc, pr, pc, pr), refined=(pc, pr, pc, pr))
        assert found.value == pytest.approx(LN2, rel=1e-15)
        assert found.chosen == pytest.approx(-beta / 2, rel=1e-15)


@repeatable
@given(fours, st.floats(min_value=0.0, max_value=1.0), betas)
def test_spce_of_a_pair_whose_answers_change_places(values: Four, p: float, beta: float) -> None:
    pc, pr, rc, rr = values
    forth = evaluate(SPCEObjective(beta), (pc, pr, rc, rr), strength=p)
    back = evaluate(SPCEObjective(beta), (pr, pc, rr, rc), strength=1 - p)
    assert back.value == pytest.approx(forth.value, rel=1e-12, abs=1e-12)
    assert back.chosen == pytest.approx(forth.rejected, rel=1e-12, abs=1e-12)


@repeatable
@given(fours, fours, betas)
def test_refinement_with_lambda_zero_is_the_baseline(
    values: Four, refined: Four, beta: float
) -> None:
    for length_normalized in (False, True):
        found = evaluate(
            SrIPOObjective(beta, 0.0, True, length_normalized), values, refined=refined
        )
        baseline = evaluate(IPOObjective(beta, length_normalized), values)
        assert (found.value, found.chosen) == (baseline.value, baseline.chosen)
    found = evaluate(SrDPOObjective(beta, 0.0), values, refined=refined)
    baseline = evaluate(DPOObjective(beta), values)
    assert (found.value, found.chosen) == (baseline.value, baseline.chosen)


@repeatable
@given(fours, fours, betas, st.floats(min_value=0.01, max_value=0.99))
def test_the_refined_passes_get_no_gradient(
    values: Four, refined: Four, beta: float, lam: float
) -> None:
    for objective in (
        SrDPOObjective(beta, lam),
        SrIPOObjective(beta, lam, length_normalized=True),
        SrIPOObjective(beta, lam, delta_beta=False),
    ):
        assert evaluate(objective, values, refined=refined).refined == [0.0, 0.0, 0.0, 0.0]


@repeatable
@given(far_fours, far_fours, st.floats(min_value=0.0, max_value=1.0))
@example((-5000.0, -1e-8, -1e-8, -5000.0), (-1e-8, -5000.0, -5000.0, -1e-8), 1.0)
@example((-1e-8, -5000.0, -5000.0, -1e-8), (-5000.0, -1e-8, -1e-8, -5000.0), 0.0)
@example((-1e-8, -1e-8, -1e-8, -1e-8), (-1e-8, -1e-8, -1e-8, -1e-8), 0.5)
def test_finite_over_the_whole_range(values: Four, refined: Four, strength: float) -> None:
    for objective in EVERY_PAIRED:
        found = evaluate(objective, values, dtype=torch.float32, strength=strength, refined=refined)
        assert math.isfinite(found.value)
        assert math.isfinite(found.chosen) and math.isfinite(found.rejected)
        assert all(map(math.isfinite, found.metrics.values()))
