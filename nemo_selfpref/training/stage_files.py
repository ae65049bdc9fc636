"""Whether a run's stages are on disk what they were when they were written.

done.json says the size and the SHA-256 of every result file of its stage, and has a sum of its own.
A stage's weights have theirs (checkpoint/seal.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import read_json, sha256_of, write_json
from nemo_selfpref.training.sums import own_sum, read_summed, read_tensors, short

DONE = "done.json"
METRICS = "metrics.jsonl"
_RESULTS = ("*.parquet", "*.safetensors", "answers.json", METRICS, "pairs/*.parquet")
_AGAIN = (
    "Give the file back as it was; or remove the folder of this stage and those after it, and they "
    "are done again"
)


def is_done(stage: Path) -> bool:
    return (stage / DONE).is_file()


def mark_done(stage: Path, facts: Mapping[str, Any]) -> None:
    """Write done.json: the facts, and the sums of the files that the stage left."""
    files = {name: _sum(stage / name) for name in _results(stage)}
    body = {**facts, "files": files}
    write_json(stage / DONE, {**body, "sum": own_sum(body)})


def _results(stage: Path) -> list[str]:
    found = {path for pattern in _RESULTS for path in stage.glob(pattern)}
    return sorted(p.relative_to(stage).as_posix() for p in found if not p.name.startswith("."))


def _sum(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def done_facts(stage: Path) -> dict[str, Any]:
    """The facts of a finished stage.

    Raises:
        CheckpointError: done.json is missing or damaged.
    """
    facts = _read_done(stage)
    facts.pop("files", None)
    return facts


def _read_done(stage: Path) -> dict[str, Any]:
    try:
        found = read_json(stage / DONE)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_AGAIN}.") from error
    if _is_older(found):
        return dict(found)
    return read_summed(stage / DONE, _AGAIN)


def _is_older(done: Any) -> bool:
    """Whether a stage was finished before sums were kept."""
    return isinstance(done, dict) and "sum" not in done and "files" not in done


def check_stages(run: Path) -> list[str]:
    """Compare the files of all stages with their sums; what is to be said though it is no obstacle.

    Raises:
        CheckpointError: files are damaged or gone; names all of them.
    """
    problems: list[str] = []
    notes: list[str] = []
    for stage in sorted((run / "stages").glob("*")):
        if not is_done(stage):
            problems += [*_problems_of_tensors(stage), *_problems_of_metrics(stage)]
            notes += _steps_lost(stage)
            continue
        found = list(_problems_done(stage))
        problems += found
        if not found and _is_older(read_json(stage / DONE)):
            notes.append(f"{stage} was finished by an earlier version: its files have no sums")
    if problems:
        raise CheckpointError(f"{run} is damaged:\n  " + "\n  ".join(problems) + f"\n{_AGAIN}.")
    return notes


def _problems_done(stage: Path) -> Iterator[str]:
    try:
        files = _read_done(stage).get("files", {})
    except CheckpointError as error:
        yield str(error).removesuffix(f" {_AGAIN}.").removesuffix(".")
        return
    for name, was in files.items():
        path = stage / name
        if not path.is_file():
            yield f"{path}: is gone; it had {was['bytes']} bytes, sha256 {short(was['sha256'])}"
            continue
        now = _sum(path)
        if now != was:
            yield (
                f"{path}: sha256 {short(was['sha256'])} -> {short(now['sha256'])}, "
                f"bytes {was['bytes']} -> {now['bytes']}"
            )


def _problems_of_tensors(stage: Path) -> Iterator[str]:
    """Log-probs that a stage under way is continued with."""
    for path in sorted(stage.glob("*.safetensors")):
        try:
            read_tensors(path)
        except CheckpointError as error:
            yield f"{error}. Remove the file, and its log-probs are computed again"


def _problems_of_metrics(stage: Path) -> Iterator[str]:
    """The last line may be cut: it is written again. Every other belongs to a later step."""
    path, last = stage / METRICS, 0
    for number, line in enumerate(_lines(path), start=1):
        step = _step(line)
        if step is None:
            yield f"{path}:{number}: is no row of metrics"
            return
        if step <= last:
            yield f"{path}:{number}: is of step {step}; expected a later one than {last}"
            return
        last = step


def _steps_lost(stage: Path) -> list[str]:
    """What a power cut takes, since metrics are not flushed to the disk at every step."""
    steps = [step for line in _lines(stage / METRICS) if (step := _step(line)) is not None]
    saved = [path.name.removeprefix("step-") for path in stage.glob("checkpoints/step-*")]
    last = max([*steps, *(int(name) for name in saved if name.isdecimal())], default=0)
    lost = last - len(steps)
    if lost <= 0:
        return []
    return [
        f"{stage / METRICS} lacks {lost} of {last} steps: the closing table's means leave them out"
    ]


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def _step(line: bytes) -> int | None:
    """The step a line of metrics is of; None where it is no such line."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None
