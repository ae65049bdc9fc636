"""Every parallel layout against one process: the largest differences, layout by loss.

    make invariance
    python benchmarks/invariance.py --only untied --processes 1 2

Runs the worker of tests/distributed, whose tests hold the same differences to their tolerances, and
prints what they are: of any metric (the loss among them), of any element of any gradient, and of
the gradient's norm. Float32 on the CPU, 13 pairs in micro-batches of 3.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine, versions

from nemo_selfpref.files import write_json
from nemo_selfpref.monitor.console import Console

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]

from test_layouts import (  # noqa: E402 (the tests are no package)
    LOSSES,
    MIXTURES,
    ONE,
    SUITES,
    found,
    run,
    worst_difference,
)
from tiny import save_llama  # noqa: E402


def layouts_of(model: str) -> dict[int, list[str]]:
    """All layouts of a model, by number of processes."""
    joined: dict[int, list[str]] = {}
    for suite in (SUITES, MIXTURES):
        for processes, layouts in suite.get(model, {}).items():
            joined.setdefault(processes, []).extend(layouts)
    return joined


def differences(one: Path, other: Path) -> dict[str, Any]:
    """By loss, the largest difference of a metric and of a gradient; and that of the norm."""
    ours, theirs = found(one), found(other)
    row: dict[str, Any] = {"norm": abs(ours["norms"][0] - theirs["norms"][0])}
    for loss in LOSSES:
        pairs = ((value, theirs["losses"][loss][m]) for m, value in ours["losses"][loss].items())
        row[loss] = {"metrics": max(abs(a - b) for a, b in pairs)}
        if (other / f"grad-{loss}").is_dir():
            gradients = worst_difference(one / f"grad-{loss}", other / f"grad-{loss}")
            row[loss]["gradients"] = gradients
    row["scores"] = max(
        abs(a - b)
        for ours_, theirs_ in zip(ours["scores"], theirs["scores"], strict=True)
        for a, b in zip(ours_, theirs_, strict=True)
    )
    row["same_tokens_sampled"] = ours["generated"] == theirs["generated"]
    return row


def measure(model: str, processes: list[int], out: Path) -> dict[str, dict[str, Any]]:
    """Differences of every layout of one model; keys "PROCESSES LAYOUT"."""
    folder = model
    if model != "experts":
        folder = str(save_llama(out / model, tie_word_embeddings=model == "tied"))
    target = out / f"{model}-1"
    layouts = layouts_of(model)
    run(1, folder, str(target), ONE, *layouts.get(1, ()))
    rows = {}
    for count in processes:
        if count > 1 and count in layouts:
            run(count, folder, str(out / f"{model}-{count}"), *layouts[count])
        for layout in layouts.get(count, ()):
            rows[f"{count} {layout}"] = differences(target / ONE, out / f"{model}-{count}" / layout)
    return rows


def table(model: str, rows: dict[str, dict[str, Any]], console: Console) -> None:
    shown = ("dpo", "orpo", "spce", "sr_dpo")
    columns = ["processes, layout", *shown, "norm", "sampled"]
    lines = []
    for name, row in rows.items():
        cells = [_cell(row[loss]) for loss in shown]
        same = "same" if row["same_tokens_sampled"] else "differ"
        lines.append([name, *cells, f"{row['norm']:.0e}", same])
    title = f"{model}: largest difference from one process, any metric / any gradient"
    console.table(title, columns, lines)


def _cell(of_loss: dict[str, float]) -> str:
    gradients = of_loss.get("gradients")
    return f"{of_loss['metrics']:.0e}/" + ("-" if gradients is None else f"{gradients:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--json", type=Path, default=Path("runs/bench/invariance.json"))
    args = parser.parse_args()
    console = Console(enabled=True, bars=False)
    everything: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in args.only:
            everything[model] = measure(model, args.processes, Path(folder))
            table(model, everything[model], console)
    about = {"versions": versions(["torch", "megatron-core"]), "machine": machine()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, {**about, "differences": everything})
    console.say(f"{args.json}")


if __name__ == "__main__":
    main()
