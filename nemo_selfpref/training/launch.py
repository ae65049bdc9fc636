"""Starting the processes of a run.

One process runs in place. For more on this machine the command starts itself again, once a rank;
where a launcher (torchrun, srun with the variables of torch.distributed) has already started the
ranks, it just goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.errors import ConfigError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What launchers and people send to end a job: srun and sbatch --signal=USR1, a preemption, ^C."""
_PATIENCE_S = 20.0
"""How long the ranks left may take to notice that one has failed, and to say what they know."""
_POLL_S = 0.1
_PR_SET_PDEATHSIG = 1


def needs_launch(cfg: RunConfig) -> bool:
    """Whether this process must start the ranks of the run."""
    if "RANK" in os.environ:
        return False
    if cfg.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: start every rank with torchrun or srun; "
            "this command starts processes on one machine only"
        )
    return cfg.trainer.devices > 1


def launch(cfg: RunConfig, arguments: Sequence[str]) -> int:
    """Run `selfpref ARGUMENTS` on trainer.devices processes.

    They get the signals that this process gets, and do not outlive it. Returns the exit status of
    the first that failed (128 + N where signal N ended it), 0 if none did. torchrun would have
    said 1 whatever a rank ended with, and passes on none but SIGTERM.
    """
    ranks = _Ranks(cfg.trainer.devices, arguments)
    with _passing_on(ranks):
        return ranks.wait()


class _Ranks:
    def __init__(self, count: int, arguments: Sequence[str]) -> None:
        threads = max(1, (os.cpu_count() or 1) // count)
        common = {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
        }
        command = [sys.executable, "-m", "nemo_selfpref.cli", *arguments]
        self._processes = [
            subprocess.Popen(
                command,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                # Apart from the terminal's group: ^C reaches the ranks once, through this process.
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
            for rank in range(count)
        ]

    def send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Until all have ended; those that outlast a failed one by much are ended."""
        failed, deadline, running = 0, float("inf"), True
        while running:
            time.sleep(_POLL_S)
            statuses = [process.poll() for process in self._processes]
            running = None in statuses
            if not failed and (failed := next((s for s in statuses if s), 0)):
                deadline = time.monotonic() + _PATIENCE_S
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
        return failed if failed >= 0 else 128 - failed


@contextlib.contextmanager
def _passing_on(ranks: _Ranks) -> Iterator[None]:
    def pass_on(number: int, _: FrameType | None) -> None:
        ranks.send(number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
