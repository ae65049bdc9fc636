"""Who of a fleet may be asked what: the states of its engines and the weights they must hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from nemo_selfpref.errors import ConfigError, RolloutError, StaleWeightsError
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.members import Member, State
from nemo_selfpref.rollout.serving.wire import Stamp, WeightsCall
from nemo_selfpref.types import WeightSet

_POLL_S = 0.1


@dataclass(frozen=True)
class FleetSettings:
    """See VLLMConfig for those that have the same name there."""

    health_every_s: float = 2.0
    suspect_after: int = 3
    max_restarts: int = 3
    min_engines: int = 1
    start_timeout_s: float = 600.0
    stall_s: float = 60.0
    """An engine that took no step for this long fails its probe, though its server answers."""

    @property
    def probe_s(self) -> float:
        """How long an answer to a probe is waited for."""
        return max(1.0, self.health_every_s)


class Roster:
    """The members of a fleet; every change of their state goes through it.

    `latest`: what a set's engines must hold to be asked; None while they hold different weights and
    none were sent yet.
    """

    def __init__(
        self, members: Sequence[Member], settings: FleetSettings, note: Callable[[str], None]
    ) -> None:
        self.members, self.settings, self.note = tuple(members), settings, note
        self.closing = threading.Event()
        self.asleep = False
        self.latest: dict[WeightSet, Stamp | None] = {}
        self.calls: dict[WeightSet, WeightsCall] = {}
        """What brings an engine to `latest`; the folders they name stay on the disk."""
        self.changed = threading.Condition(threading.RLock())
        self._updating: set[WeightSet] = set()

    def of(self, weight_set: WeightSet) -> list[Member]:
        return [member for member in self.members if weight_set in member.weight_sets]

    @property
    def weight_sets(self) -> list[WeightSet]:
        return sorted({name for member in self.members for name in member.weight_sets})

    def open(self) -> None:
        """All members have started: find out what they hold, and let them be asked.

        Raises:
            ConfigError: a set has too few engines from the start.
        """
        with self.changed:
            for name in self.weight_sets:
                members, least = self.of(name), self.settings.min_engines
                if len(members) < least:
                    raise ConfigError(
                        f"rollout.vllm.min_engines={least}, but {len(members)} engines hold "
                        f"{name.value} weights: lower it, or raise rollout.vllm.engines_per_set"
                    )
                held = [m.held.get(name) for m in members]
                self.latest[name] = held[0] if all(h == held[0] for h in held) else None
            for member in self.members:
                self.set_state(member, State.SERVING)

    # -- states -------------------------------------------------------------------------------

    def set_state(self, member: Member, state: State, reason: str = "") -> None:
        with self.changed:
            if state is not member.state and state is not State.SERVING:
                self.note(f"{member.name} is {state.value}: {reason}")
            if state in (State.QUARANTINED, State.LOST):
                member.epoch += 1
            if state is State.SERVING:
                member.failures = 0
            member.state, member.reason = state, reason
            self.changed.notify_all()

    def fault(self, member: Member, epoch: int, reason: str) -> None:
        """It failed somebody who asked it: no more work until it passes a probe."""
        with self.changed:
            if member.epoch == epoch and member.state is State.SERVING:
                self.set_state(member, State.SUSPECT, reason)
            member.poke.set()

    def fits(self, member: Member, name: WeightSet) -> bool:
        latest = self.latest.get(name)
        return latest is not None and member.held.get(name) == latest

    def missing(self, member: Member, name: WeightSet) -> WeightsCall | None:
        """What must be sent to a member that holds other weights than the set's latest; None where
        there is nothing to do, or where an update is under way."""
        with self.changed:
            call = self.calls.get(name)
            if call is None or name in self._updating or self.fits(member, name):
                return None
            held = member.held.get(name)
        if held is None or held.version <= call.manifest.version:
            return call
        # Back to what came before, on purpose: an engine refuses that within one run.
        run = f"{call.manifest.run} again after {held}"
        return call.model_copy(update={"manifest": call.manifest.model_copy(update={"run": run})})

    def stranded(self, member: Member, name: WeightSet) -> str:
        """Why a member that holds other weights than the latest cannot be sent those; empty where
        it can, or need not."""
        with self.changed:
            latest = self.latest.get(name)
            if latest is None or name in self._updating or name in self.calls:
                return ""
            if self.fits(member, name):
                return ""
            return (
                f"it holds {name.value} {member.held.get(name, 'weights that are not known')}, the "
                f"fleet {latest}, which were not sent through it: send new ones"
            )

    def settled(self, member: Member) -> bool:
        """Whether it holds all that it should, or that is just being decided."""
        with self.changed:
            return all(
                name in self._updating or self.latest.get(name) is None or self.fits(member, name)
                for name in member.weight_sets
            )

    # -- whom to ask --------------------------------------------------------------------------

    def pin(self, name: WeightSet, expect: Stamp | None, until: Until) -> Stamp:
        """The weights a call is answered with.

        Raises:
            StaleWeightsError: others were expected than the fleet holds.
            RolloutError: nobody knows what the fleet holds.
        """
        self.wait(lambda: name not in self._updating, until, f"new {name.value} weights")
        self.check_stamp(name, expect)
        latest = self.latest[name]
        if latest is None:
            raise RolloutError(
                f"the engines hold different {name.value} weights: send them new ones first"
            )
        return latest

    def check_stamp(self, name: WeightSet, expect: Stamp | None) -> None:
        """Raise StaleWeightsError unless the expected weights are the set's latest."""
        latest = self.latest.get(name)
        if expect is not None and expect != latest:
            raise StaleWeightsError(
                f"{name.value} weights of {expect} were asked for; {latest or 'others'} are held"
            )

    def usable(self, name: WeightSet, stamp: Stamp) -> list[Member]:
        """Whom to ask for answers of these weights; nobody while some are still on their way.

        Raises:
            StaleWeightsError: the set has other weights by now.
            RolloutError: too few engines are left, or the fleet sleeps or is closed.
        """
        with self.changed:
            self.check_awake()
            if name in self._updating:
                return []
            self.check_stamp(name, stamp)
            found = [m for m in self.of(name) if m.state is State.SERVING and self.fits(m, name)]
            if len(found) >= self.settings.min_engines:
                return found
            if any(self.comes_back(m, name) for m in self.of(name)):
                return []
            raise RolloutError(self.too_few(name))

    def check_awake(self) -> None:
        if self.closing.is_set():
            raise RolloutError("the fleet was closed")
        if self.asleep:
            raise RolloutError("the engines sleep: wake them first")

    def too_few(self, name: WeightSet) -> str:
        states = "; ".join(f"{m.name} is {self.described(m)}" for m in self.of(name))
        return (
            f"fewer than rollout.vllm.min_engines={self.settings.min_engines} engines serve "
            f"{name.value} weights: {states}"
        )

    def described(self, member: Member) -> str:
        outdated = member.state is State.SERVING and not self.settled(member)
        state = "outdated" if outdated else member.state.value
        return f"{state} ({member.reason})" if member.reason else state

    def comes_back(self, member: Member, name: WeightSet) -> bool:
        if member.state is State.SERVING:
            can_change = name in self.calls or member.restartable
            return can_change and not self.fits(member, name)
        if member.state is State.QUARANTINED:
            return member.restartable and member.restarts < self.settings.max_restarts
        return member.state in (State.STARTING, State.SUSPECT)

    def wait(self, reached: Callable[[], bool], until: Until, what: str) -> None:
        with self.changed:
            while not reached():
                until.check(what)
                if self.closing.is_set():
                    raise RolloutError("the fleet was closed")
                self.changed.wait(_POLL_S)

    # -- new weights --------------------------------------------------------------------------

    @contextmanager
    def updating(self, name: WeightSet) -> Iterator[None]:
        """Nobody is asked for answers of this set, and nobody is brought to its latest."""
        with self.changed:
            self._updating.add(name)
        try:
            yield
        finally:
            with self.changed:
                self._updating.discard(name)
                self.changed.notify_all()
            for member in self.of(name):
                member.poke.set()
