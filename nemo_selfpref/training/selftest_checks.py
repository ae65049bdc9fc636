"""The checks of the self-test: each measures one number, and says what it may be at most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_selfpref.checkpoint.saver import problems_together, save_now
from nemo_selfpref.checkpoint.training_state import load_optimizer, load_training, take_training
from nemo_selfpref.config.model_schema import Fp8Recipe
from nemo_selfpref.config.schema import Precision, RunConfig
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.parallel import all_gather_json, world_group
from nemo_selfpref.megatron.platform import Platform, transformer_engine_fault
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.scoring import response_token_logprobs
from nemo_selfpref.objectives.vectors import FIRST_STEP_LOSS, error_of, read_vectors
from nemo_selfpref.rollout.engine import RolloutEngine
from nemo_selfpref.training.fp8_guard import measure_noise
from nemo_selfpref.training.rollout_check import compare
from nemo_selfpref.training.selftest_model import Answer, TinyTraining
from nemo_selfpref.types import GenerationRequest, SamplingParams

_VECTOR_TOLERANCE = 1e-10
"""Float64 keeps some 1e-15; the files' numbers may be written with fewer digits."""
_FIRST_LOSS = {Precision.fp32: 2e-6, Precision.bf16: 5e-3}
"""float32 keeps 1e-7 of log-probs near 60, and beta is 0.1. bf16 rounds matrices by their shape."""
_LAYOUT = {Precision.fp32: 1e-4, Precision.bf16: 5e-2}
_LOGPROBS = {Precision.fp32: 1e-4, Precision.bf16: 5e-2}
"""Means over tokens, in nats."""
_IN_FP8 = 5.0
"""By how much FP8 loosens what bf16 keeps."""
_PROMPTS, _NEW_TOKENS, _TEMPERATURE = 8, 16, 0.7
_ADA, _HOPPER = (8, 9), (9, 0)
"""CUDA capability that FP8 needs, and blockwise scaling."""
_LIGHTNING = {
    "epoch": 0,
    "global_step": 1,
    "pytorch-lightning_version": "2.5",
    "loops": {},
    "lr_schedulers": [],
}


@dataclass(frozen=True)
class Result:
    """measured, allowed: None where the check was skipped. note: what was compared, or why not."""

    check: str
    measured: float | None
    allowed: float | None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None or self.allowed is None:
            return "skipped"
        return "ok" if self.measured <= self.allowed else "failed"  # NaN fails


def skipped(check: str, reason: str) -> Result:
    return Result(check, None, None, reason)


def failed(check: str, reason: str) -> Result:
    return Result(check, math.inf, 0.0, reason)


def loss_vectors(path: Path, device: torch.device) -> Iterator[Result]:
    """Every loss at literal inputs, value and gradient.

    Raises:
        DataError: the file cannot be used.
    """
    vectors, unknown = read_vectors(path)
    errors = {vector.name: error_of(vector, device) for vector in vectors}
    wrong = [name for name, error in errors.items() if not error <= _VECTOR_TOLERANCE]
    worst = math.nan if any(map(math.isnan, errors.values())) else max(errors.values())
    note = f"wrong: {', '.join(wrong)}" if wrong else f"{len(vectors)} of {path.name}"
    yield Result("loss vectors", worst, _VECTOR_TOLERANCE, note)
    if unknown:
        yield skipped("loss vectors", f"no such loss here: {', '.join(unknown)}")


def first_loss(training: TinyTraining) -> Result:
    """The loss where policy and reference are the same."""
    loss = training.train_batch(training.own_reference())["loss"]
    allowed = _FIRST_LOSS[training.cfg.trainer.precision]
    if training.policy.in_fp8:
        allowed *= _IN_FP8
    return Result("loss at step 0 - ln 2", abs(loss - FIRST_STEP_LOSS), allowed, f"loss {loss:.7f}")


def same_answer(ours: Answer, theirs: Answer, cfg: RunConfig, layout: str) -> Result:
    """A layout's step beside one process': the largest relative difference of any number."""
    gaps = {name: _gap(value, theirs.metrics[name]) for name, value in ours.metrics.items()}
    scores = [_gap(a, b) for a, b in zip(ours.logps, theirs.logps, strict=True)]
    gaps["log-probs"] = max(scores, key=lambda gap: math.inf if math.isnan(gap) else gap)
    name = max(gaps, key=lambda key: math.inf if math.isnan(gaps[key]) else gaps[key])
    allowed = _LAYOUT[cfg.trainer.precision] * (_IN_FP8 if cfg.model.fp8_recipe else 1.0)
    return Result("layout against one process", gaps[name], allowed, f"{layout}; worst: {name}")


