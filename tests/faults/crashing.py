"""Processes that die at one chosen change to the disk.

A forked child does something while every call that changes the disk is counted; other children
then die right before, right after or in the middle of one of those calls.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

DIED = 9
_DEADLINE_S = 60
_CALLS = ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink")
_WRITES = ("write", "save_file", "write_table")
"""Calls that can also die when half of their bytes are in the file."""


class Moment(StrEnum):
    BEFORE = "before"
    HALF = "half"
    AFTER = "after"


@dataclass(frozen=True)
class Death:
    call: int
    """Which of the counted calls, from 0."""
    moment: Moment


@dataclass(frozen=True)
class Call:
    """One change to the disk. `target`: the new name, of a renaming."""

    name: str
    path: str
    target: str = ""


class Disk:
    """Stands between this process and the files below `root`. There is no way back."""

    def __init__(self, root: Path, death: Death | None) -> None:
        self.root, self.death, self.calls = str(root), death, list[Call]()

    def install(self) -> None:
        for name in _CALLS:
            setattr(os, name, self._around(name, getattr(os, name)))
        self._plain_open = builtins.open
        builtins.open = io.open = self._open  # type: ignore[assignment]
        pq.write_table = self._file_writer("write_table", pq.write_table)  # type: ignore[assignment]
        for name, module in list(sys.modules.items()):
            if name.startswith("nemo_selfpref.") and hasattr(module, "save_file"):
                module.save_file = self._file_writer("save_file", module.save_file)  # type: ignore[attr-defined]

    def count(self, call: Call, act: Callable[[], Any], half: Callable[[], Any]) -> Any:
        """Do `act`, unless this is the call to die at; `half` does a part of it."""
        number = len(self.calls)
        self.calls.append(call)
        moment = self.death.moment if self.death and self.death.call == number else None
        if moment is Moment.BEFORE:
            os._exit(DIED)
        if moment is Moment.HALF:
            half()
            os._exit(DIED)
        try:
            return act()
        finally:
            if moment is Moment.AFTER:
                os._exit(DIED)

    def _around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, *more: Any, **named: Any) -> Any:
            where = _name_of(path, named.get("dir_fd"))
            if not where.startswith(self.root):
                return real(path, *more, **named)
            target = str(more[0]) if name in ("replace", "rename") else ""
            call = Call(name, where, target)
            if name == "fsync":  # a process that dies loses nothing by it; it would take long
                return self.count(call, lambda: None, lambda: None)
            return self.count(call, lambda: real(path, *more, **named), lambda: None)

        return counted

    def _file_writer(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """A function (content, path, ...) that writes a whole file."""

        def counted(content: Any, path: Any, *more: Any, **named: Any) -> Any:
            def half() -> None:
                real(content, path, *more, **named)
                os.truncate(path, os.path.getsize(path) // 2)

            def whole() -> Any:
                return real(content, path, *more, **named)

            return self.count(Call(name, str(path)), whole, half)

        return counted

    def _open(self, file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        ours = not isinstance(file, int) and str(file).startswith(self.root)
        if not ours or not set(mode) & set("wax+"):
            return self._plain_open(file, mode, *more, **named)
        call = Call("open", str(file))
        handle = self.count(
            call, lambda: self._plain_open(file, mode, *more, **named), lambda: None
        )
        return _Handle(handle, self, str(file))


class _Handle:
    """A file open for writing whose writes are counted."""

    def __init__(self, handle: Any, disk: Disk, path: str) -> None:
        self._handle, self._disk, self._path = handle, disk, path

    def write(self, data: Any) -> int:
        def part(content: Any) -> int:
            written = self._handle.write(content)
            self._handle.flush()
            return written

        half = data[: len(data) // 2]
        return self._disk.count(Call("write", self._path), lambda: part(data), lambda: part(half))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()


def _name_of(path: Any, folder: int | None) -> str:
    if isinstance(path, int):
        return os.readlink(f"/proc/self/fd/{path}")
    if folder is not None:
        return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
    return str(path)


def in_child(act: Callable[[], None], root: Path, death: Death | None = None) -> list[Call]:
    """Do `act` in a forked child. Returns the calls it made; with `death`, makes sure it died."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        _live(act, root, death, write)
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        told = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (DIED if death else 0), (status, death, told)
    return [Call(**call) for call in json.loads(told)] if not death else []


