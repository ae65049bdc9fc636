"""Tables on the terminal: rich where it is installed, plain text where not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_check.runner import Outcome, Planned

_LOG_WIDTH = 130
_STYLES = {"pass": "green", "miss": "yellow", "skip": "dim", "fail": "bold red", "error": "red"}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _plain_table(title, columns, rows)
        return
    made = Table(*columns, title=title, title_justify="left")
    for row in rows:
        # Text, since a reason may hold square brackets.
        made.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    # A log has no width of its own; eighty columns would make it twice as long.
    Console(width=None if sys.stdout.isatty() else _LOG_WIDTH).print(made)


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [list(columns), *([cell.split("\n")[0] for cell in row] for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    print(title)
    for line in lines:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def show_plan(plan: Sequence[Planned], budget: float) -> None:
    """The plan, its total, and what is left out and why."""
    rows = [
        [p.check.name, f"{p.check.seconds:.0f}", p.check.about, p.why and f"skip: {p.why}"]
        for p in plan
    ]
    table("GPU check: the plan", ("check", "s", "what", "here"), rows)
    every = sum(p.check.seconds for p in plan)
    here = sum(p.check.seconds for p in plan if not p.why)
    print(f"total {every:.0f} s; here {here:.0f} s; budget {budget:.0f} s")


def show_outcomes(outcomes: Sequence[Outcome]) -> None:
    """One row a bar, then what was measured and what was left out."""
    rows = [row for outcome in outcomes for row in _rows(outcome)]
    table("GPU check", ("check", "status", "what", "value", "bar", "aim"), rows)
    for outcome in outcomes:
        for name, value in outcome.found.get("measured", {}).items():
            print(f"{outcome.check.name}: {name}: {_words(value)}")
        for note in outcome.found.get("notes", []):
            print(f"{outcome.check.name}: {note}")


def _rows(outcome: Outcome) -> list[list[str]]:
    name = outcome.check.name
    why = outcome.why.split("\n")[0]
    rows = [[name, outcome.status, why or f"{outcome.seconds:.0f} s", "", "", ""]]
    for bar in outcome.found.get("bars", []):
        met = {True: "pass", False: "miss", None: "not graded"}[bar["met"]]
        if bar["correctness"] and met == "miss":
            met = "fail"
        cells = [_words(bar["value"]), _bounds(*bar["bounds"]), _words(bar["aim"])]
        rows.append(["", met, bar["name"], *cells])
    rows += [["", "skip", f"{part}: {why}", "", "", ""] for part, why in _skipped(outcome)]
    return rows


def _skipped(outcome: Outcome) -> list[tuple[str, str]]:
    return list(outcome.found.get("skipped", {}).items())


def _bounds(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{low:.6g} to {high:.6g}"
    if low is not None:
        return f">= {low:.6g}"
    return f"<= {high:.6g}" if high is not None else ""


def _words(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(map(_words, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
