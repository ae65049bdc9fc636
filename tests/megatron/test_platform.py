from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from nemo_selfpref.config.model_schema import (
    AttentionBackend,
    Fp8Recipe,
    LogprobBackend,
    LoRAConfig,
    ModelConfig,
)
from nemo_selfpref.config.schema import Accelerator, Precision
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.megatron.layers import uses_transformer_engine
from nemo_selfpref.megatron.platform import Platform, check_platform, select_platform

choose = select_platform.__wrapped__


def test_gpu_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="accelerator=gpu, but torch finds no CUDA device"):
        choose(Accelerator.gpu)


def test_cpu_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="Hide the GPUs with CUDA_VISIBLE_DEVICES="):
        choose(Accelerator.cpu)


@pytest.mark.parametrize("accelerator", [Accelerator.auto, Accelerator.cpu])
def test_cpu(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    platform = choose(accelerator)
    assert platform == Platform(cuda=False)
    assert platform.backend == "gloo" and platform.device() == torch.device("cpu")


def test_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose(Accelerator.auto) == choose(Accelerator.gpu) == Platform(cuda=True)
    assert Platform(cuda=True).backend == "nccl"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"fp8_recipe": Fp8Recipe.tensorwise},
            "model.fp8_recipe=tensorwise needs Transformer Engine, which cannot be used here (no "
            "CUDA device answers). Set model.fp8_recipe=null, or install the gpu extra",
        ),
        ({"transformer_engine": True}, "model.transformer_engine=True needs Transformer Engine"),
        ({"attention_backend": AttentionBackend.flex}, "flex needs a CUDA device"),
        ({"logprob_backend": LogprobBackend.triton}, "triton needs a CUDA device"),
    ],
)
def test_what_a_cpu_has_not(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_platform(ModelConfig(**settings), Precision.bf16, Platform(cuda=False))
    check_platform(ModelConfig(), Precision.fp32, Platform(cuda=False))


WITH_ENGINE = Platform(cuda=True, transformer_engine=True)


@pytest.mark.parametrize(
    ("precision", "settings", "message"),
    [
        (Precision.fp32, {}, "FP8 needs trainer.precision=bf16"),
        (Precision.bf16, {"transformer_engine": False}, "with model.transformer_engine=false"),
        (Precision.bf16, {"lora": LoRAConfig(rank=4)}, "which take no adapters"),
        (
            Precision.bf16,
            {"fp8_recipe": Fp8Recipe.delayed, "first_last_layers_bf16": True},
            "does not go with model.fp8_recipe=delayed",
        ),
    ],
)
def test_what_fp8_does_not_go_with(
    precision: Precision, settings: dict[str, Any], message: str
) -> None:
    model = ModelConfig(**{"fp8_recipe": Fp8Recipe.blockwise, **settings})
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_platform(model, precision, WITH_ENGINE)
    check_platform(ModelConfig(fp8_recipe=Fp8Recipe.blockwise), Precision.bf16, WITH_ENGINE)


def test_adapters_are_not_put_into_transformer_engines_layers() -> None:
    model = ModelConfig(transformer_engine=True, lora=LoRAConfig(rank=4))
    with pytest.raises(ConfigError, match=r"lora\.rank=4: Transformer Engine's layers take no"):
        check_platform(model, Precision.bf16, WITH_ENGINE)


def test_which_layers_are_built() -> None:
    bf16, fp32, lora = Precision.bf16, Precision.fp32, LoRAConfig(rank=4)
    assert uses_transformer_engine(ModelConfig(), bf16, WITH_ENGINE)
    assert not uses_transformer_engine(ModelConfig(), fp32, WITH_ENGINE)
    assert not uses_transformer_engine(ModelConfig(lora=lora), bf16, WITH_ENGINE)
    assert not uses_transformer_engine(ModelConfig(transformer_engine=False), bf16, WITH_ENGINE)
    assert not uses_transformer_engine(ModelConfig(), bf16, Platform(cuda=True))


def test_precision() -> None:
    assert Platform(cuda=False).dtype(Precision.bf16) == torch.bfloat16
    assert Platform(cuda=True).dtype(Precision.fp32) == torch.float32
