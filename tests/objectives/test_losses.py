from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from one_pair import repeatable
from torch import Tensor

from nemo_selfpref.objectives import losses

LN2 = math.log(2.0)
margins = st.floats(min_value=-3000.0, max_value=3000.0)
betas = st.floats(min_value=0.001, max_value=5.0)
strengths = st.floats(min_value=0.0, max_value=1.0)
lambdas = st.floats(min_value=0.0, max_value=2.0)


def scalar(value: float, grad: bool = False) -> Tensor:
    return torch.tensor([value], dtype=torch.float64, requires_grad=grad)


def value_and_slope(loss: Tensor, by: Tensor) -> tuple[float, float]:
    return loss.item(), torch.autograd.grad(loss.sum(), by)[0].item()


@repeatable
@given(margins, betas)
def test_swapping_the_labels_adds_beta_h(h: float, beta: float) -> None:
    # -logsigmoid(-z) = -logsigmoid(z) + z.
    forth = losses.dpo_loss(scalar(h), beta).item()
    back = losses.dpo_loss(scalar(-h), beta).item()
    assert back == pytest.approx(forth + beta * h, rel=1e-12, abs=1e-12)


def test_label_smoothing_mixes_the_two_labels() -> None:
    # z = 0.1 * 4.75 = 0.475: 0.9 * 0.48358908787082472 + 0.1 * (0.48358908787082472 + 0.475).
    h = scalar(4.75)
    mixed = 0.9 * 0.48358908787082472 + 0.1 * 0.95858908787082472
    assert losses.dpo_loss(h, 0.1, 0.1).item() == pytest.approx(mixed, rel=1e-12)


def test_extreme_margins_stay_finite() -> None:
    h = torch.tensor([-1e6, 1e6], requires_grad=True)
    loss = losses.dpo_loss(h, 0.1)
    loss.sum().backward()
    assert loss.tolist() == [pytest.approx(1e5), 0.0]
    assert h.grad is not None
    assert h.grad.tolist() == [pytest.approx(-0.1), 0.0]


@repeatable
@given(margins, betas)
def test_spce_of_a_certain_preference_is_dpo(h: float, beta: float) -> None:
    x = scalar(h, grad=True)
    soft = value_and_slope(losses.spce_loss(x, torch.ones(1), beta), x)
    assert soft == value_and_slope(losses.dpo_loss(x, beta), x)


@repeatable
@given(margins, strengths, betas)
def test_spce_of_the_swapped_pair(h: float, p: float, beta: float) -> None:
    forth, back = scalar(h, grad=True), scalar(-h, grad=True)
    value, slope = value_and_slope(losses.spce_loss(forth, scalar(p), beta), forth)
    swapped, opposite = value_and_slope(losses.spce_loss(back, scalar(1 - p), beta), back)
    assert swapped == pytest.approx(value, rel=1e-12, abs=1e-12)
    assert opposite == pytest.approx(-slope, rel=1e-12, abs=1e-12)


@repeatable
@given(margins, strengths, betas)
def test_spce_draws_the_prediction_to_the_strength(h: float, p: float, beta: float) -> None:
    # The gradient that the paper gives below eq. 8: beta (p_hat - p).
    x = scalar(h, grad=True)
    _, slope = value_and_slope(losses.spce_loss(x, scalar(p), beta), x)
    assert slope == pytest.approx(beta * (torch.sigmoid(scalar(beta * h)).item() - p), abs=1e-12)


@repeatable
@given(margins, st.floats(min_value=0.0, max_value=0.49), betas)
def test_label_smoothing_is_a_strength(h: float, smoothing: float, beta: float) -> None:
    soft = losses.spce_loss(scalar(h), scalar(1 - smoothing), beta).item()
    hard = losses.dpo_loss(scalar(h), beta, smoothing).item()
    assert soft == pytest.approx(hard, rel=1e-12, abs=1e-12)


def test_a_strength_below_a_half_is_not_clipped() -> None:
    # z = 0.475: 0.2 * 0.48358908787082472 + 0.8 * (0.48358908787082472 + 0.475). At h = 0 the
    # slope is 0.1 * (0.5 - 0.2): the chosen answer is pushed down.
    value = losses.spce_loss(scalar(4.75), scalar(0.2), 0.1).item()
    assert value == pytest.approx(0.86358908787082472, rel=1e-12)
    h = scalar(0.0, grad=True)
    _, slope = value_and_slope(losses.spce_loss(h, scalar(0.2), 0.1), h)
    assert slope == pytest.approx(0.03, rel=1e-12)


