"""What a rank tells of itself every few seconds, and the folder where all ranks of a launch do.

    RUN/heartbeat/LAUNCH/rank-00003.json   the rank's newest beat
    RUN/heartbeat/LAUNCH/hang.json         who stood still, where that was found
    RUN/heartbeat/LAUNCH/stacks/rank-00003.txt  all its threads then

Files and not the process group's store: they work whichever rank hangs, and people can read them.
Each launch has a folder of its own, so what an earlier one left is never taken for a rank of now.
"""

from __future__ import annotations

import faulthandler
import json
import os
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_FRAMES = 16
_WAITS_FOR_OTHERS = ("/torch/distributed/", "/megatron/core/pipeline_parallel/p2p_communication")
"""Files whose code, where it is the innermost, waits for other ranks."""
_STATES = {
    "T": "the process is stopped (SIGSTOP)",
    "t": "the process is stopped by a debugger",
    "D": "the process waits for a disk or a network file system",
    "Z": "the process has ended",
    "X": "the process has ended",
}


@dataclass(frozen=True)
class Beat:
    """A rank as it was at its beat `number`.

    marks: how often it came to a place that every rank comes to; ticks: what it did in between.
    still_s: seconds since either last rose. timeout_s: how long its phase may take, where that
    differs from the rule. waiting: whether its main thread waits for other ranks. frames: that
    thread's stack, innermost first. time: seconds since 1970, for people only.
    """

    rank: int
    host: str
    pid: int
    time: float
    number: int
    marks: int
    ticks: int
    phase: str
    timeout_s: float | None
    still_s: float
    waiting: bool
    frames: tuple[str, ...]

    @classmethod
    def of_json(cls, text: str) -> Beat:
        value = json.loads(text)
        return cls(**{**value, "frames": tuple(value["frames"])})


def main_frames() -> tuple[str, ...]:
    """The main thread's stack, innermost first. Reads no source file: those may be what hangs."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = list(traceback.walk_stack(frame))[:_FRAMES] if frame is not None else []
    return tuple(f"{f.f_code.co_filename}:{line} {f.f_code.co_name}" for f, line in stack)


def waits_for_others(frames: tuple[str, ...]) -> bool:
    return bool(frames) and any(part in frames[0] for part in _WAITS_FOR_OTHERS)


def process_state(beat: Beat, host: str) -> str:
    """What the system says of a process that does not beat; "" where it cannot be asked."""
    if beat.host != host or not Path("/proc/self/stat").exists():
        return ""
    try:
        stat = Path(f"/proc/{beat.pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "the process is gone"
    return _STATES.get(stat.rpartition(")")[2].split()[0], "")


def new_launch() -> str:
    """A name for one start of a run; names sort by time. One rank's is everybody's."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"


class BeatFolder:
    """The beats of one launch.

    Every method raises OSError where the file system fails, and may wait as long as that does.
    """

    def __init__(self, root: Path, launch: str) -> None:
        self.root, self.path = root, root / launch
        self.stacks, self.report = self.path / "stacks", self.path / "hang.json"

    def open(self, rank: int) -> None:
        """Ready for this rank's beats. The first rank drops those of launches that ended without
        doing so themselves; their reports stay."""
        self.path.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            for old in sorted(self.root.iterdir()):
                if old != self.path and old.is_dir():
                    for file in (*old.glob("rank-*.json"), *old.glob(".*.tmp")):
                        file.unlink(missing_ok=True)
                    _remove_if_empty(old)

    def write(self, beat: Beat) -> None:
        """Replace the rank's beat at once. Not flushed: it need not survive the machine."""
        _replace(self._file(beat.rank), json.dumps(asdict(beat), indent=1))

    def read(self, rank: int) -> Beat | None:
        """A rank's newest beat; None where there is none, or no more."""
        try:
            return Beat.of_json(self._file(rank).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise OSError(f"{self._file(rank)} is no heartbeat: {error}") from error

    def leave(self, rank: int) -> None:
        """This rank ends as it should; the last one leaves nothing but reports."""
        self._file(rank).unlink(missing_ok=True)
        if self.path.is_dir() and _remove_if_empty(self.path):
            _remove_if_empty(self.root)

    def tell(self, rank: int, facts: Mapping[str, Any]) -> bool:
        """Write the report of a hang; False where another rank was first."""
        try:
            with open(self.report, "x", encoding="utf-8") as handle:
                handle.write(json.dumps({"found_by": rank, **facts}, indent=2) + "\n")
        except FileExistsError:
            return False
        return True

    def dump_stacks(self, rank: int) -> None:
        """All threads of this process, for the report."""
        self.stacks.mkdir(exist_ok=True)
        target = self.stacks / f"rank-{rank:05d}.txt"
        unfinished = target.with_suffix(".tmp")
        with open(unfinished, "w", encoding="utf-8") as handle:
            faulthandler.dump_traceback(handle, all_threads=True)
        os.replace(unfinished, target)

    def has_stacks(self, rank: int) -> bool:
        return (self.stacks / f"rank-{rank:05d}.txt").exists()

    def _file(self, rank: int) -> Path:
        return self.path / f"rank-{rank:05d}.json"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _remove_if_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False  # a report is in it, or another rank still beats
    return True
