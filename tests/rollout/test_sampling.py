from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_selfpref.rollout.sampling import sample, seed_of, uniform
from nemo_selfpref.types import SamplingParams

PROBS = [0.4, 0.3, 0.15, 0.1, 0.05]
LOGITS = torch.tensor([PROBS]).log()


def draw(params: SamplingParams, *uniforms: float) -> list[int]:
    """Tokens drawn from PROBS at these uniform draws."""
    return sample(LOGITS.expand(len(uniforms), -1), params, list(uniforms))[0].tolist()


def test_uniform_is_splitmix64() -> None:
    # The published first outputs of SplitMix64 from seed 1234567, top 53 bits.
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [uniform(1234567, step) for step in range(3)] == [
        (output >> 11) / 2**53 for output in outputs
    ]


@given(st.integers(min_value=0, max_value=2**63 - 1), st.integers(min_value=0, max_value=10**6))
def test_uniform_stays_below_one(seed: int, step: int) -> None:
    assert 0.0 <= uniform(seed, step) < 1.0


@pytest.mark.parametrize("along", ["steps of one seed", "seeds at one step"])
def test_uniform_is_uniform(along: str) -> None:
    count, cells = 20_000, 50
    by_step = along == "steps of one seed"
    draws = [uniform(7, i) if by_step else uniform(seed_of(7, i), 0) for i in range(count)]
    observed = [0] * cells
    for value in draws:
        observed[int(value * cells)] += 1
    # 49 degrees of freedom: 85.4 is passed once in a thousand; the draws are fixed.
    assert chi_square(observed, [1 / cells] * cells) < 85.4


def chi_square(observed: list[int], probabilities: list[float]) -> float:
    total = sum(observed)
    return sum(
        (o - total * p) ** 2 / (total * p) for o, p in zip(observed, probabilities, strict=True)
    )


def test_seed_of_is_fixed() -> None:
    # sha256("1234\x1fdraft\x1frow-1"), first eight bytes, shifted by one.
    assert seed_of(1234, "draft", "row-1") == 0x5098A192DC5E8CF1 >> 1
    assert seed_of("a", "b") != seed_of("ab") != seed_of("b", "a")
    assert seed_of(12, 3) != seed_of(1, 23)


@given(st.text(), st.integers())
def test_seed_of_fits_into_63_bits(name: str, number: int) -> None:
    assert 0 <= seed_of(number, name) < 2**63


def test_greedy() -> None:
    assert draw(SamplingParams(1, temperature=0.0), 0.0, 0.5, 0.999) == [0, 0, 0]


def test_inverse_of_the_distribution() -> None:
    # Cumulative 0.4, 0.7, 0.85, 0.95, 1.
    params = SamplingParams(1)
    assert draw(params, 0.0, 0.39, 0.41, 0.69, 0.71, 0.86, 0.96) == [0, 0, 1, 1, 2, 3, 4]
    assert draw(params, 1 - 2**-53) == [4]


def test_top_k_of_one_is_greedy() -> None:
    assert draw(SamplingParams(1, top_k=1), 0.0, 0.5, 0.999) == [0, 0, 0]


def test_top_k_renormalises() -> None:
    # Of 0.4, 0.3 the first has 4/7 = 0.571.
    assert draw(SamplingParams(1, top_k=2), 0.57, 0.572, 0.999) == [0, 1, 1]
    assert draw(SamplingParams(1, top_k=9), 0.96) == [4]


def test_top_p_keeps_the_token_that_crosses() -> None:
    # 0.4 + 0.3 < 0.75 <= 0.85: three tokens, of 0.85 in all: cuts at 0.4706 and 0.8235.
    params = SamplingParams(1, top_p=0.75)
    assert draw(params, 0.47, 0.471, 0.823, 0.824, 0.999) == [0, 1, 1, 2, 2]
    assert draw(SamplingParams(1, top_p=1e-9), 0.999) == [0]


def test_top_p_works_on_what_top_k_left() -> None:
    # Of two tokens 4/7 and 3/7, 0.5 is reached by the first alone.
    assert draw(SamplingParams(1, top_k=2, top_p=0.5), 0.999) == [0]


