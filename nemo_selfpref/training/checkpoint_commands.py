"""`selfpref checkpoint verify | show | diff | prune`: looking at saved state, without a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_selfpref.checkpoint.folders import (
    CHECKPOINTS,
    FACTS,
    checkpoints_of,
    is_checkpoint,
    read_facts,
    superfluous,
)
from nemo_selfpref.checkpoint.seal import SEAL, is_sealed, problems, read_seal
from nemo_selfpref.config.schema import CheckpointParams, MonitorMode
from nemo_selfpref.errors import CheckpointError, ConfigError
from nemo_selfpref.monitor.console import Console

_MIB = 1 << 20


def verify(args: argparse.Namespace) -> int:
    """Compare every file with its sum; 1 where something is damaged."""
    folders = [folder for path in args.paths for folder in sealed_below(path)]
    console, rows, damaged = Console(), [], []
    with console.progress("verifying", len(folders), "folders") as progress:
        for folder in folders:
            wrong = problems(folder)
            damaged += wrong
            rows.append(_row(folder, wrong))
            progress(1)
    console.table("Sums of saved folders", ("folder", "files", "MiB", ""), rows)
    for line in damaged:
        console.say(line)
    return 1 if damaged else 0


def _row(folder: Path, wrong: list[str]) -> list[Any]:
    try:
        sizes = [size for _, size in read_seal(folder).values()]
    except CheckpointError:
        return [str(folder), "", "", "damaged"]
    verdict = f"{len(wrong)} damaged" if wrong else "whole"
    return [str(folder), len(sizes), sum(sizes) / _MIB, verdict]


def sealed_below(path: Path) -> list[Path]:
    """The folders with sums at or below a path: those of checkpoints, runs and exports. A
    checkpoint that has lost its sums is among them.

    Raises:
        ConfigError: there is none.
    """
    found = sorted({p.parent for name in (SEAL, FACTS) for p in _files(path, name)})
    if not found:
        raise ConfigError(
            f"{path}: no checkpoint there, nor in the folders below ({SEAL} or {FACTS})"
        )
    return found


def _files(path: Path, name: str) -> Iterator[Path]:
    return (p for p in path.rglob(name) if not any(part.startswith(".step-") for part in p.parts))


def show(args: argparse.Namespace) -> int:
    """What a checkpoint holds, and what it takes."""
    facts = facts_of(args.path)
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return 0
    console = Console()
    parts = facts.pop("parts")
    metrics = facts.pop("metrics")
    console.table(str(args.path), ("", ""), [[name, value] for name, value in facts.items()])
    rows = [[n, size / _MIB, size / facts["parameters"]] for n, size in parts.items()]
    console.table("Parts", ("part", "MiB", "bytes a parameter"), rows)
    if metrics:
        console.table("Last step's metrics", ("metric", "value"), list(metrics.items()))
    return 0


def facts_of(folder: Path) -> dict[str, Any]:
    """Facts about a checkpoint, by name; `parts` are bytes, the sum of all last.

    Raises:
        ConfigError: no checkpoint. CheckpointError: a damaged one.
    """
    _expect_checkpoint(folder)
    saved = read_facts(folder)
    arch = {k: v for k, v in saved["architecture"].items() if not isinstance(v, dict)}
    sums = read_seal(folder)
    parts: dict[str, int] = {}
    for name, (_, size) in sums.items():
        part = "/".join(name.split("/")[: 2 if name.startswith("copies/") else 1][:2])
        parts[part] = parts.get(part, 0) + size
    parts = {**dict(sorted(parts.items())), "all": sum(parts.values())}
    return {
        "weight_version": saved["weight_version"],
        "precision": saved["precision"],
        "lora_rank": (saved["lora"] or {}).get("rank", 0),
        "parameters": _count(folder),
        **arch,
        "metrics": saved.get("metrics", {}),
        "parts": parts,
    }


def _count(folder: Path) -> int:
    """Numbers in the global weights."""
    index = json.loads((folder / "weights" / "index.json").read_text(encoding="utf-8"))
    shapes = {entry["key"]: entry["global_shape"] for entry in index["entries"]}
    total = 0
    for shape in shapes.values():
        numbers = 1
        for size in shape:
            numbers *= size
        total += numbers
    return total


def diff(args: argparse.Namespace) -> int:
    """How two checkpoints differ; 1 where they do."""
    for folder in (args.first, args.second):
        _expect_checkpoint(folder)
    console = Console()
    ours, theirs = facts_of(args.first), facts_of(args.second)
    named = [n for n in ours if n not in ("parts", "metrics") and ours[n] != theirs.get(n)]
    if named:
        rows = [[name, str(ours[name]), str(theirs.get(name))] for name in named]
        console.table("Facts", ("", "first", "second"), rows)
    files = _different_files(args.first, args.second)
    if not files and not named:
        console.say("the same, file by file")
        return 0
    rows = _different_tensors(args.first, args.second)
    columns = ("part", "tensors", "equal", "largest difference", "where")
    console.table("Tensors", columns, rows)
    rest = [name for name in files if not name.endswith((".safetensors", "index.json"))]
    if rest:
        console.table("Other files", ("differ, or are in one only",), [[name] for name in rest])
    return 1


def _different_files(first: Path, second: Path) -> list[str]:
    ours, theirs = read_seal(first), read_seal(second)
    return sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))


def _different_tensors(first: Path, second: Path) -> list[list[Any]]:
    from nemo_selfpref.checkpoint.sharded import INDEX, ShardReader

    parts = {p.parent.relative_to(f) for f in (first, second) for p in f.rglob(INDEX)}
    rows: list[list[Any]] = []
    for part in sorted(parts):
        if not all((folder / part / INDEX).is_file() for folder in (first, second)):
            rows.append([str(part), "", "", "", "in one only"])
            continue
        rows.append([str(part), *_compare(ShardReader(first / part), ShardReader(second / part))])
    return rows


def _compare(ours: Any, theirs: Any) -> list[Any]:
    """Tensors in either, how many are equal, the largest difference and the tensor it is in."""
    shared = set(ours.names()) & set(theirs.names())
    only = {*ours.names(), *theirs.names()} - shared
    equal, largest, where = 0, 0.0, f"{len(only)} in one only" if only else ""
    for name in sorted(shared):
        shape = ours.global_shape(name)
        if shape != theirs.global_shape(name):
            where = f"{name}: {shape} and {theirs.global_shape(name)}"
            continue
        start = (0,) * len(shape)
        a, b = (reader.read(name, start, shape).double() for reader in (ours, theirs))
        gap = float((a - b).abs().max()) if a.numel() else 0.0
        equal += gap == 0.0
        if gap > largest:
            largest, where = gap, name
    return [len(shared) + len(only), equal, largest, where]


def prune(args: argparse.Namespace) -> int:
    """Delete the step checkpoints of a run that are neither the newest nor the best."""
    from nemo_selfpref.files import remove_folder

    params = CheckpointParams(
        save_top_k=args.keep,
        monitor=args.best,
        mode=MonitorMode(args.mode),
        save_best_k=args.best_k,
    )
    if args.keep < 1:
        raise ConfigError(f"--keep {args.keep}: expected 1 or more; the newest is always kept")
    stages = sorted(path.parent for path in args.run.glob(f"stages/*/{CHECKPOINTS}"))
    if not stages:
        raise ConfigError(f"{args.run}: no stages/*/{CHECKPOINTS} there; expected a run's folder")
    doomed = [path for stage in stages for path in superfluous(checkpoints_of(stage), params)]
    console = Console()
    freed = 0
    for path in doomed:
        freed += sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        console.say(f"{'would delete' if args.dry_run else 'deleted'}  {path}")
        if not args.dry_run:
            remove_folder(path)
    console.say(f"{len(doomed)} checkpoints, {freed / _MIB:,.1f} MiB")
    return 0


def _expect_checkpoint(folder: Path) -> None:
    if not is_checkpoint(folder):
        raise ConfigError(f"{folder}: no {FACTS} there; expected the folder of a checkpoint")
    if not is_sealed(folder):
        raise CheckpointError(f"{folder / SEAL} is missing: the folder is incomplete")
