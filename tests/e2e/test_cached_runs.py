"""Runs that share a cache of reference log-probs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from small_runs import Selfpref, metrics, settings

HIT_RATE = "reference_cache/hit_rate"


def weights(run: Path) -> dict[str, str]:
    """SHA-256 sums of the trained weights."""
    return json.loads((run / "checkpoint" / "weights" / "index.json").read_text())["files"]


def hit_rate(run: Path) -> float:
    """As the closing table has it."""
    summary = json.loads((run / "summary.json").read_text())
    (facts,) = (facts for facts in summary if facts["stage"] == "policy")
    return facts["metrics"][HIT_RATE]


def test_a_second_run_scores_nothing(
    selfpref: Selfpref, llama_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    quick = ("export.hf=false", f"model.reference_cache_dir={tmp_path / 'cache'}")

    def run(name: str, *more: str) -> Path:
        arguments = settings(tmp_path, name, llama_folder, pairs_file, *quick, *more)
        shown = selfpref("train", "--config-name", "dpo", *arguments).stdout
        assert (HIT_RATE in shown) == (name != "plain")
        return tmp_path / name

    plain = run("plain", "model.reference_cache_dir=null")
    one, two = run("one"), run("two")
    assert hit_rate(one) == 0.0 and hit_rate(two) == 1.0
    assert weights(one) == weights(two) == weights(plain)
    assert metrics(one) == metrics(two) == metrics(plain)


@pytest.mark.slow
def test_two_processes_agree_on_what_is_there(
    selfpref: Selfpref, llama_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Half of the rows were scored by one process; two then ask for the other half alone."""
    quick = ("export.hf=false", f"model.reference_cache_dir={tmp_path / 'cache'}")
    one = settings(tmp_path, "one", llama_folder, pairs_file, *quick, "data.limit=12")
    selfpref("train", "--config-name", "dpo", *one)
    for name, layout, rate in (
        ("data", "model.tensor_model_parallel_size=1", 0.5),
        ("tensor", "model.tensor_model_parallel_size=2", 1.0),
    ):
        two = settings(
            tmp_path, name, llama_folder, pairs_file, *quick, "trainer.devices=2", layout
        )
        selfpref("train", "--config-name", "dpo", *two)
        assert hit_rate(tmp_path / name) == rate
    for ours, theirs in zip(metrics(tmp_path / "data"), metrics(tmp_path / "tensor"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_an_interrupted_stage_with_a_moving_reference(
    selfpref: Selfpref, llama_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Six steps, the reference moves after the fourth; cut off after the second."""
    arguments = settings(
        tmp_path,
        "run",
        llama_folder,
        pairs_file,
        "export.hf=false",
        "algorithm.ref=policy",
        "algorithm.ref_every=4",
        "trainer.max_epochs=2",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
        "exp_manager.checkpoint_callback_params.save_top_k=-1",
        f"model.reference_cache_dir={tmp_path / 'cache'}",
    )
    selfpref("train", "--config-name", "dpo", *arguments)
    run = tmp_path / "run"
    whole, trained = metrics(run), weights(run)
    # The fourth step is the first of the second epoch: its rows were scored in the first.
    assert [step[HIT_RATE] for step in whole] == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert hit_rate(run) == pytest.approx(1 / 6)
    stage = next((run / "stages").glob("*-policy"))
    for step in range(3, 7):
        shutil.rmtree(stage / "checkpoints" / f"step-{step:06d}")
    for path in (stage / "weights", run / "checkpoint"):
        shutil.rmtree(path)
    (stage / "done.json").unlink()
    lines = (stage / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stage / "metrics.jsonl").write_text("".join(lines[:2]))
    selfpref("train", "--config-name", "dpo", *arguments)
    again = metrics(run)
    assert [step.pop(HIT_RATE) for step in again] == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    for step in whole:
        step.pop(HIT_RATE)
    assert again == whole and weights(run) == trained