def test_spce_is_not_what_equation_7_prints() -> None:
    # The printed p_hat = sigmoid(beta log-ratio(y+) - log-ratio(y-)): 0.1 * 2.5 + 2.25 = 2.5.
    p = 0.7
    chosen, rejected = scalar(2.5, grad=True), scalar(-2.25, grad=True)
    printed = torch.sigmoid(0.1 * chosen - rejected)
    literal = -(p * torch.log(printed) + (1 - p) * torch.log(1 - printed))
    by_chosen, by_rejected = torch.autograd.grad(literal.sum(), (chosen, rejected))
    assert literal.item() == pytest.approx(0.8288897342925498, rel=1e-12)
    assert by_chosen.item() == pytest.approx(0.022414181997875652, rel=1e-12)
    assert by_rejected.item() == pytest.approx(-0.22414181997875648, rel=1e-12)
    ours = losses.spce_loss(chosen - rejected, scalar(p), 0.1)
    assert ours.item() == pytest.approx(0.6260890878708247, rel=1e-12)


@repeatable
@given(margins, margins, betas)
def test_refinement_with_lambda_zero_is_the_baseline(h: float, delta: float, beta: float) -> None:
    x, d = scalar(h, grad=True), scalar(delta)
    refined = value_and_slope(losses.sr_dpo_loss(x, d, beta, 0.0), x)
    assert refined == value_and_slope(losses.dpo_loss(x, beta), x)
    refined = value_and_slope(losses.sr_ipo_loss(x, d, beta, 0.0), x)
    assert refined == value_and_slope(losses.ipo_loss(x, beta), x)


@repeatable
@given(margins, betas, lambdas)
def test_no_gradient_flows_through_the_refined_margin(h: float, beta: float, lam: float) -> None:
    # With Delta = beta h the loss would lose its slope at lambda = 1; stopped, Delta is a constant.
    for loss in (losses.sr_dpo_loss, losses.sr_ipo_loss):
        x, same = scalar(h, grad=True), scalar(beta * h)
        through = value_and_slope(loss(x, beta * x, beta, lam), x)
        assert through == value_and_slope(loss(x, same, beta, lam), x)


@repeatable
@given(st.floats(min_value=-100.0, max_value=100.0), betas, lambdas)
def test_sr_ipo_is_zero_at_its_target(delta: float, beta: float, lam: float) -> None:
    # Eq. 15: h = 1/(2 beta) + lambda Delta.
    h = scalar(1 / (2 * beta) + lam * delta, grad=True)
    value, slope = value_and_slope(losses.sr_ipo_loss(h, scalar(delta), beta, lam), h)
    assert value == pytest.approx(0.0, abs=1e-20)
    assert slope == pytest.approx(0.0, abs=1e-10)


def log1mexp_and_slope(a: float, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
    x = torch.tensor([a], dtype=dtype, requires_grad=True)
    y = losses.log1mexp(x)
    y.sum().backward()
    assert x.grad is not None
    return y.item(), x.grad.item()


@repeatable
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


@repeatable
@given(st.floats(min_value=-5000.0, max_value=0.0, width=32))
def test_log1mexp_in_float32_is_finite(a: float) -> None:
    value, slope = log1mexp_and_slope(a, torch.float32)
    assert math.isfinite(value) and value <= 0.0
    assert math.isfinite(slope) and slope <= 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    # -255.5 takes nine significant bits; bfloat16 keeps eight.
    big, small = torch.tensor([-256.0], dtype=dtype), torch.tensor([-0.5], dtype=dtype)
    ratio = losses.log_ratio(big, small)
    assert ratio.dtype == torch.float32
    assert ratio.item() == -255.5
    assert losses.dpo_loss(small, 0.1).dtype == torch.float32
    assert losses.ipo_loss(small, 0.1).dtype == torch.float32
    assert losses.ipo_loss(big, 0.1).item() == (-256.0 - 5.0) ** 2
    assert losses.spce_loss(small, small.abs(), 0.1).dtype == torch.float32
    assert losses.sr_dpo_loss(small, big, 0.1, 0.3).dtype == torch.float32
    assert losses.sr_ipo_loss(small, big, 0.1, 0.3).dtype == torch.float32
    assert losses.sr_ipo_loss(small, big, 0.1, 0.5).item() == (-0.5 + 128.0 - 5.0) ** 2
    assert losses.log_odds_difference(small, big).dtype == torch.float32
    assert losses.orpo_loss(small, small, 0.1).dtype == torch.float32


def test_widen_leaves_wide_types_alone() -> None:
    assert losses.widen(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert losses.widen(torch.zeros(1)).dtype == torch.float32
