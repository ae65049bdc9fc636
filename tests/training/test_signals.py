"""A process that is asked to stop says so, remembers it, and stops at once when asked again."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nemo_selfpref.errors import EXIT_STOPPED, RunStopped
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.training.launch import STOP_SIGNALS
from nemo_selfpref.training.signals import StopSignals, stopped

CHILD = """
import ctypes, sys, time
from nemo_selfpref.training import signals
signals._SAME_REQUEST_S = float(sys.argv[1])
with signals.StopSignals() as stop:
    print("ready", flush=True)
    if sys.argv[2] == "stuck":
        ctypes.CDLL(None).sleep(30)
    while stop.received is None:
        time.sleep(0.01)
    print(stop.received, flush=True)
    time.sleep(30)
"""


class Child:
    def __init__(self, same_request_s: float, way: str = "looking") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(same_request_s), way],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 60)[0], "the child says nothing"
        return self.process.stdout.readline().strip()

    def told(self, text: str) -> None:
        """Wait until the child has said this on its standard error."""
        assert self.process.stderr is not None
        while text not in (line := self.process.stderr.readline()):
            assert line, f"the child ended without saying {text!r}"


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda n: n.name)
def test_once_is_remembered_and_twice_ends_it(number: signal.Signals) -> None:
    child = Child(0.0)
    child.process.send_signal(number)
    assert child.line() == number.name
    child.told(f"got {number.name}: stopping after this step")
    child.process.send_signal(number)
    assert child.process.wait(30) == 128 + number


def test_one_request_sent_twice_counts_once() -> None:
    child = Child(1000.0)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        child.process.send_signal(number)
        time.sleep(0.05)
    assert child.line() == "SIGUSR1"
    with pytest.raises(subprocess.TimeoutExpired):
        child.process.wait(0.5)
    child.process.kill()
    child.process.wait()


def test_the_second_works_where_the_main_thread_is_stuck() -> None:
    child = Child(0.0, "stuck")
    child.process.send_signal(signal.SIGTERM)
    child.told("got SIGTERM: stopping after this step")
    child.process.send_signal(signal.SIGINT)
    assert child.process.wait(20) == 128 + signal.SIGINT


def test_the_signals_are_given_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        end = time.monotonic() + 10
        while stop.received is None and time.monotonic() < end:
            time.sleep(0.01)
        assert stop.received == "SIGUSR1"
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    end = time.monotonic() + 10
    while len(list(Path("/proc/self/fd").iterdir())) > descriptors and time.monotonic() < end:
        time.sleep(0.01)
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors


def test_checking_together(policy: Policy) -> None:
    stop = StopSignals()
    stop.check(torch.device("cpu"), "nothing")
    stop.received = "SIGTERM"
    with pytest.raises(RunStopped, match="stopped as asked; all of it is saved"):
        stop.check(torch.device("cpu"), "all of it is saved")
    assert stopped("x").exit_status == EXIT_STOPPED == 75
