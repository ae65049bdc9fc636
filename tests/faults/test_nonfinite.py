"""Runs into which numbers come that are not finite: what is skipped, what ends the run, what stays
as it was. Twelve rows in order, four a step: r5 and r6 are in step 2, r9 in step 3."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_llama

WORKER = Path(__file__).parent / "poisoned_runs.py"
pytestmark = pytest.mark.slow
EMBEDDING = "model.embed_tokens.weight"
EMA = ["algorithm.ref=ema", "algorithm.ref_every=1", "algorithm.ema_every=1"]
LOSS, BOTH = "algorithm.loss_rows=[r5]", "algorithm.loss_rows=[r5,r9]"


def arguments(folder: Path, method: str, name: str, *more: str) -> list[str]:
    every = "exp_manager.checkpoint_callback_params"
    conf = ["--config-dir", str(folder / "conf")] if method == "poisoned" else []
    return [
        *("train", *conf, "--config-name", method),
        *(f"name={name}", f"exp_manager.exp_dir={folder}"),
        "exp_manager.create_tensorboard_logger=false",
        f"model.restore_from_path={folder / 'llama'}",
        f"data.train_path=[{folder / 'rows.jsonl'}]",
        *("data.max_length=250", "data.max_prompt_length=200", "data.shuffle=false"),
        *("model.micro_batch_size=2", "model.global_batch_size=4", "model.optim.lr=1e-3"),
        *("model.optim.sched.warmup_ratio=0", "trainer.log_every_n_steps=1"),
        *(f"{every}.every_n_train_steps=1", f"{every}.save_top_k=-1", "export.hf=false"),
        *more,
    ]


def write_inputs(folder: Path) -> None:
    save_llama(folder / "llama")
    shutil.copytree(folder / "llama", folder / "broken")
    weights = load_file(folder / "broken" / "model.safetensors")
    weights[EMBEDDING][:, 3] = math.nan
    save_file(weights, folder / "broken" / "model.safetensors", {"format": "pt"})
    rows = [
        {"id": f"r{n}", "prompt": f"{n} + 1?", "chosen": f"{n + 1}, gladly.", "rejected": "No."}
        for n in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "conf").mkdir()
    head = "defaults:\n  - run_schema\n  - algorithm: {0}\n  - _self_\nname: {0}\n"
    (folder / "conf" / "poisoned.yaml").write_text(head.format("poisoned"))


@dataclass(frozen=True)
class Runs:
    folder: Path
    outcomes: dict[str, dict[str, Any]]

    def stage(self, run: str) -> Path:
        (found,) = (self.folder / run / "stages").glob("*-policy")
        return found

    def metrics(self, run: str) -> list[dict[str, float]]:
        return strict_lines(self.stage(run) / "metrics.jsonl")

    def faults(self, run: str) -> list[dict[str, Any]]:
        return strict_lines(self.stage(run) / "nonfinite.jsonl")

    def checkpoint(self, run: str, step: int) -> dict[str, bytes]:
        """Tensors of a checkpoint by file: weights, optimizer and copies."""
        folder = self.stage(run) / "checkpoints" / f"step-{step:06d}"
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*.safetensors"))
        }

    def failed(self, command: str) -> str:
        """What a command said that ended with an error."""
        outcome = self.outcomes[command]
        assert outcome["status"] == 2, outcome
        return " ".join(outcome["said"].split())

    def finished(self, command: str) -> str:
        outcome = self.outcomes[command]
        assert outcome["status"] == 0, outcome["said"]
        return " ".join(outcome["said"].split())


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines; NaN and Infinity, which Python would take, are refused."""

    def refuse(name: str) -> float:
        raise ValueError(f"{path}: {name}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def commands(folder: Path) -> dict[str, list[str]]:
    def poisoned(name: str, *more: str) -> list[str]:
        return arguments(folder, "poisoned", name, *EMA, *more)

    many = [BOTH, "trainer.max_nonfinite_steps=1"]
    broken = [f"model.restore_from_path={folder / 'broken'}"]
    spin = ["rollout.max_new_tokens=4", "algorithm.iterations=1"]
    return {
        "loss": poisoned("loss", LOSS),
        "cut": ["cut", str(folder / "loss"), str(folder / "cut" / "loss"), "2"],
        "resumed": poisoned("loss", LOSS, f"exp_manager.exp_dir={folder / 'cut'}"),
        "gradient": poisoned("gradient", "algorithm.gradient_rows=[r6]"),
        "many": poisoned("many", *many),
        "many again": poisoned("many", *many),
        "many allowed": poisoned("many", BOTH, "trainer.max_nonfinite_steps=2"),
        "halt": poisoned("halt", LOSS, "trainer.nonfinite=halt"),
        "halt allowed": poisoned("halt", LOSS),
        "broken dpo": arguments(folder, "dpo", "broken-dpo", *broken),
        "broken orpo": arguments(folder, "orpo", "broken-orpo", *broken),
        "broken spin": arguments(folder, "spin", "broken-spin", *broken, *spin),
    }


def carry_out(folder: Path, asked: dict[str, list[str]], *launcher: str) -> Runs:
    (folder / "commands.json").write_text(json.dumps(list(asked.values())))
    command = [sys.executable, *launcher, str(WORKER), "commands.json", "outcomes.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    outcomes = json.loads((folder / "outcomes.json").read_text())
    return Runs(folder, dict(zip(asked, outcomes, strict=True)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("nonfinite")
    write_inputs(folder)
    return carry_out(folder, commands(folder))


def test_on_two_replicas_with_a_split_optimizer(tmp_path: Path) -> None:
    """Rows are dealt round: r5 is the second replica's first, and its gradient reaches both."""
    write_inputs(tmp_path)
    more = ["trainer.devices=2", "model.use_distributed_optimizer=true", LOSS]
    asked = {"loss": arguments(tmp_path, "poisoned", "loss", *EMA, *more)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    runs = carry_out(tmp_path, asked, *launcher)
    runs.finished("loss")
    (fault,) = runs.faults("loss")
    assert (fault["rows"], fault["ranks"]) == (["r5"], [1])
    assert fault["micro_batches"] == [{"replica": 1, "number": 0}]
    first, second, third = (runs.checkpoint("loss", step) for step in (1, 2, 3))
    assert first == second
    assert all(third[name] != second[name] for name in second)


@pytest.mark.parametrize(("run", "row"), [("loss", "r5"), ("gradient", "r6")])
def test_one_bad_step_is_skipped(runs: Runs, run: str, row: str) -> None:
    said = runs.finished(run)
    assert f"step 2: the {run} is not finite (rows: {row};" in said
    (fault,) = runs.faults(run)
    # Two micro-batches of two: r4 and r5, r6 and r7.
    at = {"replica": 0, "number": 0 if row == "r5" else 1}
    found = {"step": 2, "kind": run, "rows": [row], "micro_batches": [at], "passes": {}}
    assert fault == {**found, "tensors": [], "ranks": [0], "action": "skip"}
    first, second, third = runs.metrics(run)
    assert second["skipped"] == 1.0 and second["nonfinite_steps"] == 1.0 and "loss" not in second
    assert third["nonfinite_steps"] == 1.0 and "skipped" not in third and "skipped" not in first
    # A cosine from 1e-3 over three steps, the second of which counts: 1, 3/4 and 1/4 of it.
    assert [s["lr"] for s in (first, second, third)] == pytest.approx([1e-3, 7.5e-4, 2.5e-4])


@pytest.mark.parametrize("run", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing(runs: Runs, run: str) -> None:
    """Weights, optimizer, EMA and reference are the same to the bit; the next step moves them."""
    first, second, third = (runs.checkpoint(run, step) for step in (1, 2, 3))
    kinds = {name.split("/")[0] for name in first}
    assert kinds == {"weights", "optimizer", "copies"}
    assert first == second
    assert all(third[name] != second[name] for name in second)


def test_a_run_cut_after_a_skipped_step_goes_on_the_same(runs: Runs) -> None:
    runs.finished("resumed")
    assert runs.checkpoint("cut/loss", 3) == runs.checkpoint("loss", 3)
    assert runs.metrics("cut/loss") == runs.metrics("loss")
    assert runs.faults("cut/loss") == runs.faults("loss")


def test_too_many_in_a_row_end_the_run(runs: Runs) -> None:
    said = runs.failed("many")
    assert "stage policy, step 3: the loss is not finite (rows: r9; micro-batches: 0 of" in said
    assert "The weights are as before the step. 1 steps in a row were skipped before." in said


def test_the_count_survives_a_resume(runs: Runs) -> None:
    """From the checkpoint after the skipped step 2, step 3 is the second in a row."""
    assert "step 3: the loss is not finite" in runs.failed("many again")


def test_more_may_be_allowed_on_resume(runs: Runs) -> None:
    runs.finished("many allowed")
    assert [fault["step"] for fault in runs.faults("many")] == [2, 3]
    assert [fault["action"] for fault in runs.faults("many")] == ["skip", "skip"]
    assert runs.metrics("many")[-1]["nonfinite_steps"] == 2.0
    assert runs.checkpoint("many", 3) == runs.checkpoint("many", 1)


def test_halt_skips_nothing(runs: Runs) -> None:
    said = runs.failed("halt")
    assert "step 2: the loss is not finite (rows: r5;" in said
    assert "trainer.nonfinite=skip leaves such steps out" in said


def test_a_halted_run_goes_on_where_it_may_skip(runs: Runs) -> None:
    runs.finished("halt allowed")
    assert [fault["action"] for fault in runs.faults("halt")] == ["skip"]
    assert runs.checkpoint("halt", 3) == runs.checkpoint("loss", 3)


def test_log_probs_scored_before_training_are_refused(runs: Runs) -> None:
    said = runs.failed("broken dpo")
    assert "stage policy: log-probs scored before training are not finite" in said
    assert "passes: reference; rows: r0, r1, r2, r3, r4, r5, r6, r7 and 4 more" in said
    assert not (runs.stage("broken-dpo") / "reference.safetensors").exists()


def test_weights_that_are_not_finite_end_the_run_at_once(runs: Runs) -> None:
    said = runs.failed("broken orpo")
    assert "step 1: weights hold values that are not finite" in said
    assert "(weights: embedding.word_embeddings.weight; ranks: 0)" in said
    stage = runs.stage("broken-orpo")
    assert not list(stage.glob("checkpoints/step-*")) and not (stage / "weights").exists()


def test_answers_with_such_log_probs_are_refused(runs: Runs) -> None:
    said = runs.failed("broken spin")
    assert "the answer to r0 came with a log-prob that is not finite" in said
    assert "rollout.engine=embedded, weights policy version 0" in said
    assert not list(runs.folder.glob("broken-spin/stages/*/completions.parquet"))


def test_the_broken_weights_are_broken(runs: Runs) -> None:
    weights = load_file(runs.folder / "broken" / "model.safetensors")
    assert [name for name, w in weights.items() if not torch.isfinite(w).all()] == [EMBEDDING]
