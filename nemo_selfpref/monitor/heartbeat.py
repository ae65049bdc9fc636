"""A heart for each rank: tells every few seconds where the rank is, and ends a run that hangs.

A rank that is stopped, stuck in Python, in a collective or on a dead file system is named with its
host, process, phase and stack; then every rank ends with EXIT_HUNG, so that whoever started the run
can start it again. Code says where it is by `mark`, `tick` and `phase`, which cost a few attribute
writes and do nothing in a process without a heart.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from nemo_selfpref.errors import EXIT_HUNG
from nemo_selfpref.monitor.beats import Beat, BeatFolder, main_frames, waits_for_others
from nemo_selfpref.monitor.hangs import Hang, Watch


class _Pulse:
    """Where this process is."""

    __slots__ = ("marks", "phase", "ticks", "timeout_s")

    def __init__(self) -> None:
        self.phase = "starting"
        self.timeout_s: float | None = None
        self.marks = self.ticks = 0


_pulse: _Pulse | None = None
"""Of the heart that beats in this process; there is one at most."""


def mark(phase: str, timeout_s: float | None = None) -> None:
    """This rank came to `phase`, which every rank comes to.

    A rank with fewer marks than the others is the one they wait for, so what one rank does alone,
    or oftener than others, is a `tick`.

    Args:
        timeout_s: how long the phase may stand still, where that is longer than
            exp_manager.heartbeat.hang_timeout_s; it holds until the next mark.
    """
    pulse = _pulse
    if pulse is not None:
        pulse.phase, pulse.timeout_s = phase, timeout_s
        pulse.marks += 1


def tick() -> None:
    """This rank does something in the phase it is in, such as one more token."""
    pulse = _pulse
    if pulse is not None:
        pulse.ticks += 1


@contextmanager
def phase(name: str, timeout_s: float | None = None) -> Iterator[None]:
    """A phase within another, which goes on behind it. See mark."""
    pulse = _pulse
    outer = (pulse.phase, pulse.timeout_s) if pulse is not None else ("", None)
    mark(name, timeout_s)
    try:
        yield
    finally:
        mark(*outer)


class _Clock:
    """Seconds in which this process ran: a stopped process must not find the others late."""

    def __init__(self) -> None:
        self._lost = 0.0

    def now(self) -> float:
        return time.monotonic() - self._lost

    def lose(self, seconds: float) -> None:
        self._lost += seconds


class Heart:
    """Beats from `with` to its end, in two threads: one that touches files, and may hang with
    them, and one that judges, and never waits for either.

    Args:
        folder: RUN/heartbeat.
        launch: the same for all ranks of this start of the run (beats.new_launch).
        every_s: seconds between two beats.
        slow_after_s, hang_timeout_s: see hangs.Watch.
        say: shows a line to people.
    """

    def __init__(
        self,
        folder: Path,
        launch: str,
        *,
        rank: int,
        world_size: int,
        every_s: float,
        slow_after_s: float,
        hang_timeout_s: float,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.rank, self.every_s = BeatFolder(folder, launch), rank, every_s
        self.slow_after_s = slow_after_s
        self._say, self._host = say, platform.node()
        self._clock, self._pulse = _Clock(), _Pulse()
        self._number, self._moved, self._moved_at = 0, (0, 0), self._clock.now()
        self._watch = Watch(
            rank, world_size, self._host, slow_after_s, hang_timeout_s, self._clock.now()
        )
        self._stop, self._told, self._first = threading.Event(), threading.Event(), False
        self._troubled = False
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._judge, "heart-judge"), (self._beat, "heart-beat"))
        ]

    def __enter__(self) -> Heart:
        global _pulse
        assert _pulse is None, "one heart a process"
        _pulse = self._pulse
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        global _pulse
        _pulse = None
        self._stop.set()
        self._within(10 * self.every_s, self._leave)

    def _leave(self) -> None:
        self._threads[1].join()  # no beat may come after the file is gone
        try:
            self.folder.leave(self.rank)
        except OSError as error:
            self._say(f"heartbeat: {error}")

    # -- the thread that touches files --------------------------------------------------------

    def _beat(self) -> None:
        opened = False
        while True:
            try:
                if not opened:
                    self.folder.open(self.rank)
                    opened = True
                self._look()
                self._troubled = False
            except OSError as error:
                # On a full disk nobody is heard of, which says nothing about anybody.
                self._watch.restart(self._clock.now())
                if not self._troubled:
                    self._say(f"rank {self.rank} cannot keep its heartbeat, and goes on: {error}")
                self._troubled = True
            if self._stop.wait(self.every_s):
                return

    def _look(self) -> None:
        beat = self._now()
        try:
            self.folder.write(beat)
        finally:
            self._watch.see(self.rank, beat, self._clock.now())
        for rank in self._watch.seen:
            if rank != self.rank:
                try:
                    self._watch.see(rank, self.folder.read(rank), self._clock.now())
                except OSError as error:
                    if not self._troubled:
                        self._say(f"rank {self.rank} cannot read rank {rank}'s heartbeat: {error}")
        if self.folder.report.exists():
            self._told.set()

    def _now(self) -> Beat:
        pulse, now = self._pulse, self._clock.now()
        moved = (pulse.marks, pulse.ticks)
        if moved != self._moved:
            self._moved, self._moved_at = moved, now
        self._number += 1
        frames = main_frames()
        return Beat(
            rank=self.rank,
            host=self._host,
            pid=os.getpid(),
            time=time.time(),
            number=self._number,
            marks=moved[0],
            ticks=moved[1],
            phase=pulse.phase,
            timeout_s=pulse.timeout_s,
            still_s=now - self._moved_at,
            waiting=waits_for_others(frames),
            frames=frames,
        )

    # -- the thread that judges ---------------------------------------------------------------

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self.every_s):
            away = time.monotonic() - last - self.every_s
            last += away + self.every_s
            if away > self.slow_after_s:
                self._clock.lose(away)
            now = self._clock.now()
            hang = self._watch.find_hang(now)
            if hang is not None or self._told.is_set():
                self._end(hang, now)
            for line in self._watch.news(now):
                self._within(self.every_s, lambda line=line: self._say(line))

    def _end(self, hang: Hang | None, now: float) -> None:
        """Tell, and end this process: a rank that hangs cannot be asked to. Nothing here may wait
        for files or a terminal longer than a few beats."""

        def report() -> None:
            self.folder.dump_stacks(self.rank)
            if hang is not None:
                facts = {"time": time.time(), **hang.facts()}
                self._first = self.folder.tell(self.rank, facts)

        written = self._within(2 * self.every_s, report)
        if hang is not None and (self._first or not written):
            where = f"report: {self.folder.report}, stacks: {self.folder.stacks}"
            end = f"all ranks end now with exit status {EXIT_HUNG}; the same command goes on"
            self._within(self.every_s, lambda: self._say(f"{hang.message()}\n  {where}\n  {end}"))
            self._within(3 * self.every_s, lambda: self._await_stacks(now))
        os._exit(EXIT_HUNG)

    def _await_stacks(self, now: float) -> None:
        """The others look here once a beat; whoever started the run may end them with this one."""
        others = self._watch.beating(now)
        while not all(self.folder.has_stacks(rank) for rank in others):
            time.sleep(self.every_s / 10)

    def _within(self, seconds: float, work: Callable[[], None]) -> bool:
        """Do `work`, but not for longer; whether it came to its end."""
        done = threading.Event()

        def run() -> None:
            try:
                work()
                done.set()
            except OSError:
                pass  # a disk that is full or gone; what matters is said and done without it

        thread = threading.Thread(target=run, name="heart-work", daemon=True)
        thread.start()
        thread.join(seconds)
        return done.is_set()
