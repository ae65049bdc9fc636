"""`selfpref inspect`: what a run did, read from its folder; no model is loaded.

Texts come from models and data, so nothing that could steer a terminal is printed as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_selfpref.monitor.console import Console
from nemo_selfpref.training.inspect_facts import (
    counts,
    pair_facts,
    printable,
    run_facts,
    step_facts,
)
from nemo_selfpref.training.run_files import RunFiles

_STAGES = ("stage", "state", "rows or answers", "steps", "weight versions", "sampled by")
_DROPS = ("stage", "kept", "dropped", "example")


def inspect(args: argparse.Namespace) -> None:
    """Print a table of the run, the rows of one step, or all that is known of one pair.

    Raises:
        ConfigError: no such run, stage, step or pair.
        CheckpointError: a record that cannot be read.
    """
    run = RunFiles(args.run)
    if args.pair is not None:
        found: dict[str, Any] = pair_facts(run, args.pair, args.stage, args.step)
        show = _show_pair
    elif args.step is not None:
        found, show = step_facts(run, args.step, args.stage), _show_step
    else:
        found, show = run_facts(run, args.stage), _show_run
    if args.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        show(Console(), found)


def _show_run(console: Console, facts: Mapping[str, Any]) -> None:
    rows = [
        [
            *(s["stage"], s["state"], s["rows"], s["steps"] or ""),
            *(_span(s["weight_versions"]), ", ".join(s["sampled_by"])),
        ]
        for s in facts["stages"]
    ]
    _table(console, f"{facts['algorithm']}: {facts['run']}", _STAGES, rows)
    drops = [
        [d["stage"], d["kept"], counts(d["dropped"]), "; ".join(d["examples"].values())]
        for d in facts["drops"]
    ]
    if drops:
        _table(console, "Kept and dropped", _DROPS, drops)


def _span(versions: Sequence[int]) -> str:
    if len(versions) < 3:
        return ", ".join(map(str, versions))
    return f"{versions[0]} to {versions[-1]} ({len(versions)})"


def _table(console: Console, title: str, columns: Sequence[str], rows: list[list[Any]]) -> None:
    safe = [[printable(v) if isinstance(v, str) else v for v in row] for row in rows]
    console.table(printable(title), columns, safe)


def _show_step(console: Console, facts: Mapping[str, Any]) -> None:
    ids = facts["pairs"]
    title = f"{facts['stage']}, step {facts['step']}"
    console.say(f"{title}: {'its rows were not kept' if ids is None else f'{len(ids)} pairs'}")
    for id in ids or ():
        console.say(f"  {printable(id)}")
    _table(console, title, ("metric", "value"), [[k, v] for k, v in facts["metrics"].items()])


def _show_pair(_: Console, facts: Mapping[str, Any]) -> None:
    for found in facts["found"]:
        steps = found["steps"]
        _line(f"pair {printable(facts['id'])} in {found['stage']}")
        for side in ("prompt", "augmented_prompt", "chosen", "rejected"):
            if side in found:
                _line(f"\n{side} ({found['tokens'][side]} tokens)")
                _line(_indented(found[side]))
        _line(f"\nstrength    {found['strength']:.6g}")
        _line(f"trained on  {_steps_line(steps)}")
        if "kept" in found:
            _line(f"kept        {json.dumps(found['kept'])}")
        for name, value in found.get("logprobs", {}).items():
            _line(f"log-prob    {name} {value:.6f}")
        for name, value in found["provenance"].items():
            _line(f"provenance  {printable(name)}: {printable(json.dumps(value))}")
        _line("")


def _indented(text: str) -> str:
    """Set in, so that no text passes for a line of ours."""
    return "\n".join(f"  {line}" for line in printable(text, keep="\n").split("\n"))


def _steps_line(steps: Mapping[str, int] | None) -> str:
    if steps is None:
        return "not known: an earlier version made the stage"
    each = [f"{step} ({times} times)" if times > 1 else step for step, times in steps.items()]
    total = sum(steps.values())
    drawn = f"; {total} times in all" if total > len(steps) else ""
    return f"step {', '.join(each)}{drawn}" if each else "no step so far"


def _line(text: str) -> None:
    # As it is: a console would put pictures for names between colons.
    sys.stdout.write(f"{text}\n")
