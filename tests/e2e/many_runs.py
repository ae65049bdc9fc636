"""Runs one `selfpref` command after another in one process, or under torchrun in each of its
processes: importing NeMo takes far longer than training a tiny model.

    many_runs.py COMMANDS.json      a list of argument lists; ["cut", RUN, COPY] is another command

A command that fails alone (one process) does not keep the others from running.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

from megatron.core import parallel_state

from nemo_selfpref import cli
from nemo_selfpref.megatron import parallel


def cut(run: Path, copy: Path) -> None:
    """Copies a run as a kill after the first step of its last training stage would leave it."""
    shutil.copytree(run, copy)
    stage = max(path.parent for path in copy.glob("stages/*/metrics.jsonl"))
    for later in ("checkpoints/step-000002", "checkpoints/step-000003", "weights"):
        shutil.rmtree(stage / later)
    for later in ("done.json", "pairs/step-000002.parquet", "pairs/step-000003.parquet"):
        (stage / later).unlink(missing_ok=True)
    lines = (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (stage / "metrics.jsonl").write_text(lines[0], encoding="utf-8")
    shutil.rmtree(copy / "checkpoint")
    (copy / "summary.json").unlink()


def carry_out(arguments: list[str]) -> None:
    print("$", *arguments, flush=True)
    if arguments[0] == "cut":
        if os.environ.get("RANK", "0") == "0":
            cut(Path(arguments[1]), Path(arguments[2]))
        if "RANK" in os.environ:
            parallel.barrier()
    elif cli.main(arguments):
        raise RuntimeError("the command failed")


def main() -> None:
    together = "RANK" in os.environ
    if together:
        # A process group cannot be joined twice through one launcher; the layouts on it can be.
        parallel.shutdown = parallel_state.destroy_model_parallel
    for arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            carry_out(arguments)
        except Exception:
            if together:
                raise
            traceback.print_exc()


if __name__ == "__main__":
    main()
