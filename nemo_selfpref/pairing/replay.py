"""The replay buffer: pairs of the last steps, those drawn least most likely to be drawn (SAPO, 3).

First in, first out; a pair drawn `count` times so far has sampling weight 1/(count + 1). There is
one buffer for all data-parallel ranks: every rank holds the same pairs and draws the same ones,
because a draw depends on the seed and the counts alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import fmean
from typing import Any, NamedTuple

from nemo_selfpref.errors import ConfigError, DataError
from nemo_selfpref.rollout.sampling import uniform
from nemo_selfpref.types import PreferencePair

AGES = "replay age (steps)"
REUSE = "replay reuse (draws)"
MOST_REUSE = 4
"""Pairs drawn at least this often share the last bin of the reuse histogram."""


class Entry(NamedTuple):
    pair: PreferencePair
    count: int
    """How often the pair was drawn."""
    pushed_step: int


class ReplayBuffer:
    """At most `capacity` pairs, oldest first.

    To save it, store `pairs` (in this order) and `state()`, which is JSON; `restore` joins them.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ConfigError(
                f"replay capacity {capacity}: expected at least 1 pair; to train on fresh pairs "
                "only, sample from the policy instead, which uses no buffer"
            )
        self.capacity = capacity
        self._entries: list[Entry] = []
        self._age_bins: Counter[int] = Counter()
        self._evicted_reuse: Counter[int] = Counter()
        self._last_ages: tuple[int, ...] = ()
        self._last_counts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> list[Entry]:
        """(pair, count, pushed step) of every pair held, oldest first."""
        return list(self._entries)

    @property
    def pairs(self) -> list[PreferencePair]:
        return [entry.pair for entry in self._entries]

    @property
    def ages(self) -> tuple[int, ...]:
        """Steps between push and draw of each pair of the last draw, in the order drawn."""
        return self._last_ages

    def push(self, pairs: Sequence[PreferencePair], step: int) -> None:
        """Append pairs made at `step`; the oldest give way. On an error nothing is pushed.

        Raises:
            ValueError: an id that is held already or comes twice, or a step of the past.
        """
        self._check_step("push", step)
        times = Counter([entry.pair.id for entry in self._entries] + [pair.id for pair in pairs])
        twice = [pair.id for pair in pairs if times[pair.id] > 1]
        if twice:
            raise ValueError(
                f"replay push: got pair id {twice[0]!r}, which the buffer holds or this push "
                "brings twice; expected a new id, since draws are counted by id: put the step or "
                "the epoch into it"
            )
        self._entries += [Entry(pair, 0, step) for pair in pairs]
        self._evict()

    def draw(self, num: int, seed: int, step: int) -> list[PreferencePair]:
        """`num` pairs with replacement; draw i is decided by `uniform(seed, i)`.

        All draws of one call see the counts at its start. `seed` must name this draw: make it of
        the run's seed and the step, `seed_of(seed, "replay", step)`.

        Raises:
            DataError: the buffer is empty.
            ValueError: num is below 1, or the step is before the last push.
        """
        if num < 1:
            raise ValueError(f"replay draw: got num {num}, expected at least 1 pair")
        if not self._entries:
            raise DataError(
                f"replay draw of {num} pairs at step {step}: the buffer is empty, expected one "
                "pair or more; no generated pair was kept so far: see the counts of dropped pairs"
            )
        self._check_step("draw", step)
        # A running sum, not a vectorised one: its rounding is the same on every machine.
        cumulative = list(accumulate(1.0 / (entry.count + 1) for entry in self._entries))
        points = [uniform(seed, i) * cumulative[-1] for i in range(num)]
        # u < 1, but the product may round up to the total.
        last = len(cumulative) - 1
        places = [min(bisect_right(cumulative, point), last) for point in points]
        self._count(places, step)
        return [self._entries[place].pair for place in places]

    def metrics(self) -> dict[str, float]:
        """Pairs held, and of the last draw, once there is one: mean and greatest age in steps, one
        a draw, and the mean number of draws so far of the pairs drawn, that draw included."""
        metrics = {"replay/size": float(len(self))}
        if self._last_ages:
            metrics["replay/age"] = fmean(self._last_ages)
            metrics["replay/age_max"] = float(max(self._last_ages))
            metrics["replay/reuse"] = fmean(self._last_counts)
        return metrics

    def histograms(self) -> dict[str, dict[str, int]]:
        """Over the buffer's whole life: draws by age of the pair, in doubling bins, and pairs ever
        pushed, evicted ones included, by how often they were drawn."""
        oldest = max(self._age_bins, default=-1)
        reuse = self._evicted_reuse + Counter(_reuse_bin(entry) for entry in self._entries)
        labels = [str(count) for count in range(MOST_REUSE)] + [f"{MOST_REUSE}+"]
        return {
            AGES: {_age_label(bits): self._age_bins[bits] for bits in range(oldest + 1)},
            REUSE: {label: reuse[count] for count, label in enumerate(labels)},
        }

    def state(self) -> dict[str, Any]:
        """All but the pairs themselves and the statistics of the last draw, as JSON."""
        return {
            "counts": {entry.pair.id: entry.count for entry in self._entries},
            "pushed_steps": {entry.pair.id: entry.pushed_step for entry in self._entries},
            "age_bins": _dense(self._age_bins),
            "evicted_reuse": _dense(self._evicted_reuse),
        }

    @classmethod
    def restore(
        cls, capacity: int, pairs: Sequence[PreferencePair], state: Mapping[str, Any]
    ) -> ReplayBuffer:
        """The buffer of which `pairs` and `state` were saved; draws go on as if never interrupted.

        A capacity smaller than the saved one evicts the oldest pairs.

        Raises:
            DataError: pairs and state were not saved together.
        """
        counts, steps = state["counts"], state["pushed_steps"]
        ids = [pair.id for pair in pairs]
        if sorted(ids) != sorted(counts):
            strays = sorted({*ids} ^ {*counts})
            raise DataError(
                f"replay restore: got {len(ids)} pairs and counts of {len(counts)}, expected the "
                f"same ids; in one only: {strays[:3]}. Take both from the same checkpoint"
            )
        buffer = cls(capacity)
        buffer._entries = [Entry(pair, counts[pair.id], steps[pair.id]) for pair in pairs]
        buffer._age_bins = Counter(dict(enumerate(state["age_bins"])))
        buffer._evicted_reuse = Counter(dict(enumerate(state["evicted_reuse"])))
        buffer._evict()
        return buffer

    def _check_step(self, verb: str, step: int) -> None:
        if self._entries and step < self._entries[-1].pushed_step:
            raise ValueError(
                f"replay {verb}: got step {step}, expected {self._entries[-1].pushed_step} or "
                "later, the step of the last push; after a resume restore the buffer too"
            )

    def _evict(self) -> None:
        excess = max(len(self) - self.capacity, 0)
        self._evicted_reuse.update(_reuse_bin(entry) for entry in self._entries[:excess])
        del self._entries[:excess]

    def _count(self, places: Sequence[int], step: int) -> None:
        times = Counter(places)
        for place, drawn in times.items():
            entry = self._entries[place]
            self._entries[place] = entry._replace(count=entry.count + drawn)
        self._last_ages = tuple(step - self._entries[place].pushed_step for place in places)
        self._last_counts = tuple(self._entries[place].count for place in times)
        self._age_bins.update(age.bit_length() for age in self._last_ages)


def _reuse_bin(entry: Entry) -> int:
    return min(entry.count, MOST_REUSE)


def _age_label(bits: int) -> str:
    """The ages of `bits` binary digits: 0, 1, 2-3, 4-7, ..."""
    return str(bits) if bits < 2 else f"{1 << (bits - 1)}-{(1 << bits) - 1}"


def _dense(bins: Counter[int]) -> list[int]:
    return [bins[place] for place in range(max(bins, default=-1) + 1)]
