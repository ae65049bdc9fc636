"""Who stands still: what one rank concludes from the beats of the others.

Times are the watching rank's own: how long ago a beat's number last changed, plus how long that
rank itself says to have stood still then. So the clocks of hosts need not agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from nemo_selfpref.monitor.beats import Beat, process_state

WATCHERS = 3
"""So many ranks read everybody's beats; all others read those of these, so that a thousand ranks
do not open a million files."""
_SHOWN = 8


@dataclass(frozen=True)
class Seen:
    """A rank's newest beat, and when it came (watcher's clock). left: its file is gone again."""

    beat: Beat | None
    since: float
    left: bool = False


@dataclass(frozen=True)
class Stuck:
    """A rank that stands still, and what is known of it."""

    rank: int
    why: str
    still_s: float
    beat: Beat | None

    def describe(self) -> str:
        if self.beat is None:
            return f"rank {self.rank} {self.why}"
        b = self.beat
        lines = [f"rank {b.rank} (host {b.host}, pid {b.pid}) {self.why}, in phase {b.phase!r}"]
        lines += [f"    at {frame}" for frame in b.frames[:_SHOWN]]
        return "\n".join(lines)


@dataclass(frozen=True)
class Hang:
    """The ranks that keep a run from going on, and those that wait for them."""

    stuck: tuple[Stuck, ...]
    waiting: tuple[Beat, ...]
    limit_s: float

    def message(self) -> str:
        who = "a rank" if len(self.stuck) == 1 else f"{len(self.stuck)} ranks"
        text = [f"the run hangs: {who} stood still for over {self.limit_s:g} s"]
        text += [s.describe() for s in self.stuck[:_SHOWN]]
        if len(self.stuck) > _SHOWN:
            text.append(f"and {len(self.stuck) - _SHOWN} more")
        if self.waiting:
            named = ", ".join(f"{b.rank} in {b.phase!r}" for b in self.waiting[:_SHOWN])
            more = ", ..." if len(self.waiting) > _SHOWN else ""
            text.append(f"ranks waiting meanwhile: {named}{more}")
        return "\n  ".join(text)

    def facts(self) -> dict[str, Any]:
        """For hang.json."""
        return {
            "limit_s": self.limit_s,
            "stuck": [asdict(s) for s in self.stuck],
            "waiting": [asdict(b) for b in self.waiting],
        }


class Watch:
    """What one rank knows of the others.

    Args:
        slow_after_s: a rank standing still for so long is named, and the run goes on.
        hang_timeout_s: standing still for so long is a hang.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        host: str,
        slow_after_s: float,
        hang_timeout_s: float,
        now: float,
    ) -> None:
        self.rank, self.host = rank, host
        self.slow_after_s, self.hang_timeout_s = slow_after_s, hang_timeout_s
        self.whole = rank < WATCHERS
        ranks = range(world_size) if self.whole else (*range(WATCHERS), rank)
        self.seen = {r: Seen(None, now) for r in ranks}
        self._slow: dict[int, float] = {}
        """Ranks named as slow, and since when they stand still."""

    def see(self, rank: int, beat: Beat | None, now: float) -> None:
        """What a rank's file holds now."""
        old = self.seen[rank]
        if beat is None:
            self.seen[rank] = replace(old, left=old.beat is not None)
        elif old.beat is None or old.left or beat.number != old.beat.number:
            self.seen[rank] = Seen(beat, now)

    def restart(self, now: float) -> None:
        """Measure anew: nothing could be seen up to now."""
        self.seen = {rank: replace(seen, since=now) for rank, seen in self.seen.items()}

    def beating(self, now: float) -> list[int]:
        """Ranks that were heard of not long ago."""
        return [r for r in self._present() if self._silent_s(r, now) < self.slow_after_s]

    def find_hang(self, now: float) -> Hang | None:
        """The hang that is certain now, if there is one."""
        limit = self.hang_timeout_s
        if self._silent_s(self.rank, now) >= limit:
            return self._hang([self.rank], limit, now)  # its file system hangs: nothing else known
        if not self._sees(now):
            return None
        if silent := [r for r in self._present() if self._silent_s(r, now) >= limit]:
            return self._hang(silent, limit, now)
        if not self.whole:
            return None
        limit = max([limit, *self._claimed()])
        if min(self._still_s(r, now) for r in self._present()) >= limit:
            return self._hang(self._behind(now), limit, now)
        return None

    def news(self, now: float) -> Iterator[str]:
        """Ranks that became slow, or go on, since the last call; each is told of by one rank."""
        if not self._sees(now):
            return
        for rank in [r for r in self._slow if self._moves(r, now)]:
            stood = now - self._slow.pop(rank)
            if self._tells_of(rank, now) and not self.seen[rank].left:
                yield f"rank {rank}{self._who(rank)} goes on after standing still for {stood:.1f} s"
        for rank in self._slow_now(now):
            if rank not in self._slow:
                self._slow[rank] = now - self._still_s(rank, now)
                if self._tells_of(rank, now):
                    yield (
                        f"slow: {self._stuck(rank, now).describe()}\n  going on; after "
                        f"{self.hang_timeout_s:g} s the run ends"
                    )

    def _slow_now(self, now: float) -> list[int]:
        silent = [r for r in self._present() if self._silent_s(r, now) >= self.slow_after_s]
        if silent or not self.whole or self._claimed():
            return silent
        nobody_moves = min(self._still_s(r, now) for r in self._present()) >= self.slow_after_s
        return self._behind(now) if nobody_moves else []

    def _behind(self, now: float) -> list[int]:
        """Of ranks that all stand still, those that the others wait for.

        Ranks that left, else those not waiting in a collective, of these the ones that came to the
        fewest marks, of these the ones where fewer than half stand at the same place.
        """
        if left := [r for r, seen in self.seen.items() if seen.left]:
            return left
        if unheard := [r for r, seen in self.seen.items() if seen.beat is None]:
            return unheard
        beats = {r: seen.beat for r, seen in self.seen.items() if seen.beat is not None}
        beats = {r: b for r, b in beats.items() if not b.waiting} or beats
        fewest = min(b.marks for b in beats.values())
        beats = {r: b for r, b in beats.items() if b.marks == fewest}
        (place, count), *_ = Counter(b.frames for b in beats.values()).most_common(1)
        if len(beats) > 2 and len(beats) > count > len(beats) / 2:
            beats = {r: b for r, b in beats.items() if b.frames != place}
        return sorted(beats)

    def _hang(self, ranks: list[int], limit: float, now: float) -> Hang:
        others = [s.beat for r, s in self.seen.items() if r not in ranks and not s.left]
        stuck = tuple(self._stuck(r, now) for r in ranks)
        return Hang(stuck, tuple(b for b in others if b is not None), limit)

    def _stuck(self, rank: int, now: float) -> Stuck:
        seen, still = self.seen[rank], self._still_s(rank, now)
        why = f"has made no progress for {still:.1f} s"
        if seen.left:
            why = "has ended its run while the others go on"
        elif seen.beat is None:
            why = f"has not been heard of at all, for {still:.1f} s"
        elif rank == self.rank and self._silent_s(rank, now) >= self.slow_after_s:
            why = f"could not write or read heartbeats for {still:.1f} s: its file system hangs"
        elif self._silent_s(rank, now) >= self.slow_after_s:
            state = process_state(seen.beat, self.host)
            why = f"has not been heard of for {still:.1f} s" + (f": {state}" if state else "")
        return Stuck(rank, why, still, seen.beat)

    def _sees(self, now: float) -> bool:
        """Whether what is known of the others is new."""
        return self._silent_s(self.rank, now) < self.slow_after_s

    def _present(self) -> list[int]:
        return [rank for rank, seen in self.seen.items() if not seen.left]

    def _silent_s(self, rank: int, now: float) -> float:
        return now - self.seen[rank].since

    def _still_s(self, rank: int, now: float) -> float:
        beat = self.seen[rank].beat
        return self._silent_s(rank, now) + (beat.still_s if beat is not None else 0.0)

    def _moves(self, rank: int, now: float) -> bool:
        return self.seen[rank].left or self._still_s(rank, now) < self.slow_after_s

    def _claimed(self) -> list[float]:
        beats = (self.seen[rank].beat for rank in self._present())
        return [b.timeout_s for b in beats if b is not None and b.timeout_s is not None]

    def _tells_of(self, rank: int, now: float) -> bool:
        """Whether it is this rank's to speak of another: the lowest that beats, but never one of
        itself where there are others, since it did not see itself stand still."""
        speakers = [r for r in self.beating(now) if r != rank] or [rank]
        return self.rank == min(speakers)

    def _who(self, rank: int) -> str:
        beat = self.seen[rank].beat
        return f" (host {beat.host}, pid {beat.pid})" if beat is not None else ""
