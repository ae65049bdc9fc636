"""Adapters on the way in and out: fresh ones beside a whole model, and trained ones merged into it.

In a checkpoint an adapter lies beside its weight: LAYER.lora_a [rank, in] and LAYER.lora_b
[out, rank] beside LAYER.weight [out, in], all three with their rows and columns in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nemo_selfpref.checkpoint.hf_weights import generator_for, megatron_shapes, read_part
from nemo_selfpref.checkpoint.sharded import TensorSource
from nemo_selfpref.config.model_schema import ArchitectureConfig, LoRAConfig
from nemo_selfpref.errors import ConfigError


def adapter_shapes(arch: ArchitectureConfig, lora: LoRAConfig) -> dict[str, tuple[int, int]]:
    """Name and global shape of every adapter weight."""
    shapes: dict[str, tuple[int, int]] = {}
    for key, shape in megatron_shapes(arch).items():
        layer, _, kind = key.rpartition(".")
        if kind == "weight" and layer.rpartition(".")[2] in lora.target_modules:
            rows, columns = shape
            shapes[f"{layer}.lora_a"] = (lora.rank, columns)
            shapes[f"{layer}.lora_b"] = (rows, lora.rank)
    return shapes


class FreshAdapters:
    """A source of a whole model's weights, with adapters that change nothing yet beside them.

    A is uniform in +-1/sqrt(in), which is Kaiming's with a = sqrt(5), and B zero. A tensor depends
    on the seed and its name alone, so every parallel layout starts from the same adapters.
    """

    def __init__(
        self, base: TensorSource, arch: ArchitectureConfig, lora: LoRAConfig, seed: int
    ) -> None:
        self.base, self.seed = base, seed
        self._shapes = adapter_shapes(arch, lora)

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        full = self._shapes.get(key)
        if full is None:
            return self.base.read(key, offset, shape)
        if key.endswith(".lora_b"):
            return torch.zeros(shape)
        uniform = torch.rand(full, generator=generator_for(key, self.seed))
        return read_part((2 * uniform - 1) / full[1] ** 0.5, offset, shape)


class MergedSource:
    """A checkpoint with adapters read as a whole model: W + (alpha / rank) B A, float32 sums in
    the type of W."""

    def __init__(self, adapted: TensorSource, lora: LoRAConfig) -> None:
        self.adapted, self.lora = adapted, lora

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        base = self.adapted.read(key, offset, shape)
        layer, _, kind = key.rpartition(".")
        if kind != "weight" or layer.rpartition(".")[2] not in self.lora.target_modules:
            return base
        rank = self.lora.rank
        a = self.adapted.read(f"{layer}.lora_a", (0, offset[1]), (rank, shape[1]))
        b = self.adapted.read(f"{layer}.lora_b", (offset[0], 0), (shape[0], rank))
        product = b.float() @ a.float()
        return (base.float() + self.lora.alpha / rank * product).to(base.dtype)


def check_same_adapters(folder: Path, saved: LoRAConfig, wanted: LoRAConfig) -> None:
    """Raise ConfigError unless a run's adapters are those of the checkpoint it starts from.

    A run without adapters may start from a checkpoint with some (they are merged) and the other
    way round (they start fresh).
    """
    if not saved.rank or not wanted.rank:
        return
    there, here = _settings(saved), _settings(wanted)
    differ = ", ".join(
        f"model.lora.{name}: {there[name]} there, {here[name]} here"
        for name in here
        if there[name] != here[name]
    )
    if differ:
        raise ConfigError(
            f"{folder} holds other adapters ({differ}). Set the same, or export the checkpoint "
            "and start from the exported folder, in which they are merged."
        )


def _settings(lora: LoRAConfig) -> Mapping[str, object]:
    return {
        "rank": lora.rank,
        "alpha": float(lora.alpha),
        "target_modules": sorted(set(lora.target_modules)),
    }
