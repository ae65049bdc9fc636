from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter

import pytest

from nemo_selfpref.errors import ConfigError, DataError
from nemo_selfpref.pairing.replay import ReplayBuffer
from nemo_selfpref.rollout.sampling import seed_of, uniform
from nemo_selfpref.types import PreferencePair

COUNTS = [0, 0, 1, 3, 9]
# Weights 1, 1, 1/2, 1/4, 1/10 sum to 2.85 = 57/20: 20/57, 20/57, 10/57, 5/57, 2/57.
PROBS = [
    0.3508771929824561,
    0.3508771929824561,
    0.17543859649122806,
    0.08771929824561403,
    0.03508771929824561,
]


def pair(name: object) -> PreferencePair:
    return PreferencePair(str(name), (1,), (2,), (3,))


def buffer_with(counts: list[int], capacity: int = 100) -> ReplayBuffer:
    """Pairs "0", "1", ... pushed at step 0 and drawn so often."""
    counted = {str(place): count for place, count in enumerate(counts)}
    state = {"counts": counted, "pushed_steps": dict.fromkeys(counted, 0)}
    pairs = [pair(name) for name in counted]
    return ReplayBuffer.restore(capacity, pairs, state | {"age_bins": [], "evicted_reuse": []})


def ids(pairs: list[PreferencePair]) -> list[str]:
    return [p.id for p in pairs]


def counts_of(buffer: ReplayBuffer) -> list[int]:
    return [entry.count for entry in buffer.entries]


def chi_square(observed: Counter[str]) -> float:
    expected = [observed.total() * p for p in PROBS]
    return sum((observed[str(i)] - e) ** 2 / e for i, e in enumerate(expected))


def test_draws_follow_the_literal_weights() -> None:
    # The counts are put back before each draw. Four degrees of freedom: 18.5 is passed once in a
    # thousand; the draws are fixed.
    seen: Counter[str] = Counter()
    for i in range(20_000):
        seen.update(ids(buffer_with(COUNTS).draw(1, seed_of("replay", i), step=0)))
    assert chi_square(seen) < 18.5


def test_one_call_keeps_the_weights_of_its_start() -> None:
    buffer = buffer_with(COUNTS)
    seen = Counter(ids(buffer.draw(20_000, seed=7, step=0)))
    assert chi_square(seen) < 18.5
    assert counts_of(buffer) == [count + seen[str(i)] for i, count in enumerate(COUNTS)]


def test_each_draw_is_the_inverse_cdf_at_its_uniform() -> None:
    ends = [sum(PROBS[: i + 1]) for i in range(4)]
    expected = [str(bisect_right(ends, uniform(7, i))) for i in range(1000)]
    assert ids(buffer_with(COUNTS).draw(1000, seed=7, step=0)) == expected


def test_a_uniform_at_the_very_end_draws_the_last_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    # Here the product with the total rounds up to the total.
    monkeypatch.setattr("nemo_selfpref.pairing.replay.uniform", lambda seed, i: 1.0)
    assert ids(buffer_with(COUNTS).draw(1, seed=0, step=0)) == ["4"]


def test_the_next_call_sees_the_new_counts() -> None:
    # One pair drawn 9,999 times has weight 1/10000, the fresh one 1.
    buffer = buffer_with([9_999])
    buffer.push([pair("fresh")], step=0)
    assert ids(buffer.draw(1, seed_of(0), step=0)) == ["fresh"]
    assert counts_of(buffer) == [9_999, 1]
    # Now 1/10000 against 1/2.
    assert ids(buffer.draw(3, seed_of(1), step=1)) == ["fresh"] * 3
    assert counts_of(buffer) == [9_999, 4]


def test_the_same_seed_draws_the_same_on_every_rank() -> None:
    first, second = buffer_with(COUNTS), buffer_with(COUNTS)
    for step in range(5):
        seed = seed_of(1234, "replay", step)
        assert first.draw(8, seed, step) == second.draw(8, seed, step)
    assert first.entries == second.entries
    assert first.draw(8, 1, 9) != second.draw(8, 2, 9)


def test_the_oldest_give_way() -> None:
    buffer = ReplayBuffer(3)
    buffer.push([pair(0), pair(1)], step=0)
    buffer.push([pair(2), pair(3)], step=1)
    assert ids(buffer.pairs) == ["1", "2", "3"]
    assert [entry.pushed_step for entry in buffer.entries] == [0, 1, 1]
    buffer.push([pair(i) for i in range(4, 9)], step=2)
    assert ids(buffer.pairs) == ["6", "7", "8"]
    assert len(buffer) == 3
    # Nine were pushed and none drawn, be it held or evicted.
    assert buffer.histograms()["replay reuse (draws)"]["0"] == 9


def test_an_evicted_id_may_come_back_with_a_fresh_count() -> None:
    buffer = buffer_with([5, 0], capacity=2)
    buffer.push([pair("a")], step=1)
    buffer.push([pair("0")], step=1)
    assert ids(buffer.pairs) == ["a", "0"]
    assert counts_of(buffer) == [0, 0]


@pytest.mark.parametrize("pushed", [["a", "0"], ["b", "a", "b"]], ids=["held", "in one push"])
def test_an_id_twice_is_an_error_and_pushes_nothing(pushed: list[str]) -> None:
    buffer = buffer_with([2])
    with pytest.raises(ValueError, match=f"got pair id '{pushed[-1]}'.*expected a new id"):
        buffer.push([pair(name) for name in pushed], step=0)
    assert ids(buffer.pairs) == ["0"]
    buffer.push([pair("a")], step=0)


