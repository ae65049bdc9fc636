"""The tests' own worker on the GPU and, with the GPU hidden, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu_check.job import Job, module_in
from benchmarks.gpu_check.report import Report

# The bounds of the test that compares the same two.
_LOSS, _GRADIENT, _NORM = 1e-3, 5e-3, 5e-3


def worker(job: Job, report: Report) -> None:
    layouts = module_in("tests/distributed", "test_layouts")
    scratch = Path(job.scratch)
    model = module_in("tests", "tiny").save_llama(scratch / "llama")
    folders = scratch / "cpu" / layouts.ONE, scratch / job.device / "there" / layouts.ONE
    layouts.run(1, str(model), str(folders[0].parent), layouts.ONE)
    layouts.run(1, str(model), str(folders[1].parent), layouts.ONE, cuda=not job.toy)
    ours, theirs = (layouts.found(folder) for folder in folders)
    losses = {name: _apart(ours["losses"], theirs["losses"], name) for name in layouts.LOSSES}
    report.measure("loss, relative difference", losses)
    report.bar("losses, relative difference", max(losses.values()), at_most=_LOSS, correctness=True)
    gradients = {
        name: layouts.worst_difference(*(folder / f"grad-{name}" for folder in folders))
        for name in layouts.LOSSES
    }
    report.measure("gradient, largest difference", gradients)
    report.bar(
        "gradients, largest difference",
        max(gradients.values()),
        at_most=_GRADIENT,
        correctness=True,
    )
    norms = [abs(a - b) / abs(a) for a, b in zip(ours["norms"], theirs["norms"], strict=True)]
    report.bar("gradient norm, relative difference", max(norms), at_most=_NORM, correctness=True)


def _apart(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> float:
    a, b = ours[name]["loss"], theirs[name]["loss"]
    return abs(a - b) / max(abs(a), 1e-12)
