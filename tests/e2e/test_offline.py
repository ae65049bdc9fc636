"""`selfpref train` for the methods on given pairs, and what a run leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from small_runs import Selfpref, metrics, settings


def test_dpo_from_rows_to_hugging_face(
    selfpref: Selfpref, llama_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    arguments = settings(tmp_path, "dpo", llama_folder, pairs_file, "trainer.max_epochs=3")
    shown = selfpref("train", "--config-name", "dpo", *arguments).stdout
    steps = metrics(tmp_path / "dpo")
    assert len(steps) == 9
    assert 0.69314 < steps[0]["loss"] < 0.69316  # policy = reference: ln 2
    assert steps[-1]["loss"] < 0.5 and steps[-1]["rewards/accuracies"] == 1.0
    assert "24 kept, none dropped" in shown and str(tmp_path / "dpo" / "hf") in shown
    summary = json.loads((tmp_path / "dpo" / "summary.json").read_text())
    assert [s["stage"] for s in summary] == ["preference pairs", "policy"]
    again = selfpref("train", "--config-name", "dpo", *arguments).stdout
    assert "already done, read back" in again
    assert len(metrics(tmp_path / "dpo")) == 9


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "cdpo", "ipo", "orpo", "sr_dpo", "sr_ipo"])
def test_other_methods(
    selfpref: Selfpref, llama_folder: Path, pairs_file: Path, tmp_path: Path, method: str
) -> None:
    arguments = settings(tmp_path, method, llama_folder, pairs_file, "trainer.max_epochs=3")
    selfpref("train", "--config-name", method, *arguments)
    steps = metrics(tmp_path / method)
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert steps[-1]["loss"] < steps[0]["loss"]
    first = {"ipo": 25.0, "sr_ipo": 25.0, "cdpo": math.log(2), "sr_dpo": math.log(2)}
    if method in first:  # (0 - 1/(2 * 0.1))^2 and -log sigmoid(0)
        assert steps[0]["loss"] == pytest.approx(first[method], abs=1e-3)
    assert bool(list((tmp_path / method).rglob("reference.safetensors"))) is (method in first)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "model.tensor_model_parallel_size=2",
        "model.pipeline_model_parallel_size=2",
        "model.tensor_model_parallel_size=1",
    ],
)
def test_two_processes(
    selfpref: Selfpref, llama_folder: Path, pairs_file: Path, tmp_path: Path, layout: str
) -> None:
    """TP=2, PP=2 and DP=2 from one command, with the same curve as one process."""
    one = settings(tmp_path, "one", llama_folder, pairs_file)
    selfpref("train", "--config-name", "dpo", *one)
    two = settings(tmp_path, "two", llama_folder, pairs_file, "trainer.devices=2", layout)
    selfpref("train", "--config-name", "dpo", *two)
    ours, theirs = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert 0.69314 < theirs[0]["loss"] < 0.69316
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-3), name


def test_interrupted_stage_continues_bitwise(
    selfpref: Selfpref, llama_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Cut a stage off after its second checkpoint; the rest must equal the unbroken run."""
    import shutil

    every = "exp_manager.checkpoint_callback_params.every_n_train_steps=1"
    keep = "exp_manager.checkpoint_callback_params.save_top_k=-1"
    arguments = settings(
        tmp_path, "run", llama_folder, pairs_file, every, keep, "trainer.max_epochs=2"
    )
    selfpref("train", "--config-name", "dpo", *arguments)
    run = tmp_path / "run"
    whole = metrics(run)
    # What a kill after step 2 leaves: two checkpoints, no later metrics, stage not done.
    stage = next((run / "stages").glob("*-policy"))
    for step in range(3, 7):
        shutil.rmtree(stage / "checkpoints" / f"step-{step:06d}")
    for path in (stage / "weights", run / "checkpoint", run / "hf"):
        shutil.rmtree(path)
    (stage / "done.json").unlink()
    lines = (stage / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stage / "metrics.jsonl").write_text("".join(lines[:2]))
    selfpref("train", "--config-name", "dpo", *arguments)
    assert metrics(run) == whole


def test_changed_settings_are_refused_on_resume(
    selfpref: Selfpref, llama_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    arguments = settings(
        tmp_path, "run", llama_folder, pairs_file, "trainer.max_steps=1", "export.hf=false"
    )
    selfpref("train", "--config-name", "dpo", *arguments)
    refused = selfpref("train", "--config-name", "dpo", *arguments, "algorithm.beta=0.5", status=2)
    assert "-algorithm.beta: 0.1" in refused.stderr and "+algorithm.beta: 0.5" in refused.stderr
    fresh = "exp_manager.resume_if_exists=false"
    refused = selfpref("train", "--config-name", "dpo", *arguments, fresh, status=2)
    assert "exists already" in refused.stderr
