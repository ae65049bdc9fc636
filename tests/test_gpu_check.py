"""The GPU check's plan and its runner, with checks of our own in the place of the real ones; and,
slow, the real ones at toy size."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # benchmarks/ is part of the checkout, not of the installed package
    sys.path.append(str(ROOT))
plan: Any = importlib.import_module("benchmarks.gpu_check.plan")
report: Any = importlib.import_module("benchmarks.gpu_check.report")
runner: Any = importlib.import_module("benchmarks.gpu_check.runner")
show: Any = importlib.import_module("benchmarks.gpu_check.show")

OWN_CHECKS = """
import time
from benchmarks.gpu_check.report import Skip

def good(job, report):
    report.measure("device", job.device)
    report.bar("speed", 2.0, at_least=1)

def slow(job, report):
    report.bar("speed", 0.5, at_least=1)

def wrong(job, report):
    report.bar("sum", float("nan"), at_most=1, correctness=True)

def crashes(job, report):
    report.measure("before", 1)
    raise ValueError("no good")

def hangs(job, report):
    report.measure("before", 1)
    time.sleep(600)

def absent(job, report):
    import a_package_that_nobody_has

def renamed(job, report):
    from nemo_selfpref.types import NoSuchThing

def skips(job, report):
    raise Skip("nothing here")
"""


def check(name: str, **more: Any) -> Any:
    return plan.Check(name, 5, f"own_checks:{name}", "", **{"needs": (), **more})


def run(tmp_path: Path, *checks: Any, **options: Any) -> dict[str, Any]:
    """Outcomes by name."""
    chosen = runner.Options(tmp_path / "out", **options)
    outcomes = runner.run_all([runner.Planned(c) for c in checks], chosen)
    return {o.check.name: o for o in outcomes} | {"exit": runner.exit_status(outcomes)}


@pytest.fixture(autouse=True)
def own_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_checks.py").write_text(OWN_CHECKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_dry_run_lists_every_check_with_its_estimate_and_why_it_is_left_out() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for item in plan.CHECKS:
        row = next(line for line in lines if f" {item.name} " in line)
        assert f" {item.seconds:.0f} " in row
        if "cuda" in item.needs and "no CUDA device" in done.stdout:
            assert "skip: cuda" in row
    total = sum(item.seconds for item in plan.CHECKS)
    assert f"total {total:.0f} s" in done.stdout
    assert total <= 540


def test_what_is_missing_is_named() -> None:
    lacks = {"cuda": "none answers", "trl": "not here"}
    found = {c.name: plan.missing(c, lacks, toy=False) for c in plan.CHECKS}
    assert found["versions"] == "" and found["decode"] == "cuda: none answers"
    toy = {c.name: plan.missing(c, lacks, toy=True) for c in plan.CHECKS}
    assert [name for name, why in toy.items() if why] == ["fp8-linear"]


def test_later_checks_that_do_not_fit_are_left_out() -> None:
    made = runner.planned([check("good"), check("slow"), check("skips")], {}, False, 11)
    assert [bool(p.why) for p in made] == [False, False, True]
    assert "over budget" in made[2].why


def test_a_fault_gives_status_1_and_the_others_still_run(tmp_path: Path) -> None:
    found = run(tmp_path, check("wrong"), check("good"))
    assert (found["wrong"].status, found["good"].status, found["exit"]) == ("fail", "pass", 1)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["checks"]["wrong"]["bars"][0]["value"] == "nan"
    assert summary["checks"]["good"]["measured"] == {"device": "cuda"}
    assert summary["failed"] == 1
    show.show_outcomes([found["wrong"], found["good"]])


def test_neither_a_missed_bar_nor_a_broken_benchmark_is_a_fault(tmp_path: Path) -> None:
    found = run(tmp_path, check("slow"), check("crashes"), check("renamed"))
    assert [found[n].status for n in ("slow", "crashes", "renamed")] == ["miss", "error", "error"]
    assert found["exit"] == 0
    assert "no good" in found["crashes"].why and "NoSuchThing" in found["renamed"].why
    result = json.loads((tmp_path / "out" / "crashes" / "result.json").read_text())
    assert result["measured"] == {"before": 1}


def test_a_correctness_check_that_crashes_is_a_fault(tmp_path: Path) -> None:
    found = run(tmp_path, check("crashes", correctness=True))
    assert (found["crashes"].status, found["exit"]) == ("fail", 1)


def test_an_absent_package_is_skipped_with_its_name(tmp_path: Path) -> None:
    found = run(tmp_path, check("absent", correctness=True), check("skips"))
    assert found["absent"].status == found["skips"].status == "skip"
    assert "a_package_that_nobody_has" in found["absent"].why
    assert (found["skips"].why, found["exit"]) == ("nothing here", 0)


def test_a_check_that_hangs_is_stopped_and_keeps_what_it_found(tmp_path: Path) -> None:
    outcome = runner.run_one(check("hangs"), runner.Options(tmp_path / "out"), limit=4)
    assert outcome.status == "error" and "stopped after 4 s" in outcome.why
    assert outcome.found["measured"] == {"before": 1}


def test_speeds_at_toy_size_are_not_graded(tmp_path: Path) -> None:
    found = run(tmp_path, check("slow"), check("wrong"), toy=True)
    assert (found["slow"].status, found["wrong"].status) == ("pass", "fail")


def test_plain_table_where_rich_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    show.table("Title", ("a", "b"), [["1", "longer\nand more"], ["22", ""]])
    assert capsys.readouterr().out.splitlines() == ["Title", "a   b", "1   longer", "22"]


@pytest.mark.slow
def test_every_check_that_a_cpu_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--toy", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    checks = json.loads((tmp_path / "summary.json").read_text())["checks"]
    found = {name: facts["status"] for name, facts in checks.items()}
    assert found.pop("fp8-linear") == "skip"
    assert set(found.values()) == {"pass"}, found
