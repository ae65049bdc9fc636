"""The external LLM of SGPO step 1: what it is asked, and answers that it gave elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nemo_selfpref.errors import DataError, RolloutError
from nemo_selfpref.rollout.answer_cache import clean, rows


@dataclass(frozen=True)
class TeacherRequest:
    id: str
    prompt: str


class Teacher(Protocol):
    def answer(
        self, requests: Sequence[TeacherRequest], on_done: Callable[[int], None] | None = None
    ) -> dict[str, str]:
        """Answers by request id, "" where the LLM refused or said nothing.

        `on_done` is called in the calling thread with the number of requests answered so far.

        Raises:
            RolloutError: two requests share an id, or one cannot be answered.
        """
        ...


def write_requests(path: str | Path, requests: Sequence[TeacherRequest]) -> None:
    """Write {"id", "prompt"} rows for an LLM that is run elsewhere; all of the file or nothing.

    Raises:
        RolloutError: two requests share an id, or the file cannot be written.
    """
    check_ids(requests)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for request in requests:
                file.write(json.dumps({"id": request.id, "prompt": request.prompt}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise RolloutError(
            f"{path}: cannot be written ({error.strerror}); choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


class FileTeacher:
    """Answers from a JSONL file of {"id", "answer"} rows. A file that does not exist yet holds
    none: the run that asks has written its questions by then.

    Raises:
        DataError: the file cannot be read, a row is malformed or an id occurs twice.
    """

    def __init__(self, path: str | Path) -> None:
        self._path, self._answers = path, dict[str, str]()
        try:
            data = Path(path).read_bytes() if Path(path).exists() else b""
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
        for number, row in rows(path, data, ("id", "answer")):
            if row["id"] in self._answers:
                raise DataError(f"{path}:{number}: id {row['id']!r} occurs twice; keep one answer")
            self._answers[row["id"]] = clean(row["answer"])

    def answer(
        self, requests: Sequence[TeacherRequest], on_done: Callable[[int], None] | None = None
    ) -> dict[str, str]:
        check_ids(requests)
        missing = [request.id for request in requests if request.id not in self._answers]
        if missing:
            raise RolloutError(
                f"{self._path}: no answer to {len(missing)} of {len(requests)} requests, the first "
                f"{', '.join(missing[:3])}; run the request file through the LLM and add a row "
                '{"id": ..., "answer": ...} for each'
            )
        if on_done:
            on_done(len(requests))
        return {request.id: self._answers[request.id] for request in requests}


def check_ids(requests: Sequence[TeacherRequest]) -> None:
    seen: set[str] = set()
    for request in requests:
        if request.id in seen:
            raise RolloutError(f"two teacher requests share the id {request.id!r}; ids are unique")
        seen.add(request.id)
