"""Whole runs on two processes in the less common layouts: they end, with the losses of one process
where they do the same work, and go on bitwise where they were cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import metrics, settings

WORKER = Path(__file__).parent / "many_runs.py"
EVERY = "exp_manager.checkpoint_callback_params"
SPLIT = "model.use_distributed_optimizer=true"
PACKED = ("model.share_prompts=true", "model.micro_batch_tokens=512")
EXPERTS = [
    *("num_layers=2", "hidden_size=32", "ffn_hidden_size=48", "num_attention_heads=4"),
    *("num_query_groups=2", "kv_channels=8", "vocab_size=500", "num_moe_experts=4"),
]
RUNS = {
    "split": ("dpo", SPLIT, *PACKED),
    "split_ema": (
        *("dpo", SPLIT, "trainer.precision=bf16", "algorithm.ref=ema", "algorithm.ref_every=1"),
        "algorithm.ema_every=1",
    ),
    "context": ("dpo", "model.context_parallel_size=2", "model.share_prompts=true"),
    "virtual": (
        *("dpo", "model.pipeline_model_parallel_size=2"),
        "model.virtual_pipeline_model_parallel_size=2",
    ),
    "recompute": ("orpo", "model.recompute_granularity=full", "model.copies_on_cpu=true"),
    "experts": ("sft", "model.expert_model_parallel_size=2", SPLIT),
}
"""The method of a run and what it is given besides."""
ALONE = "context"
"""This one is made on a single process too."""


@pytest.fixture(scope="module")
def runs(
    llama_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """RUNS on two processes, each cut off after its first step and resumed as well."""
    out = tmp_path_factory.mktemp("layout_runs")
    (out / "resumed").mkdir()
    (out / "alone").mkdir()

    def train(name: str, folder: Path, *more: str) -> list[str]:
        method, *given = RUNS[name]
        kept = (f"{EVERY}.every_n_train_steps=1", f"{EVERY}.save_top_k=-1", "trainer.max_steps=3")
        everything = settings(folder, name, llama_folder, pairs_file, *kept, *given, *more)
        if name == "experts":
            everything = [a for a in everything if not a.startswith("model.restore_from_path")]
            everything += [f"model.architecture.{size}" for size in EXPERTS]
            everything += [f"model.tokenizer.path={llama_folder}", "export.hf=false"]
        return ["train", "--config-name", method, *everything]

    commands = []
    for name in RUNS:
        commands.append(train(name, out, "trainer.devices=2"))
        commands.append(["cut", str(out / name), str(out / "resumed" / name)])
        commands.append(train(name, out / "resumed", "trainer.devices=2"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    carry_out(out / "two.json", commands, *launcher)
    single = "model.context_parallel_size=1"
    carry_out(out / "one.json", [train(ALONE, out / "alone", single)])
    return {**{name: out / name for name in RUNS}, "alone": out / "alone" / ALONE}


def carry_out(path: Path, commands: list[list[str]], *launcher: str) -> None:
    path.write_text(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def weights(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoint" / "weights"
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_three_steps_and_the_same_again_from_the_first(runs: dict[str, Path], name: str) -> None:
    resumed = runs[name].parent / "resumed" / name
    steps = metrics(runs[name])
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert metrics(resumed) == steps
    assert weights(resumed) == weights(runs[name])
    assert steps[0]["grad_norm"] > 0
    if RUNS[name][0] == "dpo" and name != "split_ema":
        assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.slow
def test_the_losses_are_those_of_one_process(runs: dict[str, Path]) -> None:
    # The steps after the first follow Adam, which follows the signs of rounding too.
    for ours, theirs in zip(metrics(runs["alone"]), metrics(runs[ALONE]), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=2e-3)
        assert theirs["tokens"] == ours["tokens"]
    first = [metrics(runs[name])[0] for name in ("alone", ALONE)]
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-4)
