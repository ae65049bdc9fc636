"""Answers on disk: the endpoint's cache, and the JSONL rows it shares with files of answers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from nemo_selfpref.errors import ConfigError, DataError, RolloutError

_CACHE_START = b'{"key": "'


class AnswerCache:
    """Answers by key; with a path, each is appended to a JSONL file and synced before use."""

    FIELDS = ("key", "answer", "finish_reason")

    def __init__(self, path: str | None) -> None:
        self._path, self._lock = Path(path) if path else None, threading.Lock()
        self.rows: dict[str, dict[str, str]] = {}
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._path) as file:
                self._load(self._path, file)
        except OSError as error:
            raise ConfigError(
                f"cache_path {path}: cannot be used ({error.strerror}); give a writable file"
            ) from error

    def _load(self, path: Path, file: FileIO) -> None:
        data = file.readall()
        end = data.rfind(b"\n") + 1
        self.rows = {row["key"]: row for _, row in rows(path, data[:end], self.FIELDS)}
        torn = data[end:]
        if not (torn.startswith(_CACHE_START) or _CACHE_START.startswith(torn)):
            raise DataError(f"{path}: not an answer cache; give cache_path a file of its own")
        file.truncate(end)

    def put(self, key: str, row: dict[str, str]) -> None:
        line = json.dumps({"key": key, **row}).encode() + b"\n"
        with self._lock:
            try:
                if self._path:
                    self._append(self._path, line)
            except OSError as error:
                raise RolloutError(
                    f"{self._path}: an answer could not be saved ({error.strerror}); free some "
                    "space and run again"
                ) from error
            self.rows[key] = row

    @staticmethod
    def _append(path: Path, line: bytes) -> None:
        with _locked(path) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(line) != len(line):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[FileIO]:
    with path.open("a+b", buffering=0) as file:
        # Some cluster file systems have no locks; one run per cache is safe without.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


def rows(path: str | Path, data: bytes, fields: Sequence[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}:{number}: not JSON ({error}); mend or delete the line"
            ) from error
        for name in fields:
            if not isinstance(row, dict) or not isinstance(row.get(name), str):
                raise DataError(
                    f"{path}:{number}: no text under {name!r}; expected an object with text under "
                    f"{', '.join(fields)}: mend or delete the line"
                )
        yield number, row


def clean(answer: str) -> str:
    # JSON may carry half a surrogate pair, which no tokenizer takes.
    return answer.encode("utf-8", "replace").decode() if answer.strip() else ""
