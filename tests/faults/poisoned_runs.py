"""Runs `selfpref` commands one after another in one process, with a method whose loss or gradient
is not finite on rows of one's choice.

    poisoned_runs.py COMMANDS.json OUTCOMES.json

COMMANDS: a list of argument lists; ["cut", RUN, COPY, STEP] copies a run as a kill after that step
would leave it. OUTCOMES: of each, its exit status and what it printed, on the first rank. Under
torchrun there can be one command only.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_selfpref import cli
from nemo_selfpref.algorithms.base import Algorithm, RunContext, register
from nemo_selfpref.algorithms.reference import ReferenceConfig, train_settings
from nemo_selfpref.objectives.objective import DPOObjective, Loss, PairLogps, Pass

IN_LOSS, IN_GRADIENT = 0.25, 0.5


@dataclass(frozen=True)
class PoisonedObjective(DPOObjective):
    """DPO over (strength - 1/4), infinite at 1/4; at 1/2 the gradient has 0 / 0 in it."""

    def __call__(self, logps: Mapping[Pass, PairLogps], strength: Tensor) -> Loss:
        made = super().__call__(logps, strength)
        root = (logps[Pass.POLICY].chosen * (strength - IN_GRADIENT)).square().sqrt()
        return replace(made, loss=made.loss / (strength - IN_LOSS) + 0 * root)


@dataclass
class PoisonedConfig(ReferenceConfig):
    name: str = "poisoned"
    loss_rows: list[str] = field(default_factory=list)
    gradient_rows: list[str] = field(default_factory=list)


@register("poisoned")
class Poisoned(Algorithm):
    summary = "DPO whose numbers are not finite on some rows"
    paper = "-"
    config_class = PoisonedConfig

    def run(self, run: RunContext) -> None:
        at = dict.fromkeys(self.config.loss_rows, IN_LOSS)
        at |= dict.fromkeys(self.config.gradient_rows, IN_GRADIENT)
        pairs = [replace(p, strength=at.get(p.id, 1.0)) for p in run.preferences()]
        run.train("policy", pairs, PoisonedObjective(0.1), train_settings(self.config))


def cut(run: Path, copy: Path, step: int) -> None:
    shutil.copytree(run, copy)
    (stage,) = (path.parent for path in copy.glob("stages/*/metrics.jsonl"))
    for path in (stage / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(stage / "weights")
    shutil.rmtree(copy / "checkpoint")
    (stage / "done.json").unlink()
    (copy / "summary.json").unlink()


def carry_out(arguments: list[str]) -> dict[str, Any]:
    if arguments[0] == "cut":
        cut(Path(arguments[1]), Path(arguments[2]), int(arguments[3]))
        return {"status": 0, "said": ""}
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = cli.main(arguments)
    return {"status": status, "said": said.getvalue()}


def main() -> None:
    commands, outcomes = Path(sys.argv[1]), Path(sys.argv[2])
    done = [carry_out(arguments) for arguments in json.loads(commands.read_text(encoding="utf-8"))]
    if os.environ.get("RANK", "0") == "0":
        outcomes.write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    main()
