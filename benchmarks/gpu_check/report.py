"""What a check found, on disk after every number so that a process cut short loses nothing."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Skip(Exception):
    """What is to be checked is not there; the message says what."""


def write(path: Path, value: Any) -> None:
    """Replace `path` by JSON in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = json.dumps(_plain(value), indent=2, allow_nan=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN; they become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


class Report:
    """The measurements, bars and left-out parts of one check.

    graded: whether speeds count. At toy sizes they are shown, and no bar of theirs is met or
    missed.
    """

    def __init__(self, path: Path, graded: bool = True) -> None:
        self.path, self.graded = path, graded
        self.found: dict[str, Any] = {
            "state": "running",
            "measured": {},
            "bars": [],
            "skipped": {},
            "notes": [],
        }
        self._save()

    def _save(self) -> None:
        write(self.path, self.found)

    def measure(self, name: str, value: Any) -> None:
        self.found["measured"][name] = value
        self._save()

    def bar(
        self,
        name: str,
        value: float | None,
        *,
        at_least: float = -math.inf,
        at_most: float = math.inf,
        aim: float | None = None,
        correctness: bool = False,
    ) -> None:
        """A number that has to lie within bounds; None and NaN never do."""
        met = value is not None and at_least <= value <= at_most
        graded = self.graded or correctness
        bounds = [bound if math.isfinite(bound) else None for bound in (at_least, at_most)]
        self.found["bars"].append(
            {
                "name": name,
                "value": value,
                "bounds": bounds,
                "aim": aim,
                "correctness": correctness,
                "met": met if graded else None,
            }
        )
        self._save()

    def skip(self, part: str, why: str) -> None:
        """A part of the check that is left out."""
        self.found["skipped"][part] = why
        self._save()

    def note(self, text: str) -> None:
        self.found["notes"].append(text)
        self._save()

    def finish(self, state: str, why: str = "") -> None:
        """done, skip or error."""
        self.found |= {"state": state, "why": why}
        self._save()


def status_of(found: dict[str, Any], correctness: bool) -> str:
    """pass, miss, skip, error or fail; fail alone means that something is wrong."""
    bars: Sequence[dict[str, Any]] = found.get("bars", [])
    if any(bar["correctness"] and bar["met"] is False for bar in bars):
        return "fail"
    if found["state"] == "skip":
        return "skip"
    if found["state"] != "done":
        return "fail" if correctness else "error"
    if any(bar["met"] is False for bar in bars):
        return "miss"
    if found.get("skipped") and not bars and not found.get("measured"):
        return "skip"
    return "pass"
