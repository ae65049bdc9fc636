"""What the machine offers, asked once: device, process-group backend, fused layers."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nemo_selfpref.config.model_schema import (
    AttentionBackend,
    Fp8Recipe,
    LogprobBackend,
    ModelConfig,
)
from nemo_selfpref.config.schema import Accelerator, Precision
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.megatron import cpu_shim


@dataclass(frozen=True)
class Platform:
    """The device a run computes on."""

    cuda: bool
    transformer_engine: bool = False
    fused_wgrad: bool = False
    """Whether apex' kernel is there that adds a weight gradient in float32 as it computes it."""

    @property
    def backend(self) -> str:
        return "nccl" if self.cuda else "gloo"

    def device(self) -> torch.device:
        if self.cuda:
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def dtype(self, precision: Precision) -> torch.dtype:
        return torch.bfloat16 if precision is Precision.bf16 else torch.float32


@functools.cache
def select_platform(accelerator: Accelerator) -> Platform:
    """The platform for trainer.accelerator.

    Raises:
        ConfigError: gpu was asked for and no CUDA device answers, or cpu where CUDA is present
            (megatron-core would put its tensors on the GPU all the same).
    """
    cuda = torch.cuda.is_available()
    if accelerator is Accelerator.gpu and not cuda:
        raise ConfigError(
            "trainer.accelerator=gpu, but torch finds no CUDA device. "
            "Use trainer.accelerator=auto, or check the driver and CUDA_VISIBLE_DEVICES."
        )
    if accelerator is Accelerator.cpu and cuda:
        raise ConfigError(
            "trainer.accelerator=cpu on a machine with CUDA: megatron-core would still place "
            "tensors on the GPU. Hide the GPUs with CUDA_VISIBLE_DEVICES= and try again."
        )
    cpu_shim.install()
    return Platform(
        cuda=cuda,
        transformer_engine=transformer_engine_fault() is None,
        fused_wgrad=cuda and _imports("fused_weight_gradient_mlp_cuda"),
    )


def transformer_engine_fault() -> str | None:
    """Why Transformer Engine cannot be used here; None where it can."""
    if not torch.cuda.is_available():
        return "no CUDA device answers"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        # A library that was built for another torch or CUDA fails in each of these ways.
        return f"{type(error).__name__}: {error}"
    return None


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError):
        return False
    return True


def check_platform(model: ModelConfig, precision: Precision, platform: Platform) -> None:
    """What was asked for, against what is there.

    Raises:
        ConfigError: settings that need CUDA, Transformer Engine or bf16, without it.
    """
    problems = [*_layers_wanted(model, precision, platform), *_backends_wanted(model, platform)]
    if problems:
        raise ConfigError("\n".join(problems))


def _layers_wanted(model: ModelConfig, precision: Precision, platform: Platform) -> Iterator[str]:
    wanted = {
        "model.fp8_recipe": model.fp8_recipe and model.fp8_recipe.value,
        "model.transformer_engine": model.transformer_engine,
    }
    for name, value in wanted.items():
        if value and not platform.transformer_engine:
            yield (
                f"{name}={value} needs Transformer Engine, which cannot be used here "
                f"({transformer_engine_fault()}). Set {name}=null, or install the gpu extra on a "
                "machine with an NVIDIA GPU."
            )
    if model.transformer_engine and model.lora.rank:
        yield (
            f"model.transformer_engine=true with model.lora.rank={model.lora.rank}: Transformer "
            "Engine's layers take no adapters. Set model.transformer_engine=null or lora.rank=0."
        )
    if model.fp8_recipe is None:
        return
    if precision is not Precision.bf16:
        yield (
            f"model.fp8_recipe={model.fp8_recipe.value} with trainer.precision={precision.value}: "
            "FP8 needs trainer.precision=bf16"
        )
    if model.transformer_engine is False or model.lora.rank:
        yield (
            f"model.fp8_recipe={model.fp8_recipe.value} with model.transformer_engine="
            f"{str(model.transformer_engine).lower()} and model.lora.rank={model.lora.rank}: FP8 "
            "needs Transformer Engine's layers, which take no adapters. Set fp8_recipe=null."
        )
    if model.first_last_layers_bf16 and model.fp8_recipe is Fp8Recipe.delayed:
        yield (
            "model.first_last_layers_bf16=true does not go with model.fp8_recipe=delayed. Set "
            "model.fp8_recipe=tensorwise or blockwise, or switch it off."
        )


def _backends_wanted(model: ModelConfig, platform: Platform) -> Iterator[str]:
    if platform.cuda:
        return
    if model.attention_backend is AttentionBackend.flex:
        yield (
            "model.attention_backend=flex needs a CUDA device: torch has no backward pass of it "
            "on a CPU. Set model.attention_backend=auto or sdpa."
        )
    if model.logprob_backend is LogprobBackend.triton:
        yield (
            "model.logprob_backend=triton needs a CUDA device. Set model.logprob_backend=auto or "
            "torch."
        )
