"""What the benchmarks share: children with a time limit, versions, spreads, tables."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import read_json, write_json

_LOG_LINES = 25


class BenchmarkError(Exception):
    """The benchmark cannot go on, or what it measured cannot be compared."""


@dataclass(frozen=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def cells(self, digits: int = 2) -> tuple[str, str]:
        """Median, and range, for a table."""
        return f"{self.median:.{digits}f}", f"{self.min:.{digits}f}-{self.max:.{digits}f}"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Python's version and those of the installed packages."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the software."""
    cores = len(os.sched_getaffinity(0))
    return {"cores": cores, "cpu": _cpu_model()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def child_environment(threads: int, scratch: Path, **more: str) -> dict[str, str]:
    """Environment of a measured process: so many threads, no accelerator, nothing fetched, and no
    cache that an earlier run could have filled."""
    count = str(threads)
    own = {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(scratch / "hf"),
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
    }
    return {**os.environ, **own, **more}


def run_child(
    python: Path, script: Path, job: Mapping[str, Any], env: Mapping[str, str], limit: float
) -> dict[str, Any]:
    """Run `script job.json result.json` in the folder job["out"]; returns the result.

    Raises BenchmarkError with the end of its output if it fails or takes longer than `limit` s.
    """
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "job.json", dict(job))
    (out / "result.json").unlink(missing_ok=True)
    command = [str(python), str(script), str(out / "job.json"), str(out / "result.json")]
    load = os.getloadavg()[0]
    started = time.monotonic()
    with open(out / "log.txt", "w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, env=dict(env), stdout=log, stderr=log, timeout=limit, check=False
            )
            outcome = f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s; raise --limit"
        except OSError as error:
            raise BenchmarkError(f"{python} cannot be started: {error}") from error
    try:
        facts = {"process_seconds": time.monotonic() - started, "load_before": load}
        return {**read_json(out / "result.json"), **facts}
    except CheckpointError as error:
        tail = (out / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        shown = "\n".join(tail[-_LOG_LINES:])
        raise BenchmarkError(
            f"{script.name} gave no result ({outcome}); end of {out / 'log.txt'}:\n{shown}"
        ) from error
