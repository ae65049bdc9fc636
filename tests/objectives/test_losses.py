from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from vectors import VECTORS, Vector

from nemo_selfpref.objectives import losses
from nemo_selfpref.objectives.objective import (
    DPOObjective,
    IPOObjective,
    Loss,
    NLLScope,
    Objective,
    ORPOObjective,
    PairLogps,
    Pass,
    SFTObjective,
)

LN2 = math.log(2.0)
logps = st.floats(min_value=-500.0, max_value=-0.01)
betas = st.floats(min_value=0.001, max_value=5.0)
by_name = pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v.name)


def pair_logps(chosen: Tensor, rejected: Tensor, lengths: tuple[int, int]) -> PairLogps:
    """One pair; its prompt is three tokens long and costs -6."""
    count = chosen.shape[0]
    return PairLogps(
        chosen=chosen,
        chosen_len=torch.full((count,), lengths[0]),
        rejected=rejected,
        rejected_len=torch.full((count,), lengths[1]),
        full_chosen=chosen - 6.0,
        full_chosen_len=torch.full((count,), lengths[0] + 3),
    )


def evaluate(
    objective: Objective,
    values: tuple[float, float, float, float],
    lengths: tuple[int, int] = (10, 12),
    dtype: torch.dtype = torch.float64,
) -> tuple[Loss, Tensor, Tensor]:
    """The loss of one pair and its gradients by policy chosen and rejected."""
    pc, pr, rc, rr = (torch.tensor([v], dtype=dtype) for v in values)
    pc.requires_grad_()
    pr.requires_grad_()
    passes = {Pass.POLICY: pair_logps(pc, pr, lengths), Pass.REFERENCE: pair_logps(rc, rr, lengths)}
    result = objective({name: passes[name] for name in objective.passes})
    return result, *torch.autograd.grad(result.loss.sum(), (pc, pr))


@by_name
def test_value_and_gradients_of_the_literal_vectors(vector: Vector) -> None:
    result, chosen, rejected = evaluate(vector.objective, vector.logps, vector.lengths)
    assert result.loss.item() == pytest.approx(vector.loss, rel=1e-12, abs=1e-30)
    assert chosen.item() == pytest.approx(vector.grads[0], rel=1e-12, abs=1e-15)
    assert rejected.item() == pytest.approx(vector.grads[1], rel=1e-12, abs=1e-15)
    assert result.weight.tolist() == [1]


@by_name
def test_the_literal_vectors_in_float32(vector: Vector) -> None:
    result, chosen, rejected = evaluate(
        vector.objective, vector.logps, vector.lengths, torch.float32
    )
    assert result.loss.dtype == chosen.dtype == rejected.dtype == torch.float32
    assert result.loss.item() == pytest.approx(vector.loss, rel=1e-6, abs=1e-12)
    assert chosen.item() == pytest.approx(vector.grads[0], rel=2e-6, abs=1e-6)
    assert rejected.item() == pytest.approx(vector.grads[1], rel=2e-6, abs=1e-6)


def test_there_is_a_vector_of_every_kind() -> None:
    assert len(VECTORS) == 10
    assert {type(v.objective) for v in VECTORS} == {DPOObjective, IPOObjective, ORPOObjective}


@given(logps, logps, logps, logps, betas, st.floats(min_value=-100.0, max_value=100.0))
def test_only_the_ratio_to_the_reference_counts(
    pc: float, pr: float, rc: float, rr: float, beta: float, shift: float
) -> None:
    for objective in (DPOObjective(beta), IPOObjective(beta)):
        plain = evaluate(objective, (pc, pr, rc, rr))[0].loss.item()
        shifted = evaluate(objective, (pc + shift, pr, rc + shift, rr))[0].loss.item()
        assert shifted == pytest.approx(plain, rel=1e-9, abs=1e-9)


@given(logps, logps, logps, logps, betas, st.floats(min_value=0.0, max_value=0.49))
def test_gradients_of_the_two_sides_are_opposite(
    pc: float, pr: float, rc: float, rr: float, beta: float, smoothing: float
) -> None:
    for objective in (DPOObjective(beta, smoothing), IPOObjective(beta)):
        _, chosen, rejected = evaluate(objective, (pc, pr, rc, rr))
        assert chosen.item() == -rejected.item()


