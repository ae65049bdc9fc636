from __future__ import annotations

import re

import pytest

from nemo_selfpref.monitor.console import SUMMARY_COLUMNS, Console, _cell, summary_rows
from nemo_selfpref.types import DropReport


def test_closing_table_by_hand() -> None:
    summary = [
        {"stage": "pairs", "kept": 90, "dropped": {"too_long": 3, "identical_pair": 7}},
        {"stage": "draft", "answers": 100, "generated_tokens": 1234, "seconds": 2.26},
        {"stage": "policy", "rows": 90, "steps": 12, "tokens": 5e4, "loss": 0.693147, "seconds": 1},
        {"stage": "targets", "answers": 200, "completion_tokens": 77},
    ]
    assert summary_rows(summary) == [
        ["pairs", 90, "identical_pair 7, too_long 3", "", "", "", ""],
        ["draft", 100, "", 1234, "", "", 2.3],
        ["policy", 90, "", 50000, 12, 0.6931, 1],
        ["targets", 200, "", 77, "", "", ""],
    ]
    assert all(len(row) == len(SUMMARY_COLUMNS) for row in summary_rows(summary))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (12345.6, "12,346"),
        (1234.5, "1,234"),
        ("x", "x"),
        ("", ""),
    ],
)
def test_cells(value: object, text: str) -> None:
    assert _cell(value) == text


def test_rows_and_skipped_stages_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    report = DropReport(kept=3)
    report.drop("too_long", "f:1")
    console.rows("pairs", report)
    console.skipped("draft")
    out = capsys.readouterr().out
    assert out == "pairs: 3 kept, dropped too_long: 1\ndraft: already done, read back\n"


def test_a_line_of_the_metrics_people_watch(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"loss": 0.693147, "grad_norm": 12.3456, "lr": 5e-7, "step": 3.0, "tokens": 99.0}
    Console().metrics("policy", 10, metrics)
    out = capsys.readouterr().out
    assert out == "policy step 3/10  loss 0.6931  grad_norm 12.35  lr 5e-07\n"


def test_progress_without_a_terminal_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().progress("draft", 5, "answers") as advance:
        advance(2, 30)
        advance(3, 70, loss=0.5)
    out = capsys.readouterr().out
    assert re.fullmatch(r"draft: 5 answers in [\d.]+ s, [\d,]+ tok/s\n", out)


def test_progress_without_tokens_names_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().progress("targets", 2, "answers") as advance:
        advance(2)
    assert re.fullmatch(r"targets: 2 answers in [\d.]+ s\n", capsys.readouterr().out)


def test_data_is_not_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Console().say("kept [red]3[/red] of [bold")
    assert capsys.readouterr().out == "kept [red]3[/red] of [bold\n"


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(enabled=False)
    console.say("x")
    console.rows("x", DropReport())
    console.metrics("x", 1, {"step": 1, "loss": 1.0})
    console.table("x", ["a"], [[1]])
    with console.progress("x", 1, "rows") as advance:
        advance(1, 1)
    assert capsys.readouterr().out == ""


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table("title", ["stage", "rows"], [["draft", 1234], ["policy", ""]])
    out = capsys.readouterr().out
    assert out.startswith("title")
    line = next(line for line in out.splitlines() if "draft" in line)
    assert re.search(r"draft\s+│\s+1,234", line)
