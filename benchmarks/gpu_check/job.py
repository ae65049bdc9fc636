"""What a check is told, and the entry point of its process.

python -m benchmarks.gpu_check.job job.json result.json
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.report import Report, Skip

ROOT = Path(__file__).resolve().parents[2]
_OWN = ("nemo_selfpref", "benchmarks", "tests")


@dataclass(frozen=True)
class Job:
    """toy: at a tiny size, on the CPU. scratch: a folder that is deleted afterwards."""

    function: str
    toy: bool
    scratch: str
    trl_python: str

    @property
    def device(self) -> str:
        return "cpu" if self.toy else "cuda"

    def pick(self, full: Any, toy: Any) -> Any:
        return toy if self.toy else full


def module_in(folder: str, name: str) -> Any:
    """A module of a folder of this checkout that is no package."""
    path = str(ROOT / folder)
    if path not in sys.path:
        sys.path.append(path)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise FileNotFoundError(f"{folder}/{name}.py is missing") from error
        raise


def is_ours(error: ImportError) -> bool:
    """Whether what could not be imported is of this checkout: a fault, not a missing package."""
    return (error.name or "").split(".")[0] in _OWN


def run(job: Job, report: Report) -> None:
    """Call the check; whatever it raises ends up in the report."""
    try:
        module, name = job.function.split(":")
        getattr(importlib.import_module(module), name)(job, report)
    except Skip as reason:
        report.finish("skip", str(reason))
    except ImportError as error:
        traceback.print_exc()  # to the log: which import, of all there were
        report.finish("error" if is_ours(error) else "skip", f"{type(error).__name__}: {error}")
    except Exception as error:
        traceback.print_exc()
        report.finish("error", f"{type(error).__name__}: {error}"[:2000])
    else:
        report.finish("done")


def main() -> None:
    given, result = (Path(argument) for argument in sys.argv[1:3])
    job = Job(**json.loads(given.read_text(encoding="utf-8")))
    run(job, Report(result, graded=not job.toy))


if __name__ == "__main__":
    main()
