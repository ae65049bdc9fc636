"""Marginals of preference pairs, and how far they follow the scores of the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats
from torch import Tensor

from nemo_selfpref.errors import DataError

MIN_PAIRS = 3
"""Through two points any correlation is +1 or -1."""


@dataclass(frozen=True)
class Correlation:
    """How the marginals of some pairs go with the differences of their scores.

    kendall is tau-b, which allows for ties; accuracy the share of pairs with a marginal above 0.
    """

    pairs: int
    pearson: float
    spearman: float
    kendall: float
    mean_marginal: float
    accuracy: float


def marginals(policy: Tensor, reference: Tensor) -> list[float]:
    """h = [log pi(y+|x) - log pi_ref(y+|x)] - [log pi(y-|x) - log pi_ref(y-|x)] of N pairs.

    policy, reference: float64 [2N] sums of response log-probs, chosen answers before rejected.
    """
    chosen, rejected = (policy - reference).chunk(2)
    return (chosen - rejected).tolist()


def check_differences(score_differences: Sequence[float]) -> None:
    """Raise DataError for score differences with which no correlation is defined."""
    if len(score_differences) < MIN_PAIRS:
        raise DataError(
            f"too few pairs for a correlation; got {len(score_differences)}; expected at least "
            f"{MIN_PAIRS}; give more pairs, or see why others were dropped"
        )
    _check_vary("score differences", score_differences, "give pairs rated more finely")


def _check_vary(what: str, values: Sequence[float], fix: str) -> None:
    if min(values) == max(values):
        raise DataError(
            f"the correlation is undefined, because the {what} do not vary; got {values[0]:g} for "
            f"all {len(values)} pairs; expected two different values or more; {fix}"
        )


def correlation(values: Sequence[float], score_differences: Sequence[float]) -> Correlation:
    """Marginals against score differences, pair by pair (Sr-DPO, section 4.4, Table 4).

    Raises:
        DataError: fewer than three pairs, values that do not vary or are no finite numbers.
    """
    check_differences(score_differences)
    odd = sum(not math.isfinite(value) for value in values)
    if odd:
        raise DataError(
            f"the correlation is undefined, because marginals are no finite numbers; got {odd} "
            f"such of {len(values)}; expected none; use a checkpoint from before it diverged"
        )
    _check_vary("marginals", values, "give a policy that was trained, and what it started from")

    def statistic(test: Callable[..., Any]) -> float:
        return float(test(values, score_differences).statistic)

    return Correlation(
        pairs=len(values),
        pearson=statistic(stats.pearsonr),
        spearman=statistic(stats.spearmanr),
        kendall=statistic(stats.kendalltau),
        mean_marginal=math.fsum(values) / len(values),
        accuracy=sum(value > 0 for value in values) / len(values),
    )
