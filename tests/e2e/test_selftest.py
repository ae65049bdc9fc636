"""`selfpref selftest`: it passes here, and each of its checks fails where one thing is broken."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Selfpref
from tiny import scale
from torch import Tensor

from nemo_selfpref.config.schema import Accelerator, RunConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.files import write_bytes
from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.decode import KVDecoder
from nemo_selfpref.megatron.platform import select_platform
from nemo_selfpref.objectives.inputs import PassLogps
from nemo_selfpref.objectives.vectors import OWN_VECTORS
from nemo_selfpref.rollout.embedded import EmbeddedEngine
from nemo_selfpref.training import selftest_checks as checks
from nemo_selfpref.training.selftest import read_config, run_checks
from nemo_selfpref.training.selftest_model import (
    STOP_IDS,
    Answer,
    TinyTraining,
    one_process_answer,
    tiny_config,
)
from nemo_selfpref.types import TokenIds

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("broken_selftest.py")
PYTHON = ROOT / ".venv-rollout" / "bin" / "python"
CPU = torch.device("cpu")


def config(*overrides: str) -> RunConfig:
    return tiny_config(read_config("dpo", overrides, None))


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """The self-test joins process groups of its own."""
    parallel.shutdown()
    yield
    parallel.shutdown()


@pytest.fixture(scope="module")
def expected(one_process: None) -> Answer:
    return one_process_answer(config(), 1)


@pytest.fixture
def training(expected: Answer) -> TinyTraining:
    return TinyTraining(config(), 1)


# -- the command -------------------------------------------------------------------------------


def rows_of(text: str) -> str:
    """The table's lines without its borders."""
    return "\n".join(" ".join(line.split()) for line in text.replace("│", " ").splitlines())


@pytest.mark.slow
def test_two_ranks(selfpref: Selfpref, tmp_path: Path) -> None:
    layout = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
    done = selfpref("selftest", f"exp_manager.exp_dir={tmp_path}", *layout)
    shown = rows_of(done.stdout)
    assert "nothing failed" in shown and "cpu, TP=2 PP=1 DP=1" in shown
    assert shown.count(" ok ") == 5 and " failed " not in shown
    assert "FP8 against BF16 skipped no CUDA device answers" in shown
    assert "vLLM skipped rollout=vllm was not asked for" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_vector_fails_the_command(selfpref: Selfpref, tmp_path: Path) -> None:
    """On one process; data is named by no one, and the settings of another method do."""
    vectors = json.loads(OWN_VECTORS.read_text())
    vectors["cases"][3]["expected"]["loss"] += 1e-6
    vectors["cases"].append({**vectors["cases"][0], "id": "odd", "loss": "hinge"})
    (tmp_path / "v.json").write_text(json.dumps(vectors))
    given = ("--vectors", tmp_path / "v.json", "--config-name", "sgpo")
    runs = tmp_path / "runs"
    done = selfpref("selftest", *given, f"exp_manager.exp_dir={runs}", status=1)
    assert "failed: loss vectors\n" in done.stdout
    shown = rows_of(done.stdout)
    assert "failed wrong: cdpo" in shown and "no such loss here: odd (hinge)" in shown
    assert shown.count(" failed ") == 1 and list(runs.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("model.tensor_model_parallel_size=2", marks=pytest.mark.long),
        pytest.param("model.pipeline_model_parallel_size=2", marks=pytest.mark.long),
        pytest.param("model.context_parallel_size=2", marks=pytest.mark.long),
        pytest.param("model.use_distributed_optimizer=true", marks=pytest.mark.long),
    ],
)
def test_one_weight_of_one_rank(layout: str, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = [str(tmp_path), "trainer.devices=2", layout]
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), *given],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = next(line for line in done.stdout.splitlines() if line.startswith("failed:"))
    assert "layout against one process" in told


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-rollout: make rollout-env")
def test_with_vllm(selfpref: Selfpref, tmp_path: Path) -> None:
    vllm = ("rollout=vllm", f"rollout.vllm.python={PYTHON}", "rollout.vllm.kv_cache_gb=0.1")
    done = selfpref("selftest", f"exp_manager.exp_dir={tmp_path}", *vllm)
    assert rows_of(done.stdout).count(" ok ") == 6
    assert list(tmp_path.iterdir()) == []


# -- one thing broken each ---------------------------------------------------------------------


def test_everything_is_well(one_process: None, tmp_path: Path) -> None:
    missing = ("rollout=vllm", f"rollout.vllm.python={tmp_path}/python")
    results = run_checks(config(f"exp_manager.exp_dir={tmp_path}", *missing))
    verdicts = {result.check: result.verdict for result in results}
    skipped = [check for check, verdict in verdicts.items() if verdict == "skipped"]
    assert skipped == ["log-probs: trainer against vLLM", "FP8 against BF16"]
    assert set(verdicts.values()) == {"ok", "skipped"} and len(verdicts) == 7
    assert "no such interpreter" in next(r.note for r in results if "vLLM" in r.check)
    parallel.shutdown()


class MovedAfterScoring(TinyTraining):
    """Its reference is of other weights than those that are trained."""

    def own_reference(self) -> PassLogps:
        found = super().own_reference()
        scale(self.policy, 1.001)
        return found


