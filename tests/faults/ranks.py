"""Whole runs whose ranks start within a moment: importing NeMo takes far longer than training a
tiny model, so one process imports everything and every rank is a fork of it.

As a script it reads jobs, one JSON object a line, and forks their ranks. Each rank runs a
`selfpref` command and ends as the interpreter ends: threads are joined, exit handlers called.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0
"""How long the ranks left may take to end once one of them has."""
_PR_SET_PDEATHSIG = 1
_NO_THREADS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}


def eventually(
    reached: Callable[[], Any], within_s: float = PATIENCE_S, every_s: float = 0.002
) -> Any:
    """What `reached` returns once that is true; polled."""
    end = time.monotonic() + within_s
    while not (found := reached()):
        assert time.monotonic() < end, "not reached in time"
        time.sleep(every_s)
    return found


def exists(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    return False


def takes_signals(pid: int) -> bool:
    """Whether a process would be told of SIGUSR1, and not ended by it."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        caught = next((line.split()[1] for line in lines if line.startswith("SigCgt")), "0")
        return bool(int(caught, 16) & 1 << (signal.SIGUSR1 - 1))
    return False


@dataclass
class Started:
    """The ranks of one command, until they have ended."""

    zygote: Zygote
    pids: list[int]
    log: Path

    def told(self) -> str:
        """What the ranks have said so far."""
        return self.log.read_text(errors="replace")

    def send(self, rank: int, number: int) -> bool:
        """Whether there was such a rank to send a signal to."""
        if not exists(self.pids[rank]):
            return False
        os.kill(self.pids[rank], number)
        return True

    def joined(self) -> bool:
        """Whether all take signals, which they do from soon after they have met each other. Ranks
        that wait for one that never came are their launcher's to end."""
        return all(map(takes_signals, self.pids))

    def running(self) -> bool:
        return any(exists(pid) for pid in self.pids)

    def statuses(self, within_s: float = 10 * PATIENCE_S) -> list[int]:
        """Exit statuses by rank, -N where signal N ended it. Ranks that outlast the deadline fail
        the test, and are ended."""
        found = self.zygote.hear(within_s)
        if found is None:
            left = [rank for rank, pid in enumerate(self.pids) if exists(pid)]
            for rank in left:
                self.send(rank, signal.SIGKILL)
            self.zygote.hear(PATIENCE_S)
            raise AssertionError(f"ranks {left} did not end within {within_s:g} s: {self.told()}")
        return found


class Zygote:
    """The process that has imported everything. One command at a time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._count = folder, 0
        with open(folder / "zygote", "wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                env={**os.environ, **_NO_THREADS},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        assert self.hear(600) == "ready", (folder / "zygote").read_text()

    def start(self, arguments: Sequence[str], size: int = 1) -> Started:
        """`selfpref ARGUMENTS` on `size` ranks."""
        self._count += 1
        log = self._folder / f"{self._count:04d}"
        job = {"arguments": list(arguments), "size": size, "log": str(log)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        pids = self.hear(PATIENCE_S)
        assert pids, (self._folder / "zygote").read_text()
        return Started(self, pids, log)

    def run(self, arguments: Sequence[str], size: int = 1) -> Started:
        """The same to its end, which has to be a good one."""
        started = self.start(arguments, size)
        assert started.statuses() == [0] * size, started.told()[-6000:]
        return started

    def hear(self, within_s: float) -> Any:
        """Its next answer; None where none came."""
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], within_s)[0]:
            return None
        line = stdout.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        """It ends with its input; nothing of a run is left by then."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# -- the process itself ---------------------------------------------------------------------------


def import_everything() -> None:
    """All of the package; what it needs comes with it."""
    import nemo_selfpref

    for module in pkgutil.walk_packages(nemo_selfpref.__path__, "nemo_selfpref."):
        # What is made for a GPU or another environment is not used by these runs either.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module.name)
    for name in ("pyarrow.parquet", "transformers.models.llama", "safetensors.torch"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def other_threads() -> list[str]:
    """Names of the threads besides this one: a fork would not have them."""
    tasks = [p for p in Path("/proc/self/task").iterdir() if int(p.name) != os.getpid()]
    return [(task / "comm").read_text().strip() for task in tasks]


def become(rank: int, job: dict[str, Any], port: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    if job["size"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["size"]),
            "LOCAL_WORLD_SIZE": str(job["size"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }


def carry_out(job: dict[str, Any]) -> bool:
    """Fork the ranks of a job and wait for them; whether this process is one of them."""
    port, pids = free_port(), []
    for rank in range(job["size"]):
        pid = os.fork()
        if pid == 0:
            become(rank, job, port)
            return True
        pids.append(pid)
    say(pids)
    ended = [os.waitpid(pid, 0)[1] for pid in pids]
    say([os.waitstatus_to_exitcode(status) for status in ended])
    return False


def say(value: Any) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


def jobs() -> Iterator[dict[str, Any]]:
    while line := sys.stdin.readline():
        yield json.loads(line)


def main() -> int:
    import_everything()
    assert other_threads() == [], other_threads()
    say("ready")
    for job in jobs():
        if carry_out(job):
            from nemo_selfpref import cli

            return cli.main(job["arguments"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
