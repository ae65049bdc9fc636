"""Watches over one engine of a fleet: probes it, starts it again, brings it up to date."""

from __future__ import annotations

import threading

from nemo_selfpref.errors import RolloutError
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.members import Member, State
from nemo_selfpref.rollout.serving.roster import Roster
from nemo_selfpref.rollout.serving.wire import Health, Info

_SAME = ("tokenizer_sha256", "vocab_size", "dtype", "max_length", "stop_ids")


def check_same(infos: dict[str, Info]) -> None:
    """Raise RolloutError unless all engines answer with the same model and tokenizer."""
    (first, given), *others = infos.items()
    for name, info in others:
        wrong = [
            f"{field} is {getattr(info, field)!r}, {first} has {getattr(given, field)!r}"
            for field in _SAME
            if _value(info, field) != _value(given, field)
        ]
        if wrong:
            raise RolloutError(
                f"{name} is another kind of engine than {first}: {'; '.join(wrong)}. Start all "
                "engines of a fleet from one model."
            )


def _value(info: Info, field: str) -> object:
    value = getattr(info, field)
    return sorted(value) if isinstance(value, list) else value


class Keeper:
    """A thread that keeps one member in order until the fleet is closed."""

    def __init__(self, member: Member, roster: Roster, like: dict[str, Info]) -> None:
        self.member, self.roster, self.like = member, roster, like
        self.thread = threading.Thread(target=self._run, name=f"keeper {member.name}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.roster.closing.is_set():
            self.member.poke.wait(self.roster.settings.health_every_s)
            self.member.poke.clear()
            if self.roster.closing.is_set() or self.member.state is State.LOST:
                return
            try:
                self._look_after()
            except Exception as error:  # Without its keeper an engine would be trusted for ever.
                self._quarantine(f"looking after it failed: {error!r}")

    def _look_after(self) -> None:
        if self.member.state is State.QUARANTINED:
            self.member.halt()
            if self.roster.asleep:  # The GPU's memory belongs to others until then.
                return
            if self.member.restartable:
                self._restart()
            else:
                self._take_back()
        else:
            self._probe()
        if self.member.state is State.SERVING and not self.roster.asleep:
            self._refit()

    def _quarantine(self, reason: str) -> None:
        # Not again where it is already: each time loses what was asked in between.
        if self.member.state is State.QUARANTINED:
            self.member.reason = reason
        else:
            self.roster.set_state(self.member, State.QUARANTINED, reason)
            if self.member.restartable:
                self.member.poke.set()

    # -- probes -------------------------------------------------------------------------------

    def _probe(self) -> None:
        if self.member.exit_reason:
            self._quarantine(self.member.exit_reason)
            return
        try:
            health, quiet = self.member.look(self.roster.settings.probe_s)
        except RolloutError as error:
            self._failed(str(error))
            return
        asleep = health.status == "sleeping" and self.roster.asleep
        if health.status == "quarantined":
            self._quarantine(health.reason or "it says so itself")
        elif health.status == "starting":  # a fleet whose own engines are on their way back
            self.roster.set_state(self.member, State.SUSPECT, health.reason)
        elif health.status != "serving" and not asleep:
            self._failed(f"it says that it is {health.status}")
        elif quiet and health.beat_age_s > self.roster.settings.stall_s:
            # While weights are loaded it takes no steps, and that may be long.
            self._failed(f"its server answers, but it took no step for {health.beat_age_s:.1f} s")
        elif self.member.state is not State.SERVING or self.member.failures:
            self.roster.set_state(self.member, State.SERVING)

    def _failed(self, reason: str) -> None:
        self.member.failures += 1
        if self.member.failures >= self.roster.settings.suspect_after:
            self._quarantine(f"{self.member.failures} probes failed in a row; the last: {reason}")
        else:
            self.roster.set_state(self.member, State.SUSPECT, reason)

    # -- back to work -------------------------------------------------------------------------

    def _restart(self) -> None:
        member, settings = self.member, self.roster.settings
        if member.restarts >= settings.max_restarts:
            why = f"started again {member.restarts} times; the last trouble: {member.reason}"
            self.roster.set_state(member, State.LOST, why)
            return
        member.restarts += 1
        why = f"started again ({member.restarts} of {settings.max_restarts}): {member.reason}"
        self.roster.set_state(member, State.STARTING, why)
        self._join(settings.start_timeout_s)

    def _take_back(self) -> None:
        self._join(self.roster.settings.probe_s)

    def _join(self, seconds: float) -> None:
        """Back among those that serve; asked only once it holds the latest weights."""
        try:
            info = self.member.start(Until.within(seconds, self.roster.closing.is_set))
            check_same({**self.like, self.member.name: info})
            health, _ = self.member.look(max(self.roster.settings.probe_s, 5.0))
            self._check_fit(health)
            if self.roster.asleep:  # The others were put to sleep while it started.
                self.member.client.sleep()
        except RolloutError as error:
            self._quarantine(str(error))
            return
        self.roster.set_state(self.member, State.SERVING)

    def _check_fit(self, health: Health) -> None:
        if health.status == "quarantined":
            raise RolloutError(health.reason or "it says that it is quarantined")
        for name in self.member.weight_sets:
            if reason := self.roster.stranded(self.member, name):
                raise RolloutError(reason)

    def _refit(self) -> None:
        for name in self.member.weight_sets:
            if reason := self.roster.stranded(self.member, name):
                self._quarantine(reason)
                return
            if self.roster.missing(self.member, name) is None:
                continue
            try:
                self.member.fit(lambda name=name: self.roster.missing(self.member, name))
            except RolloutError as error:
                self._quarantine(f"the latest {name.value} weights were not taken in: {error}")
                return
            with self.roster.changed:
                self.roster.changed.notify_all()
