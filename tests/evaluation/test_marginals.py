"""Marginals and correlations against arithmetic done by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_selfpref.errors import DataError
from nemo_selfpref.evaluation.marginals import Correlation, correlation, marginals


def test_marginals_by_hand() -> None:
    """Two pairs, chosen answers first: (-1 + 1.5) - (-3 + 2) and (-2 + 2.5) - (-4 + 5)."""
    policy = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    reference = torch.tensor([-1.5, -2.5, -2.0, -5.0], dtype=torch.float64)
    assert marginals(policy, reference) == [1.5, -0.5]


def test_correlation_without_ties() -> None:
    """Deviations from the means 2.5 and 2.75: (-1.5 -0.5 0.5 1.5) and (-1.75 0.25 -0.75 2.25), so
    Pearson = 5.5 / sqrt(5 * 8.75). Ranks 1 2 3 4 and 1 3 2 4 differ by 0 1 1 0, so Spearman =
    1 - 6 * 2 / (4 * 15). Of 6 comparisons one is discordant, so Kendall = (5 - 1) / 6."""
    found = correlation([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 5.0])
    assert found.pairs == 4
    assert found.pearson == pytest.approx(5.5 / math.sqrt(43.75))
    assert found.spearman == pytest.approx(0.8)
    assert found.kendall == pytest.approx(2 / 3)
    assert found.mean_marginal == 2.5 and found.accuracy == 1.0


def test_correlation_with_ties() -> None:
    """Deviations (-1.25 -0.25 -0.25 1.75) and (-1 -1 1 1): Pearson = 3 / sqrt(4.75 * 4). Ranks
    1 2.5 2.5 4 and 1.5 1.5 3.5 3.5: Spearman = 3 / sqrt(4.5 * 4). Of 6 comparisons 3 are
    concordant, 1 is tied in the marginals and 2 in the scores: tau-b = 3 / sqrt(5 * 4), where
    tau-a would be 3 / 6. A marginal of 0 does not count as accurate."""
    found = correlation([-1.0, 0.0, 0.0, 2.0], [1.0, 1.0, 3.0, 3.0])
    assert found == Correlation(
        pairs=4,
        pearson=pytest.approx(3 / math.sqrt(19)),
        spearman=pytest.approx(3 / math.sqrt(18)),
        kendall=pytest.approx(3 / math.sqrt(20)),
        mean_marginal=0.25,
        accuracy=0.25,
    )


def test_ranks_see_only_the_order() -> None:
    """exp keeps the order: rank correlations stay exactly -1, Pearson's does not."""
    found = correlation([math.exp(x) for x in (5, 4, 2, 1)], [1.0, 2.0, 3.0, 4.0])
    assert found.spearman == pytest.approx(-1.0) and found.kendall == pytest.approx(-1.0)
    assert -1.0 < found.pearson < -0.8


@pytest.mark.parametrize(
    ("values", "differences", "message"),
    [
        ([], [], "too few pairs for a correlation; got 0; expected at least 3"),
        ([1.0, 2.0], [1.0, 2.0], "too few pairs for a correlation; got 2; expected at least 3"),
        ([1.0, 2.0, 3.0], [0.5] * 3, "score differences do not vary; got 0.5 for all 3 pairs"),
        ([0.0] * 3, [1.0, 2.0, 3.0], "marginals do not vary; got 0 for all 3 pairs"),
        ([math.nan, 1.0, 2.0], [1.0, 2.0, 3.0], "got 1 such of 3"),
        ([math.inf, -math.inf, 2.0], [1.0, 2.0, 3.0], "got 2 such of 3"),
    ],
)
def test_refusals(values: list[float], differences: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        correlation(values, differences)
