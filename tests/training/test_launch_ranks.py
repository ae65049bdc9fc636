"""The launcher passes signals on, tells how a rank ended, and leaves no rank behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LAUNCHER = """
import json, sys
from nemo_selfpref.config.schema import RunConfig, TrainerConfig
from nemo_selfpref.training import launch
launch._PATIENCE_S = 0.5
sys.exit(launch.launch(RunConfig(name="t", trainer=TrainerConfig(devices=2)), sys.argv[1:]))
"""
RANK = """
import json, os, signal, sys, time
from pathlib import Path
folder, way = Path(sys.argv[1]), sys.argv[2]
rank = os.environ["RANK"]
got = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda n, _: got.append(signal.Signals(n).name))
names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
told = {"pid": os.getpid(), "environment": {name: os.environ[name] for name in names}}
(folder / f"{rank}.tmp").write_text(json.dumps(told))
os.replace(folder / f"{rank}.tmp", folder / f"{rank}.json")
if way == "fail" and rank == "1":
    sys.exit(7)
while way != "end" and not got:
    time.sleep(0.01)
(folder / f"{rank}.got").write_text(" ".join(got))
sys.exit(75 if got else 0)
"""


class Launch:
    """The launcher with stand-ins for the ranks: `python -m nemo_selfpref.cli` is RANK here."""

    def __init__(self, folder: Path, way: str) -> None:
        self.folder = folder
        package = folder / "nemo_selfpref_cli"
        package.mkdir()
        rank = package / "rank.py"
        rank.write_text(RANK)
        # The launcher runs sys.executable -m nemo_selfpref.cli ARGUMENTS: an interpreter of ours
        # runs the stand-in with those arguments.
        python = package / "python"
        python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {rank} "$@"\n')
        python.chmod(0o755)
        code = LAUNCHER.replace("import json, sys", f"import sys; sys.executable = {str(python)!r}")
        environment = {k: v for k, v in os.environ.items() if k != "RANK"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder), way], env=environment
        )

    def end(self) -> None:
        """A test that fails leaves nothing behind: the ranks end with their launcher."""
        self.process.kill()
        self.process.wait()

    def rank(self, number: int) -> dict:
        path = self.folder / f"{number}.json"
        wait_for(path.exists)
        return json.loads(path.read_text())

    def pids(self) -> list[int]:
        return [self.rank(number)["pid"] for number in (0, 1)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Launch]]:
    started: list[Launch] = []

    def launch(way: str) -> Launch:
        started.append(Launch(tmp_path, way))
        return started[-1]

    yield launch
    for launched in started:
        launched.end()


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def test_what_the_ranks_are_told(start: Callable[[str], Launch]) -> None:
    launch = start("end")
    assert launch.process.wait(60) == 0
    told = [launch.rank(number)["environment"] for number in (0, 1)]
    assert [t["RANK"] for t in told] == [t["LOCAL_RANK"] for t in told] == ["0", "1"]
    assert {t["WORLD_SIZE"] for t in told} == {t["LOCAL_WORLD_SIZE"] for t in told} == {"2"}
    assert {t["MASTER_ADDR"] for t in told} == {"127.0.0.1"}
    assert len({t["MASTER_PORT"] for t in told}) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_are_passed_on_once(
    start: Callable[[str], Launch], tmp_path: Path, number: signal.Signals
) -> None:
    launch = start("wait")
    launch.pids()
    launch.process.send_signal(number)
    assert launch.process.wait(60) == 75
    assert [(tmp_path / f"{n}.got").read_text() for n in (0, 1)] == [number.name] * 2


def test_a_rank_that_fails_ends_the_others(start: Callable[[str], Launch]) -> None:
    launch = start("fail")
    pids = launch.pids()
    assert launch.process.wait(60) == 7
    assert all(map(gone, pids))


def test_a_rank_that_is_killed(start: Callable[[str], Launch]) -> None:
    launch = start("wait")
    pids = launch.pids()
    os.kill(pids[1], signal.SIGKILL)
    assert launch.process.wait(60) == 137
    assert all(map(gone, pids))


def test_ranks_do_not_outlive_the_launcher(start: Callable[[str], Launch]) -> None:
    launch = start("wait")
    pids = launch.pids()
    launch.process.kill()
    launch.process.wait()
    wait_for(lambda: all(map(gone, pids)))
