"""A child process that answers on a port, from its start to its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_selfpref.errors import RolloutError, RolloutTimeout
from nemo_selfpref.redact import is_secret_name, redact
from nemo_selfpref.rollout.engine import Until

_POLL_S = 0.05
_TAIL_BYTES = 3000
_REAP_S = 30.0
_NOT_FOR_ENGINES = (
    # Of the trainer's own process group, which an engine must not take for its own.
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    # Switches that open vLLM to whoever reaches it.
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
    "VLLM_SERVER_DEV_MODE",
    # Packages of another environment.
    "PYTHONPATH",
    "PYTHONHOME",
)


def engine_command(python: str, spec_path: Path) -> list[str]:
    """How an engine process is started; `python` is the interpreter of vLLM's environment."""
    return [python, "-m", "nemo_selfpref.rollout.serving.engine_process", str(spec_path)]


def engine_environment(devices: str | None = None) -> dict[str, str]:
    """This process's environment without what belongs to its own process group and packages, and
    without keys and tokens, which an engine needs none of; `devices` becomes
    CUDA_VISIBLE_DEVICES."""
    made = {
        name: value
        for name, value in os.environ.items()
        if name not in _NOT_FOR_ENGINES
        and not name.startswith("TORCHELASTIC_")
        and not is_secret_name(name)
    }
    if devices is not None:
        made["CUDA_VISIBLE_DEVICES"] = devices
    return made


class ChildProcess:
    """A command in a process group of its own, that ends when its standard input does: it does not
    outlive this process, however this one ends.

    Args:
        ready_file: where the child writes {"port", "pid"} once it answers; an old one is deleted.
        log: takes the child's output.

    Raises:
        RolloutError: the command cannot be started.
    """

    def __init__(
        self, command: Sequence[str], *, ready_file: Path, log: Path, env: Mapping[str, str]
    ) -> None:
        self.command, self.ready_file, self.log = list(command), ready_file, log
        self._ending = threading.Lock()
        self._ended: int | None = None
        ready_file.parent.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        ready_file.unlink(missing_ok=True)
        try:
            with open(log, "ab") as output:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=dict(env),
                )
        except OSError as error:
            raise RolloutError(
                f"{self.command[0]} cannot be started: {error}. Set rollout.vllm.python to the "
                "interpreter of an environment with vLLM (make rollout-env makes one without a GPU)"
            ) from error

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; the negative number of the signal that ended it, as subprocess."""
        if self._ended is None:
            # Left unreaped until `stop`: nobody else can get its number, or its group's, so far.
            try:
                found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # `stop`, in another thread, has just reaped it.
                return self._process.returncode
            if found is not None:
                exited = found.si_code == os.CLD_EXITED
                self._ended = found.si_status if exited else -found.si_status
        return self._ended

    @property
    def alive(self) -> bool:
        return self.exit_status is None

    def wait_ready(self, until: Until) -> int:
        """The port the child answers on, once it does.

        Raises:
            RolloutError: it ended first; the message has the end of its log.
            RolloutTimeout, RolloutCancelled: `until` was over first.
        """
        started = time.monotonic()
        while (port := self._port()) is None:
            if not self.alive:
                raise RolloutError(
                    f"{self._what()} ended with status {self.exit_status} before it answered. "
                    f"The end of {self.log}:\n{self.tail()}"
                )
            if until.cancelled():
                until.check(self._what())
            if until.over:
                raise RolloutTimeout(
                    f"{self._what()} did not answer within {time.monotonic() - started:.1f} s; see "
                    f"{self.log}. Where it only needs longer, raise rollout.vllm.start_timeout_s."
                )
            time.sleep(_POLL_S)
        return port

    def _port(self) -> int | None:
        try:
            return int(json.loads(self.ready_file.read_text(encoding="utf-8"))["port"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RolloutError(f"{self.ready_file} of {self._what()} is damaged: {error}") from None

    def _what(self) -> str:
        return f"the process {self.pid} ({' '.join(self.command[1:4])})"

    def tail(self) -> str:
        """The end of the log, without secrets that are in it."""
        try:
            with open(self.log, "rb") as handle:
                handle.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
                return redact(handle.read().decode(errors="replace")).strip()
        except OSError as error:
            return f"(it cannot be read: {error})"

    def stop(self, grace_s: float = 10.0) -> None:
        """End the child: by the end of its input, by SIGTERM, by SIGKILL, each `grace_s` after the
        one before. What it started itself ends with it."""
        with self._ending:
            if self._process.returncode is not None:
                return
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            if not self._ends_within(grace_s):
                self._signal(signal.SIGTERM)
                self._ends_within(grace_s)
            # The rest of its group, too; it is not reaped yet, so the group is still its own.
            self._signal(signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_REAP_S)
            self.ready_file.unlink(missing_ok=True)

    def _ends_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self.alive and time.monotonic() < end:
            time.sleep(min(_POLL_S, max(0.0, end - time.monotonic())))
        return not self.alive

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)
