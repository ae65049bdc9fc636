"""Arguments and records of small runs, for the end-to-end tests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Selfpref = Callable[..., subprocess.CompletedProcess[str]]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(folder: Path, name: str, model: Path, data: Path, *more: str) -> list[str]:
    """Arguments of a small, quick run."""
    return [
        f"name={name}",
        f"exp_manager.exp_dir={folder}",
        "exp_manager.create_tensorboard_logger=false",
        f"model.restore_from_path={model}",
        f"data.train_path=[{data}]",
        "data.max_length=250",
        "data.max_prompt_length=200",
        "model.micro_batch_size=2",
        "model.global_batch_size=8",
        "model.optim.lr=1e-3",
        "trainer.log_every_n_steps=1",
        *more,
    ]


def metrics(run: Path, stage: str = "policy") -> list[dict]:
    """The steps a stage recorded."""
    path = next((run / "stages").glob(f"*-{stage}")) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]
