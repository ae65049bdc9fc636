"""One rank of a small world without a model: steps with a barrier of files, and a heart.

    hanging_rank.py FOLDER RANK WORLD_SIZE HANG_TIMEOUT_S STEPS [MODE:RANK]

MODE: what rank RANK does in its third step: `sleeps` (in Python), `holds` (in C, with the
interpreter's lock), `leaves`, or `collective` (sleeps while the others are in one); `long`: all
ranks take longer than the timeout and say so.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

from nemo_selfpref.monitor.heartbeat import Heart, mark, phase

STEP = 3


def sleeps_in_python(seconds: float) -> None:
    time.sleep(seconds)


def holds_the_lock(seconds: int) -> None:
    ctypes.PyDLL(None).sleep(seconds)


def meet_the_others(folder: Path, step: int, rank: int, world_size: int) -> None:
    (folder / f"{step}-{rank}").touch()
    while not all((folder / f"{step}-{other}").exists() for other in range(world_size)):
        time.sleep(0.01)


def work(folder: Path, rank: int, world_size: int, timeout_s: float, mode: str) -> bool:
    """What goes wrong in the third step; whether to leave the run."""
    if mode == f"sleeps:{rank}":
        sleeps_in_python(3600)
    elif mode == f"holds:{rank}":
        holds_the_lock(3600)
    elif mode == f"collective:{rank}":
        sleeps_in_python(3600)
    elif mode.startswith("collective"):
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.zeros(1))
    elif mode.startswith("long"):
        with phase("a long one", 100 * timeout_s):
            sleeps_in_python(2 * timeout_s)
    return mode == f"leaves:{rank}"


def run(folder: Path, rank: int, world_size: int, timeout_s: float, steps: int, mode: str) -> None:
    for step in range(steps):
        mark(f"step {step}")
        time.sleep(0.05)
        if step == STEP and work(folder, rank, world_size, timeout_s, mode):
            return
        mark(f"end of step {step}")
        meet_the_others(folder, step, rank, world_size)


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main() -> None:
    folder, rank, world_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    timeout_s, steps, mode = float(sys.argv[4]), int(sys.argv[5]), sys.argv[6]
    if mode.startswith("collective"):
        import torch.distributed as dist

        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    heart = Heart(
        folder / "heartbeat",
        "launch",
        rank=rank,
        world_size=world_size,
        every_s=timeout_s / 20,
        slow_after_s=timeout_s / 4,
        hang_timeout_s=timeout_s,
        say=say,
    )
    with heart:
        run(folder, rank, world_size, timeout_s, steps, mode)


if __name__ == "__main__":
    main()