def test_logprobs_are_those_of_the_untempered_distribution() -> None:
    params = SamplingParams(1, temperature=0.1, top_p=0.5, top_k=3)
    tokens, logprobs = sample(LOGITS, params, [0.99])
    assert tokens.tolist() == [0]
    assert logprobs.item() == pytest.approx(math.log(0.4), rel=1e-6)
    assert logprobs.dtype == torch.float32


def tempered(probabilities: list[float], temperature: float) -> list[float]:
    powers = [p ** (1 / temperature) for p in probabilities]
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize(
    ("params", "exact"),
    [
        (SamplingParams(1), PROBS),
        (SamplingParams(1, temperature=0.5), tempered(PROBS, 0.5)),
        (SamplingParams(1, temperature=2.0), tempered(PROBS, 2.0)),
        (SamplingParams(1, top_k=3), [p / 0.85 for p in PROBS[:3]]),
        (SamplingParams(1, top_p=0.9), [p / 0.95 for p in PROBS[:4]]),
        # At temperature 0.5 the shares are .16 .09 .0225 .01 .0025 of 0.285; the first two make
        # 0.877, so 0.8 keeps two of them.
        (SamplingParams(1, temperature=0.5, top_p=0.8), [16 / 25, 9 / 25]),
    ],
    ids=str,
)
def test_draws_follow_the_exact_distribution(params: SamplingParams, exact: list[float]) -> None:
    count = 20_000
    uniforms = [uniform(seed_of("chi", i), 3) for i in range(count)]
    order = torch.tensor([3, 0, 4, 1, 2])  # the words need not come in order of probability
    logits = torch.empty(1, 5)
    logits[0, order] = LOGITS[0]
    tokens, _ = sample(logits.expand(count, -1), params, uniforms)
    observed = torch.bincount(tokens, minlength=5)[order].tolist()
    assert sum(observed[len(exact) :]) == 0
    # Four degrees of freedom at most: 18.5 is passed once in a thousand; the draws are fixed.
    assert chi_square(observed[: len(exact)], exact) < 18.5


@given(
    st.lists(st.floats(min_value=-50, max_value=50), min_size=1, max_size=20),
    st.floats(min_value=0.05, max_value=3.0),
    st.floats(min_value=0.01, max_value=1.0),
    st.integers(min_value=0, max_value=25),
    st.floats(min_value=0.0, max_value=1.0, exclude_max=True),
)
def test_a_drawn_token_is_always_one_that_was_kept(
    row: list[float], temperature: float, top_p: float, top_k: int, point: float
) -> None:
    logits = torch.tensor([row])
    params = SamplingParams(1, temperature, top_p, top_k)
    token = int(sample(logits, params, [point])[0])
    higher = logits[0] > logits[0, token]
    mass = (logits[0].double() / temperature).softmax(-1)[higher].sum().item()
    assert mass < top_p + 1e-6  # what lies above it does not fill the set yet
    assert not top_k or int(higher.sum()) < top_k


def test_rows_are_drawn_each_at_its_own_point() -> None:
    logits = torch.stack([LOGITS[0], LOGITS[0].flip(0)])
    tokens, logprobs = sample(logits, SamplingParams(1), [0.1, 0.7])
    # By token id: 0.1 lies in the first token's 0.4; flipped, 0.7 in the last one's, from 0.6 on.
    assert tokens.tolist() == [0, 4]
    assert logprobs.tolist() == pytest.approx([math.log(0.4)] * 2)


@pytest.mark.parametrize("params", [SamplingParams(1), SamplingParams(1, 1.0, 0.9, 3)])
def test_a_rounding_error_does_not_change_the_draw(params: SamplingParams) -> None:
    """Two layouts give a tie in either order; ranked, the two tokens would change places."""
    one = torch.tensor([[1.0, 1.0 + 1e-7, -3.0]])
    other = torch.tensor([[1.0 + 1e-7, 1.0, -3.0]])
    for point in (0.05, 0.3, 0.7, 0.95):
        assert sample(one, params, [point])[0].item() == sample(other, params, [point])[0].item()
