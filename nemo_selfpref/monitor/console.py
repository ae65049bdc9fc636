"""What a run shows on the terminal: progress bars, a line now and then, a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from nemo_selfpref.monitor.heartbeat import tick
from nemo_selfpref.types import DropReport

_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "grad_norm", "lr")


class Console:
    """Terminal output of one process; only the first rank shows anything."""

    def __init__(self, enabled: bool = True, bars: bool = True) -> None:
        self.enabled, self.bars = enabled, bars
        width = None if sys.stdout.isatty() else 120
        self._rich = RichConsole(file=sys.stdout, highlight=False, emoji=False, width=width)

    def say(self, text: str) -> None:
        if self.enabled:
            self._rich.print(text, markup=False, soft_wrap=True)

    def rows(self, what: str, report: DropReport) -> None:
        """How many rows there are, and why others are not."""
        self.say(f"{what}: {report.summary()}")

    def skipped(self, stage: str) -> None:
        self.say(f"{stage}: already done, read back")

    def metrics(self, stage: str, num_steps: int, metrics: Mapping[str, float]) -> None:
        """A line of the metrics people watch."""
        if self.enabled and not (self.bars and self._rich.is_terminal):
            shown = "  ".join(f"{n} {metrics[n]:.4g}" for n in _SHOWN if n in metrics)
            self.say(f"{stage} step {int(metrics['step'])}/{num_steps}  {shown}")

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        """A progress bar; yields advance(count, tokens, loss=None)."""
        started, tokens, done = time.monotonic(), 0, 0
        visible = self.enabled and self.bars and self._rich.is_terminal
        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._rich,
            disable=not visible,
        )
        with bar:
            task = bar.add_task(what, total=total, note="")

            def advance(count: int, new_tokens: int = 0, loss: float | None = None) -> None:
                nonlocal tokens, done
                tick()
                tokens += new_tokens
                done += count
                rate = tokens / max(time.monotonic() - started, 1e-9)
                note = f"{rate:,.0f} tok/s" if tokens else ""
                note += f" loss {loss:.4f}" if loss is not None else ""
                bar.update(task, completed=min(done, total), note=note)

            yield advance
        if self.enabled and not visible:
            seconds = time.monotonic() - started
            rate = f", {tokens / max(seconds, 1e-9):,.0f} tok/s" if tokens else ""
            self.say(f"{what}: {done} {unit} in {seconds:.1f} s{rate}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; numbers are set to the right."""
        if not self.enabled:
            return
        table = Table(title=escape(title), title_justify="left")
        for index, column in enumerate(columns):
            numeric = all(isinstance(row[index], int | float) or row[index] == "" for row in rows)
            table.add_column(column, justify="right" if numeric and rows else "left")
        for row in rows:
            table.add_row(*(_cell(value) for value in row))
        self._rich.print(table)

    def details(self, summary: Sequence[Mapping[str, Any]]) -> None:
        """What was measured on the rollouts, and how replay went."""
        measured = [
            [facts["stage"], name, value]
            for facts in summary
            for name, value in facts.get("metrics", {}).items()
        ]
        if measured:
            self.table("Measured on the way (means)", ("stage", "metric", "value"), measured)
        for facts in summary:
            for title, bins in facts.get("histograms", {}).items():
                columns = (title.split(" (")[0], "count", "")
                self.table(f"{facts['stage']}: {title}", columns, histogram_rows(bins))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def summary_rows(summary: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The closing table's rows: stage, rows or answers, dropped, tokens, steps, loss, seconds. What
    a stage made on the way (its `reports`) follows it."""
    rows = []
    for facts in summary:
        made = facts.get("generated_tokens", facts.get("completion_tokens", facts.get("tokens", 0)))
        rows.append(
            [
                facts["stage"],
                facts.get("kept", facts.get("rows", facts.get("answers", ""))),
                _dropped(facts.get("dropped", {})),
                int(made) or "",
                facts.get("steps", ""),
                round(facts["loss"], 4) if "loss" in facts else "",
                round(facts["seconds"], 1) if "seconds" in facts else "",
            ]
        )
        for title, report in facts.get("reports", {}).items():
            name = f"{facts['stage']}: {title}"
            rows.append([name, report["kept"], _dropped(report["dropped"]), "", "", "", ""])
    return rows


def _dropped(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in sorted(dropped.items()))


def histogram_rows(bins: Mapping[str, int]) -> list[list[Any]]:
    """Bin, count and a bar of at most 40 blocks."""
    most = max(bins.values(), default=0) or 1
    return [[label, count, "#" * round(40 * count / most)] for label, count in bins.items()]


SUMMARY_COLUMNS = ("stage", "rows", "dropped", "tokens", "steps", "last loss", "seconds")
