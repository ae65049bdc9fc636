"""One engine of a fleet: how it is reached, what it holds, and how it is started again."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from nemo_selfpref.errors import RolloutError
from nemo_selfpref.files import write_text
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.client import ServerClient
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec
from nemo_selfpref.rollout.serving.launcher import (
    ChildProcess,
    engine_command,
    engine_environment,
)
from nemo_selfpref.rollout.serving.wire import Health, Info, Stamp, UpdateReport, WeightsCall
from nemo_selfpref.types import WeightSet

_HUNG_GRACE_S = 2.0
"""What is restarted has shown that it does not listen."""
_CLOSE_GRACE_S = 5.0
_LOOK_S = 5.0
_RETRY_S = 0.2


class State(StrEnum):
    """STARTING: not there yet. SERVING: answers. SUSPECT: did not answer its last probe; gets no
    new work. QUARANTINED: broken, or not to be trusted. LOST: given up."""

    STARTING = "starting"
    SERVING = "serving"
    SUSPECT = "suspect"
    QUARANTINED = "quarantined"
    LOST = "lost"


class Member:
    """What a fleet knows of an engine. The fields are guarded by the fleet's lock, but for `held`,
    which `fit` guards.

    `epoch` grows whenever the engine is taken out: what was asked before is lost then.
    """

    def __init__(self, name: str, token: str) -> None:
        self.name, self.token, self.url = name, token, ""
        self.state, self.reason = State.STARTING, ""
        self.epoch = self.restarts = self.failures = self.load = 0
        self.weight_sets: tuple[WeightSet, ...] = ()
        self.held: dict[WeightSet, Stamp] = {}
        self.health: Health | None = None
        self.poke = threading.Event()
        """Set to have it looked at right away."""
        self._fitting = threading.Lock()
        self._fits = 0
        self._client: ServerClient | None = None

    restartable = False

    @property
    def client(self) -> ServerClient:
        if self._client is None:
            raise RolloutError(f"{self.name} has not been started")
        return self._client

    def start(self, until: Until) -> Info:
        """Reach the engine, starting it where it is ours; what it is.

        Raises:
            RolloutError: it ended, or answers nonsense.
            RolloutTimeout, RolloutCancelled: `until` was over first.
        """
        raise NotImplementedError

    @property
    def exit_reason(self) -> str:
        """How its process ended; empty while it runs, or where it is not ours."""
        return ""

    def halt(self) -> None:
        """End its process, where it is ours; `start` begins another."""

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    # -- weights ------------------------------------------------------------------------------

    def look(self, timeout_s: float) -> tuple[Health, bool]:
        """Its health, and whether no new weights were on their way meanwhile: `held` was brought
        up to date then.

        Raises:
            RolloutError: no answer, or nonsense.
        """
        before, busy = self._fits, self._fitting.locked()
        health = self.client.health(timeout_s)
        settled = not busy and before == self._fits and self._fitting.acquire(blocking=False)
        if settled:
            try:
                settled = before == self._fits
                if settled:
                    self._note(health)
            finally:
                self._fitting.release()
        return health, settled

    def _note(self, health: Health) -> None:
        self.health = health
        self.held = {
            name: health.weights[name.value]
            for name in self.weight_sets
            if name.value in health.weights
        }

    def fit(self, find: Callable[[], WeightsCall | None]) -> UpdateReport | None:
        """Send it the weights that `find` names, once nobody else sends it any.

        Raises:
            RolloutError: refused or failed; `held` says what it has now, where that is known.
        """
        with self._fitting:
            self._fits += 1
            call = find()
            if call is None:
                return None
            name = call.manifest.weight_set
            try:
                self.held = {n: stamp for n, stamp in self.held.items() if n is not name}
                report = self.client.update(call)
                if report.stamp != call.manifest.stamp:
                    raise RolloutError(
                        f"{self.name} took in {report.stamp}, sent was {call.manifest.stamp}"
                    )
                self.held = {**self.held, name: report.stamp}
                return report
            except RolloutError:
                with contextlib.suppress(RolloutError):
                    self._note(self.client.health(_LOOK_S))
                raise


class RemoteMember(Member):
    """An engine that somebody else runs: it cannot be started again, but is taken back when it
    answers again."""

    def __init__(self, name: str, url: str, token: str) -> None:
        super().__init__(name, token)
        self.url = url.rstrip("/")

    def start(self, until: Until) -> Info:
        if self._client is None:
            self._client = ServerClient(self.url, self.token)
        while True:
            try:
                info = self._client.info()
                break
            except RolloutError as error:
                if error.status is not None:  # it answers, and will not answer otherwise later
                    raise
                until.check(f"{self.name} at {self.url} ({error})")
                if until.deadline is None:
                    raise
            time.sleep(_RETRY_S)
        self.weight_sets = tuple(WeightSet(name) for name in info.weight_sets)
        return info


class LocalMember(Member):
    """An engine process of this machine, that ends with this process.

    Args:
        spec: what is to run. Its ready_file is replaced by one below `folder`.
        python: interpreter of vLLM's environment.
        folder: takes the spec, the ready file and the log of each start.
        devices: CUDA_VISIBLE_DEVICES of the engine; None leaves it as it is.
        command: makes the command from interpreter and spec file.
    """

    restartable = True

    def __init__(
        self,
        name: str,
        spec: EngineSpec,
        python: str,
        folder: Path,
        token: str,
        devices: str | None = None,
        command: Callable[[str, Path], list[str]] = engine_command,
    ) -> None:
        super().__init__(name, token)
        self.folder, self.python, self.devices, self.command = folder, python, devices, command
        self.spec = spec.model_copy(update={"ready_file": str(folder / f"{name}.ready.json")})
        self.weight_sets = tuple(WeightSet(name) for name in spec.weight_sets)
        self.child: ChildProcess | None = None
        self._starts, self._closed = 0, False
        self._lock = threading.Lock()

    def start(self, until: Until) -> Info:
        child = self._launch()
        port = child.wait_ready(until)
        self.url = f"http://{self._address()}:{port}"
        if self._client is not None:
            self._client.close()
        self._client = ServerClient(self.url, self.token)
        self.held = {}
        return self._client.info()

    def _launch(self) -> ChildProcess:
        self.halt()
        with self._lock:
            if self._closed:
                raise RolloutError(f"{self.name} was closed")
            self._starts += 1
            spec_file = self.folder / f"{self.name}.spec.json"
            write_text(spec_file, self.spec.model_dump_json(indent=1))
            self.child = ChildProcess(
                self.command(self.python, spec_file),
                ready_file=Path(self.spec.ready_file),
                log=self.folder / f"{self.name}.start-{self._starts}.log",
                env=engine_environment(self.devices),
            )
            return self.child

    def halt(self) -> None:
        if self.child is not None:
            self.child.stop(_HUNG_GRACE_S)

    def _address(self) -> str:
        """What listens on every address is reached by this machine's own."""
        host = self.spec.host
        return {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)

    @property
    def exit_reason(self) -> str:
        status = None if self.child is None else self.child.exit_status
        if status is None or self.child is None:
            return ""
        return f"its process ended with status {status}; see {self.child.log}"

    def close(self) -> None:
        with self._lock:
            self._closed = True
            child = self.child
        if child is not None:
            child.stop(_CLOSE_GRACE_S)
        super().close()
