from __future__ import annotations

import pytest
import torch

from nemo_selfpref.config.schema import Accelerator, Precision
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.megatron.platform import Platform, select_platform

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


def test_precision() -> None:
    assert Platform(cuda=False).dtype(Precision.bf16) == torch.bfloat16
    assert Platform(cuda=True).dtype(Precision.fp32) == torch.float32
