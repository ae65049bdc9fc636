"""What the machine offers, asked once: device, process-group backend, fused layers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from nemo_selfpref.config.schema import Accelerator, Precision
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.megatron import cpu_shim


@dataclass(frozen=True)
class Platform:
    """The device a run computes on."""

    cuda: bool

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
    return Platform(cuda=cuda)
