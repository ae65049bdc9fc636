"""Which of a prompt's sampled answers are set against each other, and how sure the judge is.

Answers are named by their place in the list of samples; a pair is (chosen, rejected).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from math import exp

from nemo_selfpref.rollout.sampling import uniform


class Average(Enum):
    """What is averaged over the judge's two position orders."""

    probability = "probability"
    logit = "logit"


def ranked_pairs(scores: Sequence[float]) -> list[tuple[int, int]]:
    """Rank k over rank K + 1 - k for k = 1 .. floor(K / 2), widest gap first (OSP).

    Ranks follow descending scores, ties in the order given; the median of an odd K is dropped.

    Raises:
        ValueError: fewer than two scores.
    """
    _check_enough(len(scores))
    order = _descending(scores)
    return [(order[k], order[-1 - k]) for k in range(len(order) // 2)]


def random_pairs(num: int, seed: int) -> list[tuple[int, int]]:
    """A random perfect matching of 0 .. num - 1, each pair in random order; an odd one is dropped.

    Raises:
        ValueError: num is below two.
    """
    _check_enough(num)
    order = sorted(range(num), key=lambda place: uniform(seed, place))
    return [(order[k], order[k + 1]) for k in range(0, num - 1, 2)]


def best_and_worst(scores: Sequence[float]) -> tuple[int, int] | None:
    """The first of `ranked_pairs`, or None where all scores are equal or there is but one. Of equal
    best scores the first is taken, of equal worst ones the last."""
    if len(set(scores)) < 2:
        return None
    return ranked_pairs(scores)[0]


def strength_of_orders(
    logits_ab: tuple[float, float], logits_ba: tuple[float, float], average: Average
) -> float:
    """P(first answer beats second) by a judge asked twice, so that its liking for a place cancels.

    Each argument is (logit of label A, logit of label B). In logits_ab the first answer is A, in
    logits_ba it is B. The softmax over the two labels is a sigmoid of their difference; its mean
    over the orders is taken as probabilities or as differences of logits.
    """
    margins = (logits_ab[0] - logits_ab[1], logits_ba[1] - logits_ba[0])
    if average is Average.logit:
        return _sigmoid(sum(margins) / 2)
    return sum(map(_sigmoid, margins)) / 2


def target_from_difference(p_high: float, p_low: float) -> float:
    """sigmoid(p_high - p_low), the target made of two scores alone (OSP, eq. 12).

    For probabilities it lies within [0.2689, 0.7311]."""
    return _sigmoid(p_high - p_low)


def rejection_sample(scores: Sequence[float], num: int, beta: float, seed: int) -> list[int]:
    """Places of up to `num` answers, in the order accepted (RSO, Liu et al. 2023, algorithm 1).

    Pass after pass over the answers not yet accepted, in order, each is accepted with probability
    exp((r - r_max) / beta), r_max being the highest score among them when the pass begins, until
    `num` are accepted or none is left. Every pass accepts its best answer or ends the search.
    beta = 0, the limit, takes the best ones; a large beta the first ones.

    Raises:
        ValueError: beta is negative.
    """
    if beta < 0:
        raise ValueError(f"rejection sampling: got beta {beta}, expected 0 or more")
    if beta == 0:
        return _descending(scores)[:num]
    accepted: list[int] = []
    left = list(range(len(scores)))
    num_draws = 0
    while left and len(accepted) < num:
        best = max(scores[place] for place in left)
        for place in tuple(left):
            draw = uniform(seed, num_draws)
            num_draws += 1
            if len(accepted) < num and draw < exp((scores[place] - best) / beta):
                accepted.append(place)
                left.remove(place)
    return accepted


def _descending(scores: Sequence[float]) -> list[int]:
    # `reverse` keeps the order of equal scores.
    return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)


def _check_enough(num: int) -> None:
    if num < 2:
        raise ValueError(
            f"pairing answers: got {num}, expected at least 2 for one prompt; sample more of them"
        )


def _sigmoid(x: float) -> float:
    # exp of a large positive number would overflow.
    return 1 / (1 + exp(-x)) if x >= 0 else exp(x) / (1 + exp(x))
