"""A run's folder: stages done, their records, and the settings they were made with."""

from __future__ import annotations

import difflib
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

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.errors import CheckpointError, ConfigError
from nemo_selfpref.files import fsync_path, read_json, write_json, write_text
from nemo_selfpref.types import (
    Completion,
    FinishReason,
    LabelScores,
    PreferencePair,
    TokenIds,
    WeightSet,
)

_FREE_ON_RESUME = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "exp_manager",
    "export",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.expert_model_parallel_size",
    "model.sequence_parallel",
    "model.micro_batch_size",
    "model.micro_batch_tokens",
    "model.share_prompts",
    "model.recompute_granularity",
    "model.recompute_num_layers",
    "model.copies_on_cpu",
    "model.attention_backend",
    "model.logprob_backend",
    "model.logprob_chunk_size",
    "model.reference_cache_dir",
    "model.reference_cache_max_gb",
    "rollout.batch_size",
    "rollout.placement",
    "rollout.vllm",
    "rollout.timeout_s",
    "rollout.max_staleness",
    "rollout.stale_samples",
    "rollout.check_samples",
    "rollout.logprob_alarm",
)
"""Settings that change how a run computes but not what; a resumed run may change them."""


class RunFolder:
    """RUN/ on disk.

    config.yaml   the resolved settings
    stages/       one folder a stage, `done.json` when it is complete
    checkpoint/   final weights; hf/ their Hugging Face form; summary.json the closing table
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._count = 0

    def open(self, cfg: DictConfig, resume: bool) -> None:
        """Create the folder, or continue in it. One rank of a run calls this.

        Raises:
            ConfigError: it exists and may not be continued, or was made with other settings.
        """
        saved = self.path / "config.yaml"
        if saved.exists():
            if not resume:
                raise ConfigError(
                    f"{self.path} exists already. Choose another `name`, or continue that run with "
                    "exp_manager.resume_if_exists=true."
                )
            _check_same(saved, cfg)
        else:
            write_text(saved, OmegaConf.to_yaml(cfg))

    def stage(self, name: str) -> Path:
        """Folder of the next stage, numbered in order of first use."""
        self._count += 1
        return self.path / "stages" / f"{self._count:02d}-{name}"


def _check_same(saved: Path, cfg: DictConfig) -> None:
    before = _flat(OmegaConf.create(saved.read_text(encoding="utf-8")))
    now = _flat(cfg)
    # A setting that this run was made without is at its default if it is newer than the run.
    defaults = _flat(_defaults_of(cfg))
    newer = {key for key in now if key not in before and now[key] == defaults.get(key, ...)}
    old = _lines(before)
    new = _lines({key: value for key, value in now.items() if key not in newer})
    if old == new:
        return
    changed = [
        line
        for line in difflib.unified_diff(old, new, lineterm="", n=0)
        if line[:1] in "+-" and not line.startswith(("+++", "---"))
    ]
    raise ConfigError(
        f"{saved.parent} was made with other settings:\n  "
        + "\n  ".join(changed)
        + "\nGive the run another `name`, or go back to the old settings."
    )


def _defaults_of(cfg: DictConfig) -> DictConfig:
    """The defaults of the settings' dataclasses, for the same algorithm."""
    config_class = algorithms()[cfg.algorithm.name].config_class
    defaults = OmegaConf.structured(RunConfig)
    OmegaConf.update(defaults, "name", cfg.name)
    return OmegaConf.merge(
        OmegaConf.create(OmegaConf.to_container(defaults, enum_to_str=True)),  # type: ignore[return-value]
        {"algorithm": OmegaConf.to_container(OmegaConf.structured(config_class), enum_to_str=True)},
    )


def _flat(cfg: Any) -> dict[str, Any]:
    """The settings that decide a run's result, by their full name."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            flat[prefix] = node

    walk("", OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    free = tuple(f"{name}." for name in _FREE_ON_RESUME)
    return {
        key: value
        for key, value in flat.items()
        if key not in _FREE_ON_RESUME and not key.startswith(free)
    }


def _lines(flat: Mapping[str, Any]) -> list[str]:
    return [f"{key}: {value}" for key, value in sorted(flat.items())]


def is_done(stage: Path) -> bool:
    return (stage / "done.json").is_file()


def mark_done(stage: Path, facts: Mapping[str, Any]) -> None:
    write_json(stage / "done.json", dict(facts))


def done_facts(stage: Path) -> dict[str, Any]:
    return read_json(stage / "done.json")


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


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors as safetensors, atomically."""
    with _replacing(path) as temporary:
        save_file(tensors, temporary)


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
    yield temporary
    fsync_path(temporary)
    os.replace(temporary, path)


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
