"""What every engine of a fleet is told at once: new weights, to sleep, to wake."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from nemo_selfpref.errors import RolloutError, WeightSyncError
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.members import Member, State
from nemo_selfpref.rollout.serving.roster import Roster
from nemo_selfpref.rollout.serving.wire import (
    FolderSource,
    Manifest,
    Stamp,
    UpdateReport,
    WeightsCall,
)
from nemo_selfpref.types import WeightSet

_POLL_S = 0.1
_LOOK_S = 10.0
_LIVE = (State.SERVING, State.SUSPECT)
Made = TypeVar("Made")


def in_thread(act: Callable[[], Made], name: str) -> Future[Made]:
    """A pool's threads would be waited for at exit, however long they wait themselves."""
    future: Future[Made] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


class Updates:
    """One at a time, whoever asks for them."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self._lock = threading.Lock()

    def update(self, call: WeightsCall) -> UpdateReport:
        """Send new weights to every engine of their set.

        An engine that fails while enough others take them is brought up to date before it is asked
        again. Where too few take them because engines died, they are sent again once those are
        back; where one refuses them, those that did take them go back to the ones before.
        """
        manifest, roster = call.manifest, self.roster
        name = manifest.weight_set
        if not isinstance(call.source, FolderSource):
            raise WeightSyncError("a fleet sends weights from folders; the server joins groups")
        with self._lock:
            self._check_update(manifest)
            until = Until.within(call.timeout_s, roster.closing.is_set)
            while True:
                members = self._members(manifest, until)
                with roster.updating(name):
                    epochs = {m: m.epoch for m in members}
                    reports, failures = self._send(members, call)
                    enough = len(reports) >= roster.settings.min_engines
                    refused = any(isinstance(e, WeightSyncError) for e in failures.values())
                    if enough:
                        with roster.changed:
                            roster.latest[name], roster.calls[name] = manifest.stamp, call
                    elif refused or until.over:
                        raise WeightSyncError(self._why(manifest, members, failures))
                what = f"{name.value} {manifest.stamp}"
                for member, error in failures.items():
                    roster.note(f"{member.name} did not take in {what}: {error}")
                    roster.fault(member, epochs[member], str(error))
                if enough:
                    return _slowest(reports)
                self._wait_for_probes(failures, until)

    def _members(self, manifest: Manifest, until: Until) -> list[Member]:
        try:
            return self.live(manifest.weight_set, until)
        except RolloutError as error:
            raise WeightSyncError(
                f"{manifest.weight_set.value} {manifest.stamp} was not sent: {error}"
            ) from error

    def _wait_for_probes(self, failures: Iterable[Member], until: Until) -> None:
        """Until it is known whether those that failed still run."""
        with contextlib.suppress(RolloutError):
            self.roster.wait(
                lambda: all(m.state is not State.SUSPECT for m in failures), until, "probes"
            )

    def took_in(self, name: WeightSet, stamp: Stamp) -> None:
        """The engines have these weights by another way than `update`, and are asked for them from
        now on. One that loses them gets no work until others are sent: there is no folder to bring
        it up to date from."""
        roster = self.roster
        with self._lock, roster.updating(name):
            with roster.changed:
                roster.latest[name] = stamp
                roster.calls.pop(name, None)
            for member in roster.of(name):
                with contextlib.suppress(RolloutError):
                    member.look(_LOOK_S)

    def live(self, name: WeightSet, until: Until) -> list[Member]:
        """Whom to send new weights, once that are enough.

        Raises:
            RolloutError: too few engines are left, or are there when `until` is over.
        """

        def found() -> list[Member]:
            return [m for m in self.roster.of(name) if m.state in _LIVE]

        def decided() -> bool:
            return len(found()) >= self.roster.settings.min_engines or not any(
                m.state is State.STARTING or self.roster.comes_back(m, name)
                for m in self.roster.of(name)
            )

        self.roster.wait(decided, until, f"engines for {name.value} weights")
        if len(found()) < self.roster.settings.min_engines:
            raise RolloutError(self.roster.too_few(name))
        return found()

    def _check_update(self, manifest: Manifest) -> None:
        name, roster = manifest.weight_set, self.roster
        if not roster.of(name):
            raise WeightSyncError(f"this fleet does not hold {name.value} weights")
        if roster.asleep:
            raise WeightSyncError("the engines sleep: wake them first")
        before = roster.calls.get(name)
        if before is None or before.manifest.run != manifest.run:
            return
        if manifest.version < before.manifest.version:
            raise WeightSyncError(
                f"{name.value} {manifest.stamp} is older than {before.manifest.stamp}, which is "
                "served: refused"
            )

    def _send(
        self, members: Sequence[Member], call: WeightsCall
    ) -> tuple[list[UpdateReport], dict[Member, RolloutError]]:
        """Reports of those that took it in, the errors of those that did not."""
        epochs = {m: m.epoch for m in members}
        sends = {m: in_thread(lambda m=m: m.fit(lambda: call), f"fit {m.name}") for m in members}
        reports: list[UpdateReport] = []
        failures: dict[Member, RolloutError] = {}
        for member, future in sends.items():
            # It may have been given up meanwhile: then nobody waits for its answer.
            while not wait([future], _POLL_S).done and member.epoch == epochs[member]:
                pass
            if not future.done():
                failures[member] = RolloutError(member.reason)
            elif (error := future.exception()) is None:
                if (report := future.result()) is not None:
                    reports.append(report)
            else:
                ours = isinstance(error, RolloutError)
                failures[member] = error if ours else RolloutError(repr(error))
        return reports, failures

    def _why(
        self, manifest: Manifest, members: Sequence[Member], failures: dict[Member, RolloutError]
    ) -> str:
        reasons = "; ".join(f"{member.name}: {reason}" for member, reason in failures.items())
        before = self.roster.latest.get(manifest.weight_set)
        return (
            f"{manifest.weight_set.value} {manifest.stamp} was taken in by "
            f"{len(members) - len(failures)} engines, fewer than rollout.vllm.min_engines="
            f"{self.roster.settings.min_engines}: {reasons}. "
            f"{before or 'What each held before'} is served."
        )

    def sleep(self) -> None:
        """Put all engines to sleep, or none.

        Raises:
            RolloutError: one cannot.
        """
        with self._lock:
            self.roster.check_awake()
            self.roster.asleep = True
            failures = self._tell_all(lambda m: m.client.sleep())
            if failures:
                self._tell_all(lambda m: m.client.wake())
                self.roster.asleep = False
                raise RolloutError(f"not put to sleep: {'; '.join(failures)}")

    def wake(self) -> None:
        """Wake all engines; one that does not wake is started again."""
        with self._lock:
            if not self.roster.asleep:
                return
            failures = self._tell_all(lambda m: m.client.wake())
            self.roster.asleep = False
            for member in self.roster.members:
                member.poke.set()
        for failure in failures:
            self.roster.note(f"did not wake: {failure}")

    def _tell_all(self, tell: Callable[[Member], Any]) -> list[str]:
        """Why some did not do as told; those that are down are not asked."""
        live = [m for m in self.roster.members if m.state in _LIVE]
        told = {m: in_thread(lambda m=m: tell(m), f"tell {m.name}") for m in live}
        failures = {m.name: future.exception() for m, future in told.items()}
        return [f"{name}: {error}" for name, error in failures.items() if error is not None]


def _slowest(reports: Sequence[UpdateReport]) -> UpdateReport:
    errors = [r.probe_error for r in reports if r.probe_error is not None]
    return UpdateReport(
        stamp=reports[0].stamp,
        wait_s=max(r.wait_s for r in reports),
        verify_s=max(r.verify_s for r in reports),
        load_s=max(r.load_s for r in reports),
        probe_s=max(r.probe_s for r in reports),
        probe_error=max(errors, default=None),
    )
