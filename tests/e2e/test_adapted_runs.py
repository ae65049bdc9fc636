"""Runs that train adapters: they go on bitwise where they were cut off, are exported merged, and
start from each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import metrics, settings
from tiny import with_adapters

from nemo_selfpref.checkpoint.sharded import ShardReader
from nemo_selfpref.checkpoint.training_state import lora_of
from nemo_selfpref.checkpoint.verify import hf_logits, policy_logits
from nemo_selfpref.config.model_schema import LoRAConfig
from nemo_selfpref.megatron.lora import is_adapter

WORKER = Path(__file__).parent / "many_runs.py"
LORA = "model.lora.rank=4"
MOVING = ("algorithm.ref=policy", "algorithm.ref_every=1")
PROMPTS = [(5, 6, 7), (30, 31), (9,) * 20]


@pytest.fixture(scope="module")
def runs(
    llama_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Folders of a run with a frozen reference and one with a moving one, each also cut off after
    a step and gone on with, of what `export` wrote, and of runs that start from the first."""
    out = tmp_path_factory.mktemp("adapted")
    (out / "resumed").mkdir()
    every = "exp_manager.checkpoint_callback_params"
    kept = (f"{every}.every_n_train_steps=1", f"{every}.save_top_k=-1", "trainer.max_steps=3")

    def train(name: str, *more: str, folder: Path = out, model: Path = llama_folder) -> list[str]:
        given = settings(folder, name, model, pairs_file, "model.optim.lr=1e-2", *kept, *more)
        return ["train", "--config-name", "dpo", *given]

    commands = []
    for name, more in (("frozen", (LORA,)), ("moving", (LORA, *MOVING))):
        commands.append(train(name, *more))
        commands.append(["cut", str(out / name), str(out / "resumed" / name)])
        commands.append(train(name, *more, folder=out / "resumed"))
    checkpoint = out / "frozen" / "checkpoint"
    commands.append(["export", "--checkpoint", str(checkpoint), "--out", str(out / "hf")])
    commands.append(train("again", LORA, model=checkpoint))
    commands.append(train("whole", model=checkpoint))
    commands.append(train("wider", "model.lora.rank=8", model=checkpoint))
    (out / "commands.json").write_text(json.dumps(commands))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(out / "commands.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stderr.count("Traceback") == 1, done.stdout[-3000:] + done.stderr[-6000:]
    assert "model.lora.rank: 4 there, 8 here" in done.stdout + done.stderr
    return {path.name: path for path in out.iterdir() if path.is_dir()}


def files(run: Path, pattern: str) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob(pattern))}


@pytest.mark.parametrize("name", ["frozen", "moving"])
def test_three_steps(runs: dict[str, Path], name: str) -> None:
    steps = metrics(runs[name])
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert 0.69314 < steps[0]["loss"] < 0.69316  # policy = reference: ln 2
    assert steps[0]["grad_norm"] > 0
    assert lora_of(runs[name] / "checkpoint") == LoRAConfig(rank=4)


def test_the_frozen_reference_is_learnt_away_from(runs: dict[str, Path]) -> None:
    assert metrics(runs["frozen"])[-1]["loss"] < 0.6


@pytest.mark.parametrize("name", ["frozen", "moving"])
def test_an_interrupted_run_goes_on_bitwise(runs: dict[str, Path], name: str) -> None:
    one, resumed = runs[name], runs["resumed"] / name
    for pattern in ("stages/*/metrics.jsonl", "checkpoint/**/*.safetensors"):
        assert files(one, pattern) and files(resumed, pattern) == files(one, pattern)


def test_optimizer_and_copies_hold_only_adapters(runs: dict[str, Path]) -> None:
    step = next(runs["moving"].glob("stages/*-policy/checkpoints/step-000002"))
    for folder in (step / "optimizer", step / "copies" / "lagged"):
        names = ShardReader(folder).names()
        assert names and all(is_adapter(name) for name in names)


def test_the_export_is_the_trained_model(runs: dict[str, Path], llama_folder: Path) -> None:
    checkpoint, hf = runs["frozen"] / "checkpoint", runs["frozen"] / "hf"
    ours = policy_logits(with_adapters(checkpoint, LoRAConfig(rank=4)), PROMPTS)
    assert ours is not None
    torch.testing.assert_close(hf_logits(hf, PROMPTS), ours, rtol=0, atol=1e-4)
    assert float((hf_logits(llama_folder, PROMPTS) - ours).abs().max()) > 0.01
    written, again = (load_file(f / "model.safetensors") for f in (hf, runs["hf"]))
    assert all(torch.equal(written[name], again[name]) for name in written)


@pytest.mark.parametrize("name", ["again", "whole"])
def test_a_run_starts_from_trained_adapters(runs: dict[str, Path], name: str) -> None:
    steps = metrics(runs[name])
    assert 0.69314 < steps[0]["loss"] < 0.69316  # the reference has the trained adapters too
    before, after = metrics(runs["frozen"])[0], steps[0]
    assert after["logps/chosen"] > before["logps/chosen"] + 1
    assert lora_of(runs[name] / "checkpoint").rank == (4 if name == "again" else 0)