@given(logps, logps, betas)
def test_a_policy_equal_to_its_reference(pc: float, pr: float, beta: float) -> None:
    result, chosen, _ = evaluate(DPOObjective(beta), (pc, pr, pc, pr))
    assert result.loss.item() == pytest.approx(LN2, rel=1e-15)
    assert chosen.item() == pytest.approx(-beta / 2, rel=1e-15)


@given(st.floats(min_value=-3000.0, max_value=3000.0), betas)
def test_swapping_the_labels_adds_beta_h(h: float, beta: float) -> None:
    # -logsigmoid(-z) = -logsigmoid(z) + z.
    forth = losses.dpo_loss(torch.tensor([h], dtype=torch.float64), beta).item()
    back = losses.dpo_loss(torch.tensor([-h], dtype=torch.float64), beta).item()
    assert back == pytest.approx(forth + beta * h, rel=1e-12, abs=1e-12)


def test_label_smoothing_mixes_the_two_labels() -> None:
    # z = 0.1 * 4.75 = 0.475: 0.9 * 0.48358908787082472 + 0.1 * (0.48358908787082472 + 0.475).
    h = torch.tensor([4.75], dtype=torch.float64)
    mixed = 0.9 * 0.48358908787082472 + 0.1 * 0.95858908787082472
    assert losses.dpo_loss(h, 0.1, 0.1).item() == pytest.approx(mixed, rel=1e-12)


def test_extreme_margins_stay_finite() -> None:
    h = torch.tensor([-1e6, 1e6], requires_grad=True)
    loss = losses.dpo_loss(h, 0.1)
    loss.sum().backward()
    assert loss.tolist() == [pytest.approx(1e5), 0.0]
    assert h.grad is not None
    assert h.grad.tolist() == [pytest.approx(-0.1), 0.0]


