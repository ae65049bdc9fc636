"""Requests to stop: every rank hears of a signal that reached any one, between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch

from nemo_selfpref.errors import EXIT_STOPPED, RunStopped
from nemo_selfpref.megatron.parallel import any_of
from nemo_selfpref.training.launch import STOP_SIGNALS

_SAME_REQUEST_S = 2.0
"""A launcher may send one request twice: to a process, and to the group it is in."""


class StopSignals:
    """Remembers that this process was asked to stop. A second request ends it at once.

    A context manager that takes over the signals inside the block (in the main thread; elsewhere
    signals are not Python's to take). A thread of its own hears of them, so that a second one works
    where the main thread is stuck in a collective.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(read,), daemon=True, name="signals").start()
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write)  # ends the thread

    def install(self) -> None:
        """Take the signals; again where something else has taken them since."""
        for number in self._before:
            signal.signal(number, _heard_elsewhere)

    def _listen(self, read: int) -> None:
        while got := os.read(read, 1):
            if got[0] in STOP_SIGNALS:
                self._hear(got[0])
        os.close(read)

    def _hear(self, number: int) -> None:
        name, rank = signal.Signals(number).name, os.environ.get("RANK", "0")
        if self.received is None:
            self.received, self._since = name, time.monotonic()
            _tell(
                f"selfpref: rank {rank} got {name}: stopping after this step, with everything "
                "saved; once more stops at once\n"
            )
        elif time.monotonic() - self._since > _SAME_REQUEST_S:
            _tell(f"selfpref: rank {rank} got {name} again: stopping at once\n")
            os._exit(128 + number)

    def check(self, device: torch.device, saved: str) -> None:
        """End the run if a rank was asked to; `saved` says what is on disk. Collective.

        Raises:
            RunStopped: one was.
        """
        if any_of([self.received is not None], device)[0]:
            raise stopped(saved)


def stopped(saved: str) -> RunStopped:
    return RunStopped(
        f"stopped as asked; {saved}. The same command goes on (exit status {EXIT_STOPPED})."
    )


def _heard_elsewhere(number: int, frame: FrameType | None) -> None:
    """The thread of StopSignals hears of it."""


def _tell(text: str) -> None:
    # Straight to the terminal: a thread may not wait for a buffer that the main thread holds.
    os.write(2, text.encode())
