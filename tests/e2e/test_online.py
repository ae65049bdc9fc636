"""A method that makes its pairs in every step: an average of the policy, a reference that moves and
a replay buffer, all of which must come through an interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from small_runs import Selfpref, metrics, settings

STAGE = Path("stages") / "01-policy"


def pairs_of_steps(run: Path) -> list[bytes]:
    return [p.read_bytes() for p in sorted((run / STAGE / "pairs").glob("step-*.parquet"))]


def test_interrupted_online_stage_continues_bitwise(
    selfpref: Selfpref, llama_folder: Path, answers_file: Path, tmp_path: Path
) -> None:
    arguments = settings(
        tmp_path,
        "run",
        llama_folder,
        answers_file,
        "rollout.max_new_tokens=16",
        "algorithm.segment_length=4",
        "algorithm.ema_every=2",
        "algorithm.ref_every=3",
        "model.global_batch_size=4",
        "trainer.max_steps=6",
        "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
        "exp_manager.checkpoint_callback_params.save_top_k=-1",
    )
    selfpref("train", "--config-name", "self_augmented_po", *arguments)
    run = tmp_path / "run"
    whole, pairs = metrics(run), pairs_of_steps(run)
    done = json.loads((run / STAGE / "done.json").read_text())
    assert len(whole) == len(pairs) == 6
    # What a kill after step 4 leaves: an average two steps old, a reference one step old.
    for step in (5, 6):
        shutil.rmtree(run / STAGE / "checkpoints" / f"step-{step:06d}")
    for path in (run / STAGE / "weights", run / "checkpoint", run / "hf"):
        shutil.rmtree(path)
    (run / STAGE / "done.json").unlink()
    versions = run / STAGE / "checkpoints" / "step-000004" / "copies" / "versions.json"
    assert json.loads(versions.read_text()) == {"ema": 4, "lagged": 2}
    selfpref("train", "--config-name", "self_augmented_po", *arguments)
    assert metrics(run) == whole and pairs_of_steps(run) == pairs
    again = json.loads((run / STAGE / "done.json").read_text())
    timings = {"seconds": 0, "rollout_wait_seconds": 0, "sum": ""}
    assert {**again, **timings} == {**done, **timings}