def test_ages_are_steps_since_the_push() -> None:
    buffer = ReplayBuffer(2)
    buffer.push([pair("old")], step=3)
    buffer.push([pair("new")], step=7)
    drawn = buffer.draw(50, seed=0, step=8)
    assert buffer.ages == tuple({"old": 5, "new": 1}[p.id] for p in drawn)
    assert {*buffer.ages} == {5, 1}


def test_metrics_of_the_last_draw() -> None:
    buffer = ReplayBuffer(4)
    assert buffer.metrics() == {"replay/size": 0.0}
    buffer.push([pair("old")], step=0)
    buffer.draw(3, seed=0, step=2)
    buffer.push([pair("new")], step=4)
    # Weights 1/4 and 1 against uniforms 0.113, 0.700, 0.613, 0.073, 0.216, 0.636: below 0.2 is old.
    drawn = ids(buffer.draw(6, seed=3, step=6))
    assert drawn == ["old", "new", "new", "old", "new", "new"]
    # Ages 6, 2, 2, 6, 2, 2. "old" was drawn 3 + 2 times, "new" 4.
    assert buffer.metrics() == {
        "replay/size": 2.0,
        "replay/age": pytest.approx(20 / 6),
        "replay/age_max": 6.0,
        "replay/reuse": 4.5,
    }


def test_ages_are_counted_in_doubling_bins() -> None:
    buffer = ReplayBuffer(1)
    assert buffer.histograms()["replay age (steps)"] == {}
    buffer.push([pair(0)], step=0)
    for step in (0, 1, 2, 3, 3, 4, 7, 8, 8, 20):
        buffer.draw(1, seed=step, step=step)
    ages = {"0": 1, "1": 1, "2-3": 3, "4-7": 2, "8-15": 2, "16-31": 1}
    assert buffer.histograms()["replay age (steps)"] == ages
    buffer.draw(5, seed=0, step=200)
    # 200 lies in 128-255; the bins between stay, empty.
    later = {**ages, "32-63": 0, "64-127": 0, "128-255": 5}
    assert buffer.histograms()["replay age (steps)"] == later
    assert list(buffer.histograms()["replay age (steps)"]) == list(later)


def test_reuse_counts_every_pair_ever_pushed() -> None:
    buffer = ReplayBuffer(1)
    for name, times in enumerate((0, 1, 1, 2, 4, 5, 11, 3)):
        buffer.push([pair(name)], step=name)
        if times:
            buffer.draw(times, seed=0, step=name)
    # The last, drawn three times, is still held.
    reuse = {"0": 1, "1": 2, "2": 1, "3": 1, "4+": 3}
    assert buffer.histograms()["replay reuse (draws)"] == reuse
    assert list(reuse) == list(buffer.histograms()["replay reuse (draws)"])


def test_a_restored_buffer_goes_on_as_if_never_interrupted() -> None:
    buffer = ReplayBuffer(6)
    for step in range(5):
        buffer.push([pair(f"{step}-{i}") for i in range(2)], step)
        buffer.draw(4, seed_of("a", step), step)
    stored = json.loads(json.dumps(buffer.state(), sort_keys=True))
    restored = ReplayBuffer.restore(6, buffer.pairs, stored)
    assert restored.entries == buffer.entries
    assert sum(counts_of(restored)) > 0
    assert restored.histograms() == buffer.histograms()
    for step in range(5, 9):
        seed = seed_of("a", step)
        assert restored.draw(4, seed, step) == buffer.draw(4, seed, step)
        assert restored.metrics() == buffer.metrics()
        for each in (buffer, restored):
            each.push([pair(f"{step}-{i}") for i in range(2)], step)
    assert restored.state() == buffer.state()
    assert restored.histograms() == buffer.histograms()


def test_the_state_is_the_counts_by_id() -> None:
    buffer = ReplayBuffer(1)
    buffer.push([pair("a"), pair("b")], step=3)
    buffer.draw(2, seed=0, step=5)
    # Both draws are at age 2, of two binary digits; "a" was evicted undrawn.
    assert buffer.state() == {
        "counts": {"b": 2},
        "pushed_steps": {"b": 3},
        "age_bins": [0, 0, 2],
        "evicted_reuse": [1],
    }


def test_a_smaller_capacity_evicts_on_restore() -> None:
    buffer = buffer_with([7, 1, 0])
    smaller = ReplayBuffer.restore(2, buffer.pairs, buffer.state())
    assert ids(smaller.pairs) == ["1", "2"]
    assert smaller.histograms() == buffer.histograms()


def test_pairs_of_another_checkpoint_are_refused() -> None:
    buffer = buffer_with([0, 0])
    with pytest.raises(DataError, match=r"got 2 pairs and counts of 2.*\['1', 'x'\]"):
        ReplayBuffer.restore(5, [pair(0), pair("x")], buffer.state())
    with pytest.raises(DataError, match="got 3 pairs and counts of 2"):
        ReplayBuffer.restore(5, [*buffer.pairs, pair(0)], buffer.state())


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(DataError, match="draw of 4 pairs at step 9: the buffer is empty"):
        ReplayBuffer(1).draw(4, seed=0, step=9)
    with pytest.raises(ValueError, match="got num 0, expected at least 1"):
        buffer_with([0]).draw(0, seed=0, step=0)


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_buffer_holds_at_least_one(capacity: int) -> None:
    with pytest.raises(ConfigError, match=f"capacity {capacity}: expected at least 1"):
        ReplayBuffer(capacity)


def test_steps_do_not_go_back() -> None:
    buffer = ReplayBuffer(5)
    buffer.push([pair(0)], step=4)
    with pytest.raises(ValueError, match="replay draw: got step 3, expected 4 or later"):
        buffer.draw(1, seed=0, step=3)
    with pytest.raises(ValueError, match="replay push: got step 3, expected 4 or later"):
        buffer.push([pair(1)], step=3)
    assert counts_of(buffer) == [0]
