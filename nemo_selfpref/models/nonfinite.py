"""What becomes of a step whose numbers are not finite: skipped and counted, or the end of the run.

The weights, the optimizer's state and every copy of the weights stay as they were before it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nemo_selfpref.errors import TrainingError
from nemo_selfpref.files import write_text
from nemo_selfpref.megatron.nonfinite import Fault, FaultKind
from nemo_selfpref.types import TrainingRow

_NAMED = 8
"""Rows, micro-batches and weights that a message names; the file has all."""
_WHAT = {
    FaultKind.WEIGHTS: "weights hold values that are not finite",
    FaultKind.PASSES: "log-probs that the loss compares with are not finite",
    FaultKind.LOSS: "the loss is not finite",
    FaultKind.GRADIENT: "the gradient is not finite",
}
_WAY_ON = {
    FaultKind.WEIGHTS: "Go on from a checkpoint of before they were so, with a lower learning rate",
    FaultKind.PASSES: "Look at those rows, and at the weights of the reference",
    FaultKind.LOSS: "Look at those rows, or lower the learning rate",
    FaultKind.GRADIENT: "Look at those rows, or lower the learning rate",
}


class NonFiniteSteps:
    """Counts a stage's steps that were not made, and says when there are too many.

    Weights that are not finite end the run at once: no later step can mend them.

    Args:
        halt: end the run at the first such step, instead of skipping it.
        most: how many steps in a row may be skipped; one more ends the run.
        path: file that gets a line for each such step; None writes none. One rank writes.
        say: tells people.
    """

    def __init__(
        self,
        halt: bool = False,
        most: int = 3,
        path: Path | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.halt, self.most, self.path, self._say = halt, most, path, say
        self.in_a_row = 0
        self.total = 0

    def begin(self, done: int) -> None:
        """The stage goes on after `done` steps: lines of later ones, and one cut short, go."""
        if self.path is None or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        kept = [line for line in lines if json.loads(line)["step"] <= done]
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Take back what `state` gave; nothing starts from 0."""
        self.in_a_row, self.total = state.get("in_a_row", 0), state.get("total", 0)

    def finite(self) -> None:
        """A step was made."""
        self.in_a_row = 0

    def skip(self, stage: str, step: int, fault: Fault, rows: Sequence[TrainingRow]) -> None:
        """Step `step`, counted from 1, of these rows is not made.

        Raises:
            TrainingError: the run ends, as set.
        """
        ends = self.halt or fault.kind is FaultKind.WEIGHTS or self.in_a_row >= self.most
        record = _record(step, fault, rows)
        self._write({**record, "action": "halt" if ends else "skip"})
        what = f"stage {stage}, step {step}: {_describe(record)}"
        if ends:
            raise TrainingError(f"{what} {self._farewell(fault.kind)}")
        self.in_a_row += 1
        self.total += 1
        self._say(
            f"warning: {what} The step is skipped, number {self.in_a_row} in a row of at most "
            f"{self.most} (trainer.max_nonfinite_steps); the weights are as before it."
        )

    def _farewell(self, kind: FaultKind) -> str:
        before = f"{self.in_a_row} steps in a row were skipped before. " if self.in_a_row else ""
        way_on = f"{_WAY_ON[kind]}; the same command goes on from the newest checkpoint."
        if self.halt and kind is not FaultKind.WEIGHTS:
            way_on += " trainer.nonfinite=skip leaves such steps out."
        elif self.in_a_row:
            way_on += f" trainer.max_nonfinite_steps={self.most} allows more where it is raised."
        return f"The weights are as before the step. {before}{way_on}"

    def _write(self, record: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record, allow_nan=False) + "\n")
            handle.flush()
            os.fsync(handle.fileno())


def _record(step: int, fault: Fault, rows: Sequence[TrainingRow]) -> dict[str, Any]:
    """A line of the file; rows by their ids."""
    return {
        "step": step,
        "kind": fault.kind.value,
        "rows": [rows[n].id for n in fault.rows],
        "micro_batches": [{"replica": r, "number": n} for r, n in fault.micro_batches],
        "passes": {name: [rows[n].id for n in numbers] for name, numbers in fault.passes},
        "tensors": list(fault.tensors),
        "ranks": list(fault.ranks),
    }


def _describe(record: Mapping[str, Any]) -> str:
    """One sentence of where it comes from."""
    at = [f"{b['number']} of replica {b['replica']}" for b in record["micro_batches"]]
    parts = {
        "weights": record["tensors"],
        "passes": list(record["passes"]),
        "rows": record["rows"],
        "micro-batches": at,
        "ranks": [str(rank) for rank in record["ranks"]],
    }
    named = "; ".join(f"{name}: {_some(found)}" for name, found in parts.items() if found)
    return f"{_WHAT[FaultKind(record['kind'])]} ({named or 'no row or micro-batch alone'})."


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def refuse_nonfinite(stage: str, scored: Mapping[str, Tensor], rows: Sequence[TrainingRow]) -> None:
    """Refuse log-probs scored before training, "pass.side" with a value a row, that are not finite.

    Raises:
        TrainingError: some are; the message names passes and rows.
    """
    wrong: dict[int, set[str]] = {}
    for name, values in scored.items():
        for row in (~values.isfinite()).nonzero()[:, 0].tolist():
            wrong.setdefault(row, set()).add(name.split(".")[0])
    if not wrong:
        return
    passes = ", ".join(sorted(set[str]().union(*wrong.values())))
    raise TrainingError(
        f"stage {stage}: log-probs scored before training are not finite (passes: {passes}; rows: "
        f"{_some([rows[n].id for n in sorted(wrong)])}); expected finite numbers. Look at those "
        "rows, and at the weights they were scored with. Nothing was trained."
    )