def _live(act: Callable[[], None], root: Path, death: Death | None, write: int) -> None:
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_DEADLINE_S)
        disk = Disk(root, death)
        disk.install()
        act()
        os.write(write, json.dumps([vars(call) for call in disk.calls]).encode())
        status = 0
    except BaseException:
        os.write(write, traceback.format_exc().encode())
    finally:
        os._exit(status)


def deaths(calls: Sequence[Call]) -> Iterator[Death]:
    """Every moment at which a process that makes these calls can die."""
    for number, call in enumerate(calls):
        yield Death(number, Moment.BEFORE)
        if call.name in _WRITES:
            yield Death(number, Moment.HALF)
        yield Death(number, Moment.AFTER)


@dataclass(frozen=True)
class Story:
    """Something that changes the disk.

    before: the folder as it is at first. act: does it in a copy of that folder. after: what a later
    start finds there, "old" or "new"; raises where it is neither.
    """

    name: str
    before: Path
    act: Callable[[Path], None]
    after: Callable[[Path], str]


@dataclass(frozen=True)
class Outcome:
    calls: Counter[str]
    deaths: int
    found: Counter[str]

    def row(self, name: str) -> str:
        calls = ", ".join(f"{count} {call}" for call, count in sorted(self.calls.items()))
        found = ", ".join(f"{count} {what}" for what, count in sorted(self.found.items()))
        total = sum(self.calls.values())
        return f"{name:34} {total:4} calls ({calls}); {self.deaths} deaths: {found}"


def die_everywhere(story: Story, scratch: Path, most: int | None = None) -> Outcome:
    """Let children die at every moment of a story, or at `most` of them evenly spread.

    Args:
        scratch: an empty folder for copies.
    """

    def fresh() -> Path:
        shutil.rmtree(scratch / "copy", ignore_errors=True)
        return Path(shutil.copytree(story.before, scratch / "copy"))

    copy = fresh()
    calls = in_child(lambda: story.act(copy), copy)
    assert story.after(copy) == "new", f"{story.name}: undisturbed, it must come to its end"
    chosen = list(deaths(calls))
    if most is not None and len(chosen) > most:
        chosen = [chosen[number * (len(chosen) - 1) // (most - 1)] for number in range(most)]
    found: Counter[str] = Counter()
    for death in chosen:
        copy = fresh()
        in_child(lambda copy=copy: story.act(copy), copy, death)
        try:
            found[story.after(copy)] += 1
        except Exception as error:
            raise AssertionError(f"{story.name}: died {death} at {calls[death.call]}") from error
    return Outcome(Counter(call.name for call in calls), len(chosen), found)


def unflushed(calls: Sequence[Call]) -> list[str]:
    """What a power cut could take of a story that ended: names given before their content was on
    the disk, and names whose folder was not flushed after."""
    written: dict[str, bool] = {}
    lost, named = list[str](), dict[str, bool]()
    for call in calls:
        if call.name in ("open", "mkdir", *_WRITES):
            written[call.path] = False
        elif call.name == "fsync":
            written[call.path] = True
            named = {
                name: done or os.path.dirname(name) == call.path for name, done in named.items()
            }
        elif call.name in ("rename", "replace"):
            inside = [p for p in written if p == call.path or p.startswith(f"{call.path}/")]
            if not os.path.basename(call.target).startswith("."):
                lost += [f"{p} was named unflushed" for p in inside if not written[p]]
                named[call.target] = False
            for path in inside:
                written[call.target + path[len(call.path) :]] = written.pop(path)
        elif call.name in ("unlink", "rmdir"):
            written.pop(call.path, None)
    return lost + [
        f"{name}: {os.path.dirname(name)} not flushed" for name, d in named.items() if not d
    ]
