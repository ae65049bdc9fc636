"""A step computed again beside its record."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_selfpref.errors import CheckpointError, ConfigError
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.training.inspect_facts import printable, recorded_rows
from nemo_selfpref.training.run_files import RunFiles
from nemo_selfpref.training.same_inputs import read_record
from nemo_selfpref.training.stage_files import check_stages
from nemo_selfpref.types import PreferencePair, TrainingRow

if TYPE_CHECKING:
    from nemo_selfpref.training.replay_run import Goal

_COLUMNS = ("metric", "recorded", "computed again", "")
_NOT_OF_THE_STEP = ("reference_cache/", "rollout/cached_tokens", "rollout/stale")
"""Metrics of what was at hand when the step was made."""


def comparison(goal: Goal, tolerance: float) -> dict[str, Any]:
    """The step's rows and metrics, recorded and computed again, and whether they are equal.

    tolerance: how far a metric may lie from its record, as a share of it, or of 1 if that is more;
    0 asks for the same bits.
    """
    recorded, again = goal.stage.measured(goal.step), goal.steps[-1]
    compared = _compared(recorded, again, goal.recorded, tolerance)
    rows = _rows(recorded_rows(goal.run, goal.stage, goal.step), goal.rows)
    fork = next(
        (
            int(step["step"])
            for step in goal.steps
            if not _same(goal.stage.measured(int(step["step"])), step, goal.recorded, tolerance)
        ),
        None,
    )
    good = all(m["equal"] for m in compared) and all(row["equal"] is not False for row in rows)
    return {
        "stage": goal.stage.folder.name,
        "step": goal.step,
        "from_step": goal.begun,
        "rows_from": _rows_from(goal),
        "rows": rows,
        "metrics": compared,
        "not_computed_again": sorted({*recorded} - {m["name"] for m in compared}),
        "first_step_that_differs": fork,
        "tolerance": tolerance,
        "damaged": _damage(goal.run),
        "equal": good,
    }


def _damage(run: RunFiles) -> str | None:
    """Files of the run that are not what they were when they were written."""
    try:
        read_record(run.path)
        check_stages(run.path)
    except (CheckpointError, ConfigError) as error:
        return str(error)
    return None


def _rows_from(goal: Goal) -> str:
    if goal.recorded:
        return "the pairs recorded"
    return "pairs sampled anew" if goal.stage.online else "the run's data and earlier stages"


def _compared(
    recorded: Mapping[str, float], again: Mapping[str, float], given: bool, tolerance: float
) -> list[dict[str, Any]]:
    """Every metric of both; given: the pairs were, so no sampling could be measured."""
    left_out = (*_NOT_OF_THE_STEP, *(("rollout/",) if given else ()))
    return [
        {
            "name": name,
            "recorded": recorded[name],
            "again": again[name],
            "difference": again[name] - recorded[name],
            "equal": _close(recorded[name], again[name], tolerance),
        }
        for name in recorded
        if name in again and not name.startswith(left_out)
    ]


def _same(
    recorded: Mapping[str, float], again: Mapping[str, float], given: bool, tolerance: float
) -> bool:
    return all(metric["equal"] for metric in _compared(recorded, again, given, tolerance))


def _close(recorded: float, again: float, tolerance: float) -> bool:
    if recorded == again or (recorded != recorded and again != again):
        return True
    return abs(again - recorded) <= tolerance * max(1.0, abs(recorded))


def _rows(
    recorded: Sequence[PreferencePair] | None, again: Sequence[TrainingRow]
) -> list[dict[str, Any]]:
    """The rows trained on; `equal` is None where no record says which they were."""
    if recorded is None:
        return [{"id": row.id, "equal": None} for row in again]
    before, now = [_content(row) for row in recorded], [_content(row) for row in again]
    ids = [row.id for row in again] + [row.id for row in recorded[len(again) :]]
    return [
        {"id": id, "equal": before[n : n + 1] == now[n : n + 1] != []} for n, id in enumerate(ids)
    ]


def _content(row: TrainingRow) -> tuple[Any, ...]:
    if not isinstance(row, PreferencePair):
        return (row.id, row.prompt_ids, row.response_ids)
    answers = (row.chosen_ids, row.rejected_ids, row.augmented_prompt_ids)
    return (row.id, row.prompt_ids, *answers, row.strength)


def show(found: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    console, begun = Console(), found["from_step"]
    place = f"checkpoint step-{begun:06d}" if begun else "the stage's beginning"
    console.say(f"{found['stage']}, step {found['step']}, from {place}; rows: {found['rows_from']}")
    for row in found["rows"]:
        words = {True: "as recorded", False: "DIFFERS from the record", None: "no record kept"}
        console.say(f"  {printable(row['id'])}  {words[row['equal']]}")
    metrics = [
        [m["name"], repr(m["recorded"]), repr(m["again"]), "" if m["equal"] else "DIFFERS"]
        for m in found["metrics"]
    ]
    console.table("Recorded and computed again", _COLUMNS, metrics)
    if found["not_computed_again"]:
        console.say(f"not computed again: {', '.join(found['not_computed_again'])}")
    if found["damaged"]:
        console.say(f"records were changed since: {printable(found['damaged'], keep=chr(10))}")
    within = f"within {found['tolerance']:g}" if found["tolerance"] else "bit by bit"
    if found["equal"]:
        console.say(f"equal, {within}")
    else:
        fork = found["first_step_that_differs"]
        console.say(
            f"not equal {within}" + (f"; the first step that differs is {fork}" * bool(fork))
        )