def log1mexp_and_slope(a: float, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
    x = torch.tensor([a], dtype=dtype, requires_grad=True)
    y = losses.log1mexp(x)
    y.sum().backward()
    assert x.grad is not None
    return y.item(), x.grad.item()


@given(st.floats(min_value=-5000.0, max_value=-1e-8))
@example(-LN2)
@example(-1e-8)
@example(-5000.0)
def test_log1mexp_and_its_gradient(a: float) -> None:
    value, slope = log1mexp_and_slope(a)
    with mpmath.workdps(50):
        exact = mpmath.log1p(-mpmath.exp(a))
        exact_slope = -mpmath.exp(a) / (1 - mpmath.exp(a))
    assert value == pytest.approx(float(exact), rel=1e-12, abs=1e-300)
    assert slope == pytest.approx(float(exact_slope), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("a", [0.0, -1e-45, -1e-20, -1e-11])
def test_log1mexp_next_to_zero(a: float, dtype: torch.dtype) -> None:
    # log(1 - exp(-1e-10)) = log(1e-10) to ten digits, and flat from there on.
    value, slope = log1mexp_and_slope(a, dtype)
    assert value == pytest.approx(-23.025850929990455, rel=1e-6)
    assert slope == 0.0


@given(st.floats(min_value=-5000.0, max_value=0.0, width=32))
def test_log1mexp_in_float32_is_finite(a: float) -> None:
    value, slope = log1mexp_and_slope(a, torch.float32)
    assert math.isfinite(value) and value <= 0.0
    assert math.isfinite(slope) and slope <= 0.0


@pytest.mark.parametrize("scope", list(NLLScope))
@pytest.mark.parametrize(("pc", "pr"), [(0.0, -3.0), (-3.0, 0.0), (0.0, 0.0), (-1e-30, -5e4)])
def test_orpo_of_a_certain_answer_is_finite(pc: float, pr: float, scope: NLLScope) -> None:
    objective = ORPOObjective(0.1, scope)
    result, chosen, rejected = evaluate(objective, (pc, pr, 0.0, 0.0), dtype=torch.float32)
    assert result.loss.isfinite().all()
    assert chosen.isfinite().all() and rejected.isfinite().all()


def test_orpo_likelihood_over_prompt_and_response() -> None:
    # pair_logps: the whole chosen sequence sums to -24 - 6 over 20 + 3 tokens.
    full = evaluate(ORPOObjective(0.05), (-24.0, -40.0, 0.0, 0.0), (20, 25))
    response = evaluate(ORPOObjective(0.05, NLLScope.response), (-24.0, -40.0, 0.0, 0.0), (20, 25))
    odds_ratio_term = 0.02308977650001455
    assert full[0].loss.item() == pytest.approx(30 / 23 + odds_ratio_term, rel=1e-12)
    assert response[0].loss.item() == pytest.approx(24 / 20 + odds_ratio_term, rel=1e-12)
    assert full[0].metrics["nll_loss"].item() == pytest.approx(30 / 23, rel=1e-12)
    # The likelihood term's slope by pc goes from -1/20 to -1/23.
    assert (full[1] - response[1]).item() == pytest.approx(1 / 20 - 1 / 23, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    # -255.5 takes nine significant bits; bfloat16 keeps eight.
    big, small = torch.tensor([-256.0], dtype=dtype), torch.tensor([-0.5], dtype=dtype)
    zero = torch.zeros_like(big)
    h = losses.log_ratio_difference(big, small, zero, zero)
    assert h.dtype == torch.float32
    assert h.item() == -255.5
    assert losses.dpo_loss(small, 0.1).dtype == torch.float32
    assert losses.ipo_loss(small, 0.1).dtype == torch.float32
    assert losses.ipo_loss(big, 0.1).item() == (-256.0 - 5.0) ** 2
    assert losses.log_odds_difference(small, big).dtype == torch.float32
    assert losses.orpo_loss(small, small, 0.1).dtype == torch.float32


def test_widen_leaves_wide_types_alone() -> None:
    assert losses.widen(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert losses.widen(torch.zeros(1)).dtype == torch.float32


def test_dpo_metrics() -> None:
    # beta 0.1: rewards 0.1 * (-42.5 + 45) and 0.1 * (-50.25 + 48).
    metrics = evaluate(DPOObjective(0.1), (-42.5, -50.25, -45.0, -48.0), (20, 25))[0].metrics
    assert {name: pytest.approx(v.item()) for name, v in metrics.items()} == {
        "rewards/chosen": 0.25,
        "rewards/rejected": -0.225,
        "rewards/margins": 0.475,
        "rewards/accuracies": 1.0,
        "logps/chosen": -42.5,
        "logps/rejected": -50.25,
        "lengths/chosen": 20.0,
        "lengths/rejected": 25.0,
    }
    assert not any(v.requires_grad for v in metrics.values())


def test_a_tie_is_not_an_accurate_reward() -> None:
    metrics = evaluate(DPOObjective(0.1), (-1.0, -2.0, -1.0, -2.0))[0].metrics
    assert metrics["rewards/accuracies"].item() == 0.0


def test_length_normalised_rewards() -> None:
    # 0.1 * 2.5 / 20 and 0.1 * -2.25 / 25.
    objective = IPOObjective(0.1, length_normalized=True)
    metrics = evaluate(objective, (-42.5, -50.25, -45.0, -48.0), (20, 25))[0].metrics
    assert metrics["rewards/chosen"].item() == pytest.approx(0.0125)
    assert metrics["rewards/rejected"].item() == pytest.approx(-0.009)


def test_sft_weighs_by_response_tokens() -> None:
    chosen = torch.tensor([-6.0, -2.0], requires_grad=True)
    rows = pair_logps(chosen, torch.empty(0), (3, 0))
    result = SFTObjective()({Pass.POLICY: rows})
    result.loss.sum().backward()
    assert result.loss.tolist() == [6.0, 2.0]
    assert result.weight.tolist() == [3, 3]
    assert chosen.grad is not None and chosen.grad.tolist() == [-1.0, -1.0]
    assert not SFTObjective.paired and SFTObjective.passes == {Pass.POLICY}


def test_which_losses_need_a_reference() -> None:
    both = {Pass.POLICY, Pass.REFERENCE}
    assert DPOObjective.passes == IPOObjective.passes == both
    assert ORPOObjective.passes == {Pass.POLICY}
    assert DPOObjective.paired and IPOObjective.paired and ORPOObjective.paired