def _gap(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(1.0, abs(theirs))


def rollout_logprobs(check: str, engine: RolloutEngine, training: TinyTraining) -> Result:
    """Log-probs that an engine gives with sampled tokens, beside the trainer's own."""
    prompts = [row.prompt_ids for row in training.rows[:_PROMPTS]]
    requests = [GenerationRequest(str(n), ids, seed=n) for n, ids in enumerate(prompts)]
    answers = engine.generate(requests, SamplingParams(_NEW_TOKENS, _TEMPERATURE))
    sequences = [(ids, answer.token_ids) for ids, answer in zip(prompts, answers, strict=True)]
    own = response_token_logprobs(training.policy, sequences)
    found = compare(list(zip(answers, own, strict=True)))
    count = sum(len(answer.token_ids) for answer in answers)
    note = f"{count} tokens, at most {found['rollout/logprob_diff_max']:.2g}"
    allowed = _LOGPROBS[training.cfg.trainer.precision]
    if training.policy.in_fp8:
        allowed *= _IN_FP8  # sampling stays in bf16
    return Result(check, found["rollout/logprob_diff_mean"], allowed, note)


# -- FP8 ---------------------------------------------------------------------------------------


def fp8_fault(cfg: RunConfig, platform: Platform) -> str | None:
    """Why FP8 cannot be tried here; None where it can."""
    if not platform.cuda:
        return "no CUDA device answers"
    if not platform.transformer_engine:
        return f"Transformer Engine cannot be used: {transformer_engine_fault()}"
    needed = _HOPPER if cfg.model.fp8_recipe is Fp8Recipe.blockwise else _ADA
    if (found := torch.cuda.get_device_capability()) < needed:
        return f"the device's CUDA capability is {found}, FP8 needs {needed}"
    if cfg.trainer.precision is not Precision.bf16:
        return f"trainer.precision={cfg.trainer.precision.value}; FP8 needs bf16"
    if cfg.model.lora.rank or cfg.model.transformer_engine is False:
        return "model.lora or model.transformer_engine=false keeps Transformer Engine's layers out"
    return None


def fp8_noise(training: TinyTraining, limit: float) -> Result:
    """The share of the margins that FP8's error of them is, as training watches it."""
    policy = training.policy
    fp8 = _margins(training)
    with policy.without_fp8():
        bf16 = _margins(training)
    return judged_noise(fp8, bf16, limit)


def judged_noise(fp8: Tensor, bf16: Tensor, limit: float) -> Result:
    """The verdict on margins [B] in FP8 and in bf16."""
    check = "FP8 against BF16"
    found = measure_noise(fp8, bf16, torch.zeros_like(fp8))
    if found.noise == 0.0:
        return failed(check, "the same numbers in FP8 and in bf16: FP8 was not used")
    note = f"noise {found.noise:.2g}, median margin {found.margin:.2g} nats"
    return Result(check, found.share, limit, note)


def _margins(training: TinyTraining) -> Tensor:
    chosen, rejected = training.policy.score(training.sequences).sums.chunk(2)
    return chosen - rejected


# -- checkpoints -------------------------------------------------------------------------------


def round_trip(training: TinyTraining, folder: Path) -> Result:
    """Save weights and optimizer, overwrite both, read them back, compare bit by bit. Collective.

    Raises:
        CheckpointError: it cannot be written or read.
    """
    check, policy, optimizer = "checkpoint round trip", training.policy, training.optimizer
    device = policy.platform.device()
    kept = [tensor.detach().clone() for tensor in _state(policy, optimizer)]
    target = folder / "checkpoint"
    save_now(target, take_training(policy, optimizer, _LIGHTNING), device)
    if wrong := problems_together(target, device):
        return failed(check, "; ".join(wrong))
    with torch.no_grad():
        for tensor in _state(policy, optimizer):
            tensor.fill_(7.0)
    load_training(target, policy)
    load_optimizer(target, optimizer)
    differ = _different(kept, list(_state(policy, optimizer)))
    total = sum(all_gather_json(differ, world_group(), device))
    size = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
    note = f"tensors that differ; {len(kept)} of a rank, {size:,} bytes, sums verified"
    return Result(check, float(total), 0.0, note)


def _state(policy: Policy, optimizer: PolicyOptimizer) -> Iterator[Tensor]:
    """Weights, float32 main weights and the optimizer's moments of this rank."""
    yield from policy.module.parameters()
    for group in optimizer.param_groups:
        yield from group["params"]
    for _, own in optimizer.state.items():
        yield from (t for _, t in sorted(own.items()) if isinstance(t, Tensor) and t.dim())


def _different(before: Sequence[Tensor], after: Sequence[Tensor]) -> int:
    if len(before) != len(after):
        return max(len(before), len(after))
    return sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
