from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_selfpref.errors import DataError
from nemo_selfpref.pairing.filters import MIN_VALUES, iqr_bounds, iqr_keep, perplexity

PPL = [3.0, 3.2, 3.5, 3.9, 4.1, 4.4, 4.8, 5.0, 5.5, 6.1, 9.9, 30.0]
ppls = st.floats(min_value=0.0, max_value=1e300)
any_floats = st.floats(allow_nan=True, allow_infinity=True, min_value=None)


def test_bounds_of_the_literal_vector() -> None:
    low, high = iqr_bounds(PPL)
    assert low == pytest.approx(1.025, abs=1e-12)
    assert high == pytest.approx(8.425, abs=1e-12)


def test_keeps_the_first_ten_of_the_literal_vector() -> None:
    assert iqr_keep(PPL) == [True] * 10 + [False] * 2


def test_bounds_are_inclusive() -> None:
    # Quartiles 4 and 6 (positions 2 and 6 of nine sorted values), so the fences are 1 and 9.
    values = [1.0, 4.0, 4.0, 5.0, 5.0, 5.0, 6.0, 6.0, 9.0]
    assert iqr_bounds(values) == (1.0, 9.0)
    assert all(iqr_keep(values))
    outside = [math.nextafter(1.0, 0), *values[1:-1], math.nextafter(9.0, 10)]
    assert iqr_keep(outside) == [False] + [True] * 7 + [False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_is_dropped_and_does_not_move_the_bounds(bad: float) -> None:
    assert iqr_bounds([bad, *PPL, bad]) == iqr_bounds(PPL)
    assert iqr_keep([bad, *PPL]) == [False, *iqr_keep(PPL)]
    assert iqr_keep([bad]) == [False]


def test_no_values() -> None:
    assert iqr_keep([]) == []
    assert iqr_bounds([]) == (-math.inf, math.inf)


def test_fewer_than_four_are_all_kept_and_four_can_lose_one() -> None:
    assert iqr_keep([1.0, 1.0, 1e9]) == [True] * 3
    assert iqr_keep([1.0, math.nan, 1.0, 1e9]) == [True, False, True, True]
    assert iqr_keep([1.0, 1.0, 1.0, 1e9]) == [True, True, True, False]


@given(st.lists(st.integers(min_value=1, max_value=10**6), min_size=1, max_size=MIN_VALUES - 1))
def test_the_fences_of_fewer_than_four_would_exclude_nothing(values: list[int]) -> None:
    ordered, last = sorted(values), len(values) - 1

    def quartile(share: float) -> float:
        below = int(share * last)
        above = ordered[min(below + 1, last)]
        return ordered[below] + (share * last - below) * (above - ordered[below])

    reach = 1.5 * (quartile(0.75) - quartile(0.25))
    assert quartile(0.25) - reach <= ordered[0] and ordered[-1] <= quartile(0.75) + reach


@given(st.data(), st.lists(st.one_of(ppls, any_floats), max_size=30))
def test_order_does_not_matter(data: st.DataObject, values: list[float]) -> None:
    values = [abs(value) for value in values]
    places = data.draw(st.permutations(range(len(values))))
    shuffled = [values[place] for place in places]
    kept = iqr_keep(values)
    assert iqr_keep(shuffled) == [kept[place] for place in places]


@given(st.lists(ppls, max_size=30))
def test_kept_means_within_the_bounds_and_half_always_stays(values: list[float]) -> None:
    low, high = iqr_bounds(values)
    kept = iqr_keep(values)
    assert kept == [low <= value <= high for value in values]
    assert 2 * sum(kept) >= len(values)


@given(ppls, st.integers(min_value=1, max_value=20))
def test_equal_values_are_all_kept(value: float, count: int) -> None:
    assert iqr_keep([value] * count) == [True] * count


def test_perplexity_of_the_literal_vector() -> None:
    assert perplexity(sum([-0.5, -1.25, -2.0, -0.25]), 4) == 2.718281828459045


def test_perplexity_ends() -> None:
    assert perplexity(0.0, 7) == 1.0
    assert perplexity(-1e6, 1) == math.inf
    assert perplexity(-math.inf, 3) == math.inf
    assert math.isnan(perplexity(math.nan, 3))


@pytest.mark.parametrize("count", [0, -1])
def test_perplexity_without_tokens_is_an_error(count: int) -> None:
    with pytest.raises(DataError, match=f"{count} tokens"):
        perplexity(-1.0, count)
