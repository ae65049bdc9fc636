"""Filters on perplexity: which teacher answers lie within reach of the policy (SGPO, 3.1.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nemo_selfpref.errors import DataError

FENCE = 1.5
"""Tukey's factor: how many interquartile ranges beyond the quartiles a value may lie."""

MIN_VALUES = 4
"""Fewest finite values with which a fence can exclude one of them.

Linear quantiles of one to three values put both fences outside the data, whatever the values, so
below four there is nothing to decide and only rounding could drop a row.
"""


def perplexity(token_logprobs_sum: float, num_tokens: int) -> float:
    """exp of the mean negative log-probability; infinite where that overflows.

    Raises:
        DataError: num_tokens is not positive, so the mean does not exist.
    """
    if num_tokens < 1:
        raise DataError(
            f"perplexity of {num_tokens} tokens: expected at least one response token; "
            "drop empty responses before scoring them"
        )
    try:
        return math.exp(-token_logprobs_sum / num_tokens)
    except OverflowError:
        return math.inf


def iqr_bounds(values: Sequence[float]) -> tuple[float, float]:
    """Tukey's fences (Q1 - 1.5 IQR, Q3 + 1.5 IQR) with linear quantiles.

    Non-finite values are left out; fewer than MIN_VALUES finite ones give (-inf, inf).
    """
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < MIN_VALUES:
        return -math.inf, math.inf
    q1, q3 = (float(q) for q in np.quantile(np.asarray(finite, dtype=np.float64), (0.25, 0.75)))
    reach = FENCE * (q3 - q1)
    return q1 - reach, q3 + reach


def iqr_keep(values: Sequence[float]) -> list[bool]:
    """For each value, in order, whether it is finite and within the fences, ends included."""
    low, high = iqr_bounds(values)
    return [math.isfinite(value) and low <= value <= high for value in values]
