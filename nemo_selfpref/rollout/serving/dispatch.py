"""One call shared out over the engines of a fleet: nothing is lost, nothing comes twice."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from nemo_selfpref.errors import RolloutError, RolloutRefused
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.members import Member
from nemo_selfpref.rollout.serving.roster import Roster
from nemo_selfpref.rollout.serving.wire import Stamp
from nemo_selfpref.rollout.serving.work import Work, share_out, tokens

_POLL_S = 0.1
_MOST_ISSUES = 2
"""Once, and once again where the first engine failed."""


@dataclass(eq=False)
class _Share:
    """What one engine was asked for."""

    member: Member
    places: list[int]
    load: int
    epoch: int = 0
    open: set[int] = field(default_factory=set)
    dropped: bool = False

    def __post_init__(self) -> None:
        self.epoch, self.open = self.member.epoch, set(self.places)


_Event = tuple[_Share, "tuple[int, Any] | None", Exception | None]
"""An answer and its place; or an end, good or with an error."""


class Dispatch:
    """Answers one call. `run` gives out every place once, from the thread that called it.

    What an engine leaves unanswered, because it died, went silent or failed, is asked of others
    once more; answers of an engine that was taken out meanwhile are not taken. What one refuses as
    the caller's mistake is asked of nobody else.
    """

    def __init__(self, work: Work, roster: Roster, stamp: Stamp, until: Until) -> None:
        self.work, self.roster, self.stamp, self.until = work, roster, stamp, until
        self._open = set(range(work.count))
        self._unsent = list(range(work.count))
        self._issues = dict.fromkeys(self._open, 0)
        self._failed: dict[int, list[str]] = defaultdict(list)
        self._failed_by: set[tuple[str, int]] = set()
        self._shares: list[_Share] = []
        # Two answers a place at most, and an end for each share: no more than the call itself.
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()

    def run(self) -> None:
        """See Backend.generate for what it raises."""
        try:
            while self._open:
                self.until.check("the engines' answers")
                self._drop_broken()
                self._send()
                with contextlib.suppress(queue.Empty):
                    self._take(*self._events.get(timeout=_POLL_S))
        finally:
            for share in list(self._shares):
                self._end(share)

    def _send(self) -> None:
        if not self._unsent:
            return
        found = self.roster.usable(self.work.weight_set, self.stamp)
        if not found:
            return
        members = [m for m in found if (m.name, m.epoch) not in self._failed_by] or found
        parts = share_out(self.work, self._unsent, [m.load for m in members])
        self._unsent = []
        for member, places in zip(members, parts, strict=True):
            if places:
                self._start(member, places)

    def _start(self, member: Member, places: list[int]) -> None:
        share = _Share(member, places, tokens(self.work, places))
        with self.roster.changed:
            member.load += share.load
        for place in places:
            self._issues[place] += 1
        self._shares.append(share)
        threading.Thread(
            target=self._ask, args=(share,), name=f"ask {member.name}", daemon=True
        ).start()

    def _ask(self, share: _Share) -> None:
        until = Until(self.until.deadline, lambda: share.dropped or self.until.cancelled())
        try:
            client = share.member.client
            for answer in self.work.answers(client, share.places, self.stamp, until):
                if share.dropped:
                    return
                self._events.put((share, answer, None))
            self._events.put((share, None, None))
        except Exception as error:
            self._events.put((share, None, error))

    def _take(self, share: _Share, answer: tuple[int, Any] | None, error: Exception | None) -> None:
        if share.dropped:
            return
        if answer is not None:
            place, record = answer
            share.open.discard(place)
            if place in self._open:
                self._open.discard(place)
                self.work.give(place, record)
        elif error is None:
            self._end(share)
        else:
            self.until.check("the engines' answers")
            if isinstance(error, RolloutRefused):
                raise error
            self._lose(share, str(error))

    def _drop_broken(self) -> None:
        for share in list(self._shares):
            if share.epoch != share.member.epoch:
                self._lose(share, share.member.reason or "it was taken out")

    def _lose(self, share: _Share, reason: str) -> None:
        """Ask others for what a share leaves open."""
        self._end(share)
        self.roster.fault(share.member, share.epoch, reason)
        self._failed_by.add((share.member.name, share.epoch))
        lost = [place for place in share.places if place in self._open]
        for place in lost:
            self._failed[place].append(f"{share.member.name}: {reason}")
        hopeless = [place for place in lost if self._issues[place] >= _MOST_ISSUES]
        if hopeless:
            raise RolloutError(
                f"{len(hopeless)} of {self.work.count} answers were lost twice; "
                f"{' and then '.join(self._failed[hopeless[0]])}"
            )
        if lost:
            self.roster.note(f"{len(lost)} answers of {share.member.name} are asked for again")
        self._unsent += lost

    def _end(self, share: _Share) -> None:
        share.dropped = True
        self._shares.remove(share)
        with self.roster.changed:
            share.member.load -= share.load
