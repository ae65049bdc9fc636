"""A run's folder: stages done, their records, and the settings they were made with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from nemo_selfpref.config.loader import to_typed
from nemo_selfpref.errors import CheckpointError, ConfigError
from nemo_selfpref.files import fsync_path, naming, write_text
from nemo_selfpref.training.same_inputs import check_record, read_record, write_record
from nemo_selfpref.training.same_settings import check_same, read_settings
from nemo_selfpref.training.stage_files import check_stages, done_facts, is_done, mark_done
from nemo_selfpref.training.sums import read_tensors, with_sum
from nemo_selfpref.types import (
    Completion,
    DropReport,
    FinishReason,
    LabelScores,
    PreferencePair,
    TokenIds,
    WeightSet,
)

__all__ = [
    "RunFolder",
    "completion_of",
    "done_facts",
    "is_done",
    "mark_done",
    "pair_of",
    "read_completions",
    "read_label_scores",
    "read_pairs",
    "read_tensors",
    "write_completions",
    "write_label_scores",
    "write_pairs",
    "write_tensors",
]


PLAN = "plan.json"
"""File of a training stage with its StepPlan."""
DROPPED = "dropped"
"""Folder of a run with the rows that its stages dropped."""


class RunFolder:
    """RUN/ on disk.

    config.yaml   the resolved settings
    inputs.json   what the run was made from: sums of its files, versions
    stages/       one folder a stage, `done.json` when it is complete
    checkpoint/   final weights; hf/ their Hugging Face form; summary.json the closing table
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count = 0

    def open(self, cfg: DictConfig, resume: bool) -> list[str]:
        """Create the folder, or continue in it. One rank of a run calls this.

        Returns what is to be said of a run that goes on: another layout, other versions.

        Raises:
            ConfigError: it exists and may not be continued, or was made with other settings or out
                of other files.
            CheckpointError: files of the run itself are damaged or gone.
        """
        saved = self.path / "config.yaml"
        if not saved.exists():
            self._make(saved, cfg)
            return []
        if not resume:
            raise ConfigError(
                f"{self.path} exists already. Choose another `name`, or continue that run with "
                "exp_manager.resume_if_exists=true."
            )
        made = read_settings(saved)
        record = read_record(self.path)
        notes = check_same(saved, made, cfg)
        notes += check_record(self.path, to_typed(cfg), record)
        return notes + check_stages(self.path)

    def _make(self, saved: Path, cfg: DictConfig) -> None:
        if (self.path / "stages").exists():
            raise CheckpointError(
                f"{saved} is gone, and the stages beside it cannot be continued without the "
                "settings they were made with. Give the file back, or give the run another `name`."
            )
        text = OmegaConf.to_yaml(cfg)
        # The settings last: with them there, there is a run.
        write_record(self.path, to_typed(cfg), hashlib.sha256(text.encode()).hexdigest())
        write_text(saved, text)

    def stage(self, name: str) -> Path:
        """Folder of the next stage, numbered in order of first use."""
        self._count += 1
        return self.path / "stages" / f"{self._count:02d}-{name}"


def write_completions(path: Path, completions: Sequence[Completion]) -> None:
    """Completions as Parquet, atomically."""
    rows = []
    for completion in completions:
        row = asdict(completion)
        row["finish_reason"] = completion.finish_reason.value
        row["weight_set"] = completion.weight_set.value
        rows.append(row)
    _write_table(path, rows)


def read_completions(path: Path) -> list[Completion]:
    return [completion_of(row) for row in _read_table(path)]


def completion_of(row: Mapping[str, Any]) -> Completion:
    """A completion out of its fields as Parquet or JSON has them."""
    return Completion(
        **{
            **row,
            "token_ids": tuple(row["token_ids"]),
            "logprobs": tuple(row["logprobs"]),
            "finish_reason": FinishReason(row["finish_reason"]),
            "weight_set": WeightSet(row["weight_set"]),
        }
    )


def write_label_scores(path: Path, scores: Sequence[LabelScores]) -> None:
    _write_table(path, [asdict(score) for score in scores])


def read_label_scores(path: Path) -> list[LabelScores]:
    return [LabelScores(tuple(row["logprobs"]), row["best"]) for row in _read_table(path)]


def write_pairs(path: Path, pairs: Sequence[PreferencePair]) -> None:
    """Pairs with their provenance as Parquet, atomically; the messages stay with the data."""
    rows = []
    for pair in pairs:
        row = asdict(replace(pair, messages=()))
        row.pop("messages")
        rows.append({**row, "provenance": json.dumps(dict(pair.provenance), sort_keys=True)})
    _write_table(path, rows)


def read_pairs(path: Path) -> list[PreferencePair]:
    """What write_pairs wrote."""
    rows = ({**r, "provenance": json.loads(r["provenance"])} for r in _read_table(path))
    return [pair_of(row) for row in rows]


def pair_of(row: Mapping[str, Any]) -> PreferencePair:
    """A pair, without its messages, out of its fields as Parquet or JSON has them."""
    return PreferencePair(
        id=row["id"],
        prompt_ids=tuple(row["prompt_ids"]),
        chosen_ids=tuple(row["chosen_ids"]),
        rejected_ids=tuple(row["rejected_ids"]),
        strength=row["strength"],
        provenance=row["provenance"],
        augmented_prompt_ids=_optional_ids(row["augmented_prompt_ids"]),
    )


def _optional_ids(ids: list[int] | None) -> TokenIds | None:
    return None if ids is None else tuple(ids)


def write_dropped(path: Path, reports: Mapping[str, DropReport]) -> None:
    """Every dropped row with its reason as JSON lines, atomically; no file where none was."""
    rows = [
        {"title": title, "reason": reason, "row": row}
        for title, report in reports.items()
        for reason, row in report.every
    ]
    if rows:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors as safetensors with their sum, atomically; read_tensors reads them."""
    with _replacing(path) as temporary:
        save_file(tensors, temporary, metadata=with_sum(tensors))


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yields a file beside `path` that takes its name, flushed, when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path):
            yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