def test_a_reference_of_other_weights(training: TinyTraining) -> None:
    assert checks.first_loss(training).verdict == "ok"
    assert checks.first_loss(MovedAfterScoring(config(), 1)).verdict == "failed"


def test_another_weight_than_one_process_has(training: TinyTraining, expected: Answer) -> None:
    weights = dict(training.policy.module.named_parameters())
    with torch.no_grad():
        weights["decoder.layers.0.mlp.linear_fc2.weight"][0, 0] += 0.05
    found = checks.same_answer(training.answer(), expected, config(), "here")
    assert found.verdict == "failed"


def test_another_gradient_than_one_process_has(training: TinyTraining, expected: Answer) -> None:
    ours = training.answer()
    assert checks.same_answer(ours, expected, config(), "here").verdict == "ok"
    worse = dict(ours.metrics) | {"gradient norm": ours.metrics["gradient norm"] * 1.01}
    found = checks.same_answer(Answer(worse, ours.logps), expected, config(), "here")
    assert found.verdict == "failed" and "gradient norm" in found.note
    nothing = Answer({**ours.metrics, "loss": math.nan}, ours.logps)
    found = checks.same_answer(nothing, expected, config(), "here")
    assert found.verdict == "failed" and "loss" in found.note


class Tempered(KVDecoder):
    """Log-probs of what a temperature made of the logits."""

    def begin(self, prompts: Sequence[TokenIds], max_new_tokens: int) -> Tensor | None:
        logits = super().begin(prompts, max_new_tokens)
        return None if logits is None else logits / 0.9

    def advance(self, tokens: Tensor) -> Tensor | None:
        logits = super().advance(tokens)
        return None if logits is None else logits / 0.9


def test_log_probs_of_another_temperature(training: TinyTraining) -> None:
    verdicts = []
    for decoder in (KVDecoder, Tempered):
        engine = EmbeddedEngine(
            decoder(training.policy), stop_ids=STOP_IDS, max_length=256, batch_size=4
        )
        verdicts.append(checks.rollout_logprobs("engine", engine, training).verdict)
    assert verdicts == ["ok", "failed"]


def test_a_flipped_byte(
    training: TinyTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checks.save_now

    def save_and_flip(target: Path, *given: Any) -> None:
        save(target, *given)
        shard = next((target / "weights").glob("*.safetensors"))
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        write_bytes(shard, bytes(data))

    training.answer()
    assert checks.round_trip(training, tmp_path).verdict == "ok"
    monkeypatch.setattr(checks, "save_now", save_and_flip)
    found = checks.round_trip(training, tmp_path)
    assert found.verdict == "failed" and "is damaged: SHA-256" in found.note


@pytest.mark.parametrize("lost", ["load_training", "load_optimizer"])
def test_a_state_that_is_not_read_back(
    lost: str, training: TinyTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.answer()
    monkeypatch.setattr(checks, lost, lambda *_: None)
    found = checks.round_trip(training, tmp_path)
    assert found.verdict == "failed" and found.measured is not None and found.measured > 0


def test_fp8s_noise() -> None:
    bf16 = torch.linspace(5.0, 30.0, 16, dtype=torch.float64)
    noise = torch.cos(torch.arange(16, dtype=torch.float64))
    assert checks.judged_noise(bf16 + noise, bf16, 0.5).verdict == "ok"
    assert checks.judged_noise(bf16 + 30 * noise, bf16, 0.5).verdict == "failed"
    assert checks.judged_noise(bf16 + math.nan, bf16, 0.5).verdict == "failed"
    unused = checks.judged_noise(bf16, bf16, 0.5)
    assert unused.verdict == "failed" and "FP8 was not used" in unused.note


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none answers here")
def test_on_a_gpu_in_bf16(one_process: None, tmp_path: Path) -> None:
    cfg = config(f"exp_manager.exp_dir={tmp_path}", "trainer.precision=bf16")
    failed = [result for result in run_checks(cfg) if result.verdict == "failed"]
    parallel.shutdown()
    assert failed == []


def test_why_there_is_no_fp8_here() -> None:
    platform = select_platform(Accelerator.auto)
    if not platform.cuda:
        assert checks.fp8_fault(config(), platform) == "no CUDA device answers"


# -- the tiny model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        "tensor_model_parallel_size=8 sequence_parallel=true",
        "pipeline_model_parallel_size=4 virtual_pipeline_model_parallel_size=3",
        "context_parallel_size=8",
        "expert_model_parallel_size=4",
        "expert_model_parallel_size=8 tensor_model_parallel_size=2 sequence_parallel=true",
        "micro_batch_tokens=4096 share_prompts=true",
    ],
)
def test_there_is_a_tiny_model_for_every_layout(layout: str) -> None:
    given = [f"model.{setting}" for setting in layout.split()]
    cfg = config("trainer.devices=96", "model.global_batch_size=768", *given)
    assert cfg.model.restore_from_path is None and cfg.model.architecture.num_layers >= 2


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be split into replicas"):
        config("trainer.devices=3", "model.tensor_model_parallel_size=2")
