"""Where checkpoints lie, and what they say of themselves; nothing here loads a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_selfpref.checkpoint.seal import check_file, read_seal
from nemo_selfpref.config.schema import CheckpointParams, MonitorMode
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import read_json

FORMAT = "nemo_selfpref"
FORMAT_VERSION = 1
FACTS = "checkpoint.json"
CHECKPOINTS = "checkpoints"
LATEST = "latest"
STEP = "step-"
DAMAGED = "damaged-"


def is_checkpoint(folder: Path) -> bool:
    return (folder / FACTS).is_file()


def read_facts(folder: Path) -> dict[str, Any]:
    """checkpoint.json, checked.

    Raises:
        CheckpointError: not a checkpoint of ours, of a newer format, or damaged.
    """
    facts = read_json(folder / FACTS)
    if facts.get("format") != FORMAT or facts.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / FACTS}: format {facts.get('format')!r} version "
            f"{facts.get('version')!r}; expected {FORMAT!r} version {FORMAT_VERSION}"
        )
    check_file(folder, FACTS, read_seal(folder))
    return facts


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(STEP))


def folders_of(stage: Path) -> list[Path]:
    """All that has a checkpoint's name in a stage's folder, oldest first: one that has lost its
    checkpoint.json too."""
    found = (stage / CHECKPOINTS).glob(f"{STEP}*")
    return sorted((p for p in found if p.is_dir() and step_name(p)), key=step_of)


def step_name(path: Path) -> bool:
    return path.name.removeprefix(STEP).isdecimal()


def checkpoints_of(stage: Path) -> list[Path]:
    """The checkpoints of a stage's folder, oldest first; they may be damaged."""
    return [path for path in folders_of(stage) if is_checkpoint(path)]


def superfluous(found: Sequence[Path], params: CheckpointParams) -> list[Path]:
    """Which of a stage's checkpoints, oldest first, are neither among the newest nor the best."""
    if params.save_top_k < 0:
        return []
    newest = found[len(found) - min(params.save_top_k, len(found)) :]
    kept = {*newest, *_best(found, params)}
    return [path for path in found if path not in kept]


def _best(found: Sequence[Path], params: CheckpointParams) -> list[Path]:
    if params.monitor is None:
        return []
    values = {path: read_facts(path).get("metrics", {}).get(params.monitor) for path in found}
    known = [path for path in found if values[path] is not None]
    sign = -1 if params.mode is MonitorMode.max else 1
    return sorted(known, key=lambda path: sign * values[path])[: params.save_best_k]
