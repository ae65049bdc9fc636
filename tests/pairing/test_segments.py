from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_selfpref.pairing.segments import Segment, plan_segment, splice

EOS = 2
Y = (11, 12, 13, 14, 15, 16, 17, 18, 19, EOS)
MIDDLE = Segment(start=3, length=4)
LAST_DRAW = 1 - 2**-53
"""The largest value `uniform` returns."""


def plan(n: int, prompt: int = 10, draw: float = 0.0) -> Segment:
    """With segments of 4 tokens, 40 tokens in all, 20 of them for the prompt."""
    return plan_segment(n, prompt, 4, 40, 20, draw)


def starts(n: int, prompt: int = 10) -> list[int]:
    """The start at each of 1,000 evenly spaced draws, the ends of [0, 1) included."""
    draws = [i / 1000 for i in range(1000)] + [LAST_DRAW]
    return [plan(n, prompt, draw).start for draw in draws]


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ((91, 92, 93, 94), (11, 12, 13, 91, 92, 93, 94, 18, 19, EOS)),
        ((91, 92, 93, 94, 95), (11, 12, 13, 91, 92, 93, 94, 18, 19, EOS)),
        ((91, EOS, 93, 94), (11, 12, 13, 91, EOS)),
    ],
    ids=["as long as B", "cut to B", "stops inside B"],
)
def test_splice_of_the_literal_vectors(
    generated: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert splice(Y, MIDDLE, generated, {EOS}) == expected


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        ((EOS,), (11, 12, 13, EOS)),
        ((91, 92, 93, EOS), (11, 12, 13, 91, 92, 93, EOS)),
        ((91, 92, 93, 94, EOS), (11, 12, 13, 91, 92, 93, 94, 18, 19, EOS)),
        ((91, 7, EOS), (11, 12, 13, 91, 7)),
        ((91, 92), (11, 12, 13, 91, 92, 18, 19, EOS)),
        ((), (11, 12, 13, 18, 19, EOS)),
    ],
    ids=[
        "stops at once",
        "stops at its last place",
        "a stop behind the cut does not count",
        "the first of two stop tokens",
        "shorter than B without a stop",
        "nothing generated",
    ],
)
def test_splice_where_it_stops(generated: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert splice(Y, MIDDLE, generated, (EOS, 7)) == expected


def test_a_whole_answer_cut_short_has_no_end_token() -> None:
    whole = plan(4)
    assert whole == Segment(0, 4)
    assert splice((11, 12, 13, EOS), whole, (91, 92, 93, 94, 95, EOS), {EOS}) == (91, 92, 93, 94)
    assert splice((11, 12, 13, EOS), whole, (91, EOS), {EOS}) == (91, EOS)


@pytest.mark.parametrize(
    ("n", "expected"),
    [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 4), (6, 4), (7, 4)],
)
def test_a_short_answer_starts_at_zero(n: int, expected: int) -> None:
    # n - 3 - g > 0 needs n > 7; up to n = g = 4 the answer is regenerated whole.
    assert plan(n, draw=LAST_DRAW) == Segment(0, expected)


@pytest.mark.parametrize(
    ("n", "prompt", "top"),
    [
        (8, 10, 1),  # min(8 - 3 - 4, 40 - 10 - 4) = min(1, 26)
        (12, 10, 5),  # min(12 - 3 - 4, 26)
        (33, 10, 26),  # min(33 - 3 - 4, 26), both
        (60, 10, 26),  # min(53, 26): an answer longer than there is room for
        (60, 20, 16),  # min(53, 40 - 20 - 4), the prompt at its limit
        (60, 500, 16),  # min(53, 40 - min(500, 20) - 4), the prompt beyond it
    ],
)
def test_starts_cover_the_range_evenly(n: int, prompt: int, top: int) -> None:
    found = starts(n, prompt)
    assert set(found) == set(range(top + 1))
    # Each start has a stretch of 1/(top + 1): 1,001 draws give it that many, one more or less.
    assert all(abs(found.count(start) - 1000 / (top + 1)) <= 2 for start in range(top + 1))


def test_the_draw_picks_by_floor() -> None:
    # Six starts, 0 to 5: floor(6 draw).
    draws = (0.0, 0.166, 0.167, 0.5, 0.8333, 0.8334, LAST_DRAW)
    assert [plan(12, draw=draw).start for draw in draws] == [0, 0, 1, 3, 4, 5, 5]


def test_no_room_starts_at_zero() -> None:
    # 12 - 3 - 4 = 5, but max_length - prompt - g = 20 - 18 - 4 = -2.
    assert plan_segment(12, 18, 4, 20, 18, LAST_DRAW) == Segment(0, 4)


def test_the_papers_sizes() -> None:
    # n = 600, g = 256: min(600 - 3 - 256, 2048 - 1000 - 256) = min(341, 792).
    assert plan_segment(600, 1000, 256, 2048, 1792, LAST_DRAW) == Segment(341, 256)
    # A prompt at the limit leaves 2048 - 1792 - 256 = 0.
    assert plan_segment(600, 1792, 256, 2048, 1792, LAST_DRAW) == Segment(0, 256)


@given(
    st.integers(0, 4000),
    st.integers(0, 4000),
    st.integers(1, 600),
    st.floats(min_value=0, max_value=LAST_DRAW),
)
def test_a_drawn_start_leaves_a_tail_and_fits(
    n: int, prompt: int, segment_len: int, draw: float
) -> None:
    segment = plan_segment(n, prompt, segment_len, 2048, 1792, draw)
    assert segment.length == min(segment_len, n)
    if segment.start > 0:
        assert segment.start + segment.length <= n - 3
        assert min(prompt, 1792) + segment.start + segment.length <= 2048
