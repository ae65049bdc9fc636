"""Policies, pairs and clocks that several checks share."""

from __future__ import annotations

import gc
import os
import time
import typing
from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from typing import Any

import torch

from benchmarks.gpu_check.report import Skip
from nemo_selfpref.config.checks import check_architecture, check_config
from nemo_selfpref.config.model_schema import ArchitectureConfig, ModelConfig
from nemo_selfpref.config.schema import (
    Accelerator,
    AlgorithmConfig,
    DataConfig,
    ExportConfig,
    Precision,
    RunConfig,
    TrainerConfig,
)
from nemo_selfpref.data.batching import PackedBatch, sequences_of
from nemo_selfpref.data.packing import micro_batches
from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.platform import select_platform
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.objectives.inputs import PassLogps, StepInputs
from nemo_selfpref.objectives.objective import DPOObjective, Pass
from nemo_selfpref.types import PreferencePair

BETA = 0.1
RECIPES = ("delayed", "tensorwise", "blockwise")
TINY = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 96, "vocab": 500}


def architecture(
    *, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, longest: int
) -> ArchitectureConfig:
    return ArchitectureConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        kv_channels=hidden // heads,
        vocab_size=vocab,
        max_position_embeddings=longest,
    )


def build(arch: ArchitectureConfig, precision: Precision, **model: Any) -> Policy:
    """A policy on this process alone; its weights are not set yet."""
    longest = arch.max_position_embeddings
    cfg = RunConfig(
        name="gpu-check",
        trainer=TrainerConfig(precision=precision),
        model=ModelConfig(**model),
        data=DataConfig(train_path=[], max_length=longest, max_prompt_length=longest - 1),
        algorithm=AlgorithmConfig(name="none"),
        export=ExportConfig(hf=False),
    )
    check_config(cfg)
    check_architecture(cfg, arch)
    platform = select_platform(Accelerator.auto)
    return Policy(arch, cfg.model, precision, platform, parallel.initialize(cfg, platform))


@torch.no_grad()
def fill(policy: Policy, seed: int = 0) -> Policy:
    """Random weights made on the device: a source's single-threaded draw of a billion takes long.
    Two builds agree only where they order their parameters alike."""
    device = policy.platform.device()
    generator = torch.Generator(device).manual_seed(seed)
    for p in policy.module.parameters():
        if p.dim() == 1:
            p.fill_(1.0)
        else:
            p.normal_(0.0, policy.arch.init_method_std, generator=generator)
    return policy


def fp8_settings(recipe: str) -> dict[str, Any]:
    """What ModelConfig is given for one of RECIPES; Skip where it does not know FP8."""
    if "fp8_recipe" not in {f.name for f in fields(ModelConfig)}:
        raise Skip("model.fp8_recipe is not in the configuration")
    kind = typing.get_type_hints(ModelConfig)["fp8_recipe"]
    for option in (kind, *typing.get_args(kind)):
        if isinstance(option, type) and issubclass(option, Enum):
            return {"fp8_recipe": option(recipe)}
    return {"fp8_recipe": recipe}


def own_layers() -> dict[str, Any]:
    """What ModelConfig is given to do without Transformer Engine's layers; nothing where it knows
    none."""
    known = "transformer_engine" in {f.name for f in fields(ModelConfig)}
    return {"transformer_engine": False} if known else {}


def no_fp8() -> str:
    """Why FP8 cannot be tried here; empty where it can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        import transformer_engine.pytorch  # noqa: F401 # pyright: ignore[reportMissingImports]
    except Exception as error:
        # Its loader raises whatever it met: a library, a version, an assertion.
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def random_pairs(
    count: int, *, prompt: int, answer: int, vocab: int, spread: bool = True, seed: int = 0
) -> list[PreferencePair]:
    """Pairs of random tokens: of that length, or with `spread` a quarter of it to all."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest: int) -> tuple[int, ...]:
        least = max(longest // 4, 1) if spread else longest
        length = int(torch.randint(least, longest + 1, (1,), generator=generator))
        return tuple(torch.randint(3, vocab, (length,), generator=generator).tolist())

    return [
        PreferencePair(str(n), tokens(prompt), tokens(answer), tokens(answer)) for n in range(count)
    ]


def batches_of(
    policy: Policy, rows: Sequence[PreferencePair], numbers: Sequence[int] | None = None
) -> list[PackedBatch]:
    """The micro-batches of a step over the rows of those numbers, all by default."""
    return micro_batches(
        rows,
        list(range(len(rows)) if numbers is None else numbers),
        replica=0,
        num_replicas=1,
        rule=policy.packing_rule(policy.config.micro_batch_size),
        paired=True,
    )


def reference_of(policy: Policy, rows: Sequence[PreferencePair]) -> StepInputs:
    """A step's inputs whose reference is the policy as it is now."""
    scored = policy.score(sequences_of(rows, paired=True))
    chosen, rejected = scored.sums.float().chunk(2)
    return StepInputs(torch.ones(len(rows)), {Pass.REFERENCE: PassLogps(chosen, rejected)})


def no_reference(rows: Sequence[PreferencePair]) -> StepInputs:
    """Inputs for a step whose loss does not matter: a reference of zeros."""
    zeros = torch.zeros(len(rows))
    return StepInputs(torch.ones(len(rows)), {Pass.REFERENCE: PassLogps(zeros, zeros)})


def dpo() -> DPOObjective:
    return DPOObjective(BETA)


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def now() -> float:
    """Seconds, all of the device's work done."""
    sync()
    return time.perf_counter()


def release() -> None:
    """Give back what the last model held; its hooks make cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory() -> tuple[int, int]:
    """Bytes held now and at most since release(); of the process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    with open("/proc/self/statm", encoding="ascii") as statm:
        held = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return held, held
