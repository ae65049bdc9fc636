"""Runs the plan: one process a check, one file of results a check, and a summary."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.job import ROOT, Job
from benchmarks.gpu_check.plan import Check, missing
from benchmarks.gpu_check.report import status_of, write

_LOG_LINES = 15
_PROBE_SECONDS = 120


@dataclass(frozen=True)
class Options:
    out: Path
    toy: bool = False
    budget: float = 540.0
    trl_python: str = sys.executable


@dataclass
class Planned:
    """A check, and why it is left out; empty where it runs."""

    check: Check
    why: str = ""


@dataclass
class Outcome:
    """How a check ended; found is what its process wrote."""

    check: Check
    status: str
    seconds: float = 0.0
    why: str = ""
    found: dict[str, Any] = field(default_factory=dict)


def environment(toy: bool) -> dict[str, str]:
    """Of the checks' processes: this checkout importable, nothing fetched."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    if toy:
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1")}
    return env


def probe(toy: bool) -> dict[str, str]:
    """What is absent here, by name, and why."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.probe"]
    try:
        done = subprocess.run(
            command,
            env=environment(toy),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
        )
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        why = "looking for it crashed or hung"
        return dict.fromkeys(("cuda", "te"), why)


def planned(
    checks: Sequence[Check], lacks: dict[str, str], toy: bool, budget: float
) -> list[Planned]:
    """Which checks run: those that can, as long as their estimates fit the budget."""
    found, total = [], 0.0
    for check in checks:
        why = missing(check, lacks, toy)
        if not why and total + check.seconds > budget:
            why = f"over budget: {total:.0f} s before it, {budget:.0f} s in all"
        total += 0 if why else check.seconds
        found.append(Planned(check, why))
    return found


def run_all(
    plan: Sequence[Planned], options: Options, tell: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """Run the plan; every outcome is on disk before the next check begins."""
    started, outcomes = time.monotonic(), []
    for item in plan:
        left = options.budget - (time.monotonic() - started)
        why = item.why
        if not why and item.check.seconds > left:
            why = f"over budget: {left:.0f} s left"
        if why:
            outcome = Outcome(item.check, "skip", why=why)
        else:
            outcome = run_one(item.check, options, min(item.check.limit, left))
        outcomes.append(outcome)
        _write_summary(outcomes, options, time.monotonic() - started)
        tell(outcome)
    return outcomes


def run_one(check: Check, options: Options, limit: float) -> Outcome:
    folder = options.out / check.name
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as scratch:
        write(folder / "job.json", asdict(_job(check, options, scratch)))
        ending = _watch(folder, environment(options.toy), limit)
    seconds = time.monotonic() - started
    try:
        found = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {"state": "running"}
    if found["state"] == "running":
        found |= {"state": "error", "why": f"{ending}; {_tail(folder / 'log.txt')}"}
    status = status_of(found, check.correctness)
    return Outcome(check, status, seconds, found.get("why", ""), found)


def _job(check: Check, options: Options, scratch: str) -> Job:
    return Job(check.function, options.toy, scratch, options.trl_python)


def _watch(folder: Path, env: dict[str, str], limit: float) -> str:
    """Run a check's process, and end it and its children at the limit."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.job"]
    command += [str((folder / name).resolve()) for name in ("job.json", "result.json")]
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        child = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            return f"exit status {child.wait(timeout=limit)}"
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the session that the child began; it may be gone already."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_LOG_LINES:])


def _write_summary(outcomes: Sequence[Outcome], options: Options, seconds: float) -> None:
    rows = {
        o.check.name: {
            "status": o.status,
            "seconds": o.seconds,
            "estimate": o.check.seconds,
            "why": o.why,
            **{k: o.found[k] for k in ("measured", "bars", "skipped", "notes") if k in o.found},
        }
        for o in outcomes
    }
    facts = {"toy": options.toy, "budget": options.budget, "seconds": seconds}
    write(options.out / "summary.json", {**facts, "failed": exit_status(outcomes), "checks": rows})


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """1 where something is wrong; a bar that was missed is no fault."""
    return int(any(outcome.status == "fail" for outcome in outcomes))
