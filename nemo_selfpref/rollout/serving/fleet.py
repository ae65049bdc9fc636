"""Several engines as one: a Backend that goes on when some of them fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from typing import Any

from nemo_selfpref.errors import RolloutError
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.dispatch import Dispatch
from nemo_selfpref.rollout.serving.keeper import Keeper, check_same
from nemo_selfpref.rollout.serving.limits import check_question, tightest
from nemo_selfpref.rollout.serving.members import LocalMember, Member, RemoteMember, State
from nemo_selfpref.rollout.serving.roster import FleetSettings, Roster
from nemo_selfpref.rollout.serving.updates import Updates, in_thread
from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    GenerateCall,
    Health,
    Info,
    LabelRecord,
    LabelsCall,
    Stamp,
    UpdateReport,
    WeightsCall,
)
from nemo_selfpref.rollout.serving.work import GenerateWork, LabelsWork
from nemo_selfpref.types import WeightSet

__all__ = ["Fleet", "FleetSettings", "LocalMember", "Member", "RemoteMember", "State"]

_CLOSE_S = 60.0
_JOIN_S = 5.0
_FIRST_LOOK_S = 10.0


class Fleet:
    """Backend over its members. Calls go to those alone that hold exactly the weights wanted.

    Args:
        note: told of every change of a member's state, a line each.
    """

    def __init__(
        self,
        members: Sequence[Member],
        settings: FleetSettings,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.settings = settings
        self._roster = Roster(members, settings, note)
        self._infos: dict[str, Info] = {}
        self._keepers: list[Keeper] = []
        self._updates = Updates(self._roster)
        self._started = False

    @property
    def members(self) -> tuple[Member, ...]:
        return self._roster.members

    def start(self, until: Until) -> None:
        """Start all members at once, and then watch over them.

        Raises:
            RolloutError: one did not start, or is another kind of engine; none is left running.
            ConfigError: a set of weights has fewer engines than min_engines.
        """
        until = _sooner(until, self.settings.start_timeout_s, self._roster.closing.is_set)
        try:
            self._start_members(until)
            check_same(self._infos)
            self._roster.open()
        except BaseException:
            self.close()
            raise
        self._keepers = [Keeper(m, self._roster, self._infos) for m in self.members]
        self._started = True

    def _start_members(self, until: Until) -> None:
        def begin(member: Member) -> Info:
            info = member.start(until)
            member.look(_FIRST_LOOK_S)
            return info

        starts = {m: in_thread(lambda m=m: begin(m), f"start {m.name}") for m in self.members}
        for member, future in starts.items():
            try:
                self._infos[member.name] = future.result()
            except RolloutError as error:
                raise type(error)(f"{member.name} did not start: {error}") from error

    def close(self) -> None:
        """End what was started here; servers that somebody else runs go on."""
        self._roster.closing.set()
        for member in self.members:
            member.poke.set()
        ends = [in_thread(m.close, f"close {m.name}") for m in self.members]
        for end in wait(ends, _CLOSE_S).done:
            end.result()
        for keeper in self._keepers:
            keeper.thread.join(timeout=_JOIN_S)

    # -- what it is ---------------------------------------------------------------------------

    def info(self) -> Info:
        first = next(iter(self._infos.values()))
        memory: dict[str, int] = {}
        for info in self._infos.values():
            for what, size in info.memory.items():
                memory[what] = memory.get(what, 0) + size
        names = [name.value for name in self._roster.weight_sets]
        return first.model_copy(
            update={"memory": memory, "weight_sets": names, **tightest(list(self._infos.values()))}
        )

    def health(self) -> Health:
        roster = self._roster
        with roster.changed:
            short = [] if roster.asleep else [s for s in roster.weight_sets if not self._served(s)]
            status = "sleeping" if roster.asleep else "serving"
            if short:  # while engines of ours are being started again, it only takes a while
                back = all(self._can_serve(name) for name in short)
                status = "starting" if back else "quarantined"
            known = {s.value: stamp for s in roster.weight_sets if (stamp := roster.latest.get(s))}
            seen = [m.health for m in self.members if m.health and m.state is State.SERVING]
            return Health(
                status=status if self._started else "starting",
                reason="; ".join(roster.too_few(name) for name in short),
                beat_age_s=max((health.beat_age_s for health in seen), default=0.0),
                running=sum(health.running for health in seen),
                weights=known,
            )

    def _can_serve(self, name: WeightSet) -> bool:
        members = self._roster.of(name)
        there = [m for m in members if m.state is State.SERVING or self._roster.comes_back(m, name)]
        return len(there) >= self.settings.min_engines

    def _served(self, name: WeightSet) -> bool:
        members = [m for m in self._roster.of(name) if m.state is State.SERVING]
        settled = [m for m in members if self._roster.settled(m)]
        return len(settled) >= self.settings.min_engines

    def table(self) -> list[dict[str, Any]]:
        """A row a member, to be shown: what it is, how it is, and why."""
        with self._roster.changed:
            return [
                {
                    "name": m.name,
                    "url": m.url,
                    "state": m.state.value,
                    "sets": [name.value for name in m.weight_sets],
                    "weights": {name.value: str(stamp) for name, stamp in m.held.items()},
                    "restarts": m.restarts,
                    "memory": self._infos[m.name].memory if m.name in self._infos else {},
                    "reason": m.reason,
                }
                for m in self.members
            ]

    # -- questions ----------------------------------------------------------------------------

    def check(self, call: GenerateCall | LabelsCall) -> None:
        """See Backend.check. What this lets pass is within the limits of every engine: where one
        fails to answer it all the same, another is asked."""
        if not self._started:
            raise RolloutError("the fleet has not been started")
        self._roster.check_awake()
        names = [name.value for name in self._roster.weight_sets]
        if call.weight_set.value not in names:
            held = ", ".join(names)
            raise RolloutError(f"no {call.weight_set.value} weights are held; there are {held}")
        self._roster.check_stamp(call.weight_set, call.expect)
        check_question(call, self.info())

    def generate(
        self, call: GenerateCall, emit: Callable[[CompletionRecord], None], until: Until
    ) -> None:
        self.check(call)
        stamp = self._roster.pin(call.weight_set, call.expect, until)
        Dispatch(GenerateWork(call, emit), self._roster, stamp, until).run()

    def label_scores(
        self, call: LabelsCall, emit: Callable[[LabelRecord], None], until: Until
    ) -> None:
        self.check(call)
        stamp = self._roster.pin(call.weight_set, call.expect, until)
        Dispatch(LabelsWork(call, emit), self._roster, stamp, until).run()

    # -- weights ------------------------------------------------------------------------------

    def live(self, name: WeightSet, until: Until) -> list[Member]:
        """See Updates.live."""
        return self._updates.live(name, until)

    def took_in(self, name: WeightSet, stamp: Stamp) -> None:
        """See Updates.took_in."""
        self._updates.took_in(name, stamp)

    def update(self, call: WeightsCall) -> UpdateReport:
        """See Updates.update."""
        return self._updates.update(call)

    def sleep(self) -> None:
        """See Updates.sleep."""
        self._updates.sleep()

    def wake(self) -> None:
        """See Updates.wake."""
        self._updates.wake()


def _sooner(until: Until, seconds: float, cancelled: Callable[[], bool]) -> Until:
    end = time.monotonic() + seconds
    end = end if until.deadline is None else min(end, until.deadline)
    return Until(end, lambda: cancelled() or until.cancelled())
