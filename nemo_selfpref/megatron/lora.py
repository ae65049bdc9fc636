"""Low-rank adapters on Megatron's parallel linear layers: y = W x + (alpha / rank) B A x.

A is [rank, in] and B [out, rank]. The side that touches the layer's split is split like the weight,
the other is whole on every rank, and what has to be communicated besides is `rank` numbers a token.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import linear

from nemo_selfpref.config.model_schema import LoRAConfig

ADAPTERS = ("lora_a", "lora_b")
_ATTENTION = ("linear_qkv", "linear_proj")


class _Adapted(torch.nn.Module):
    """What both kinds of layer share: the two matrices, and their place in a checkpoint."""

    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter
    lora_scale: float
    lora_axes: dict[str, int]
    """Axis over which a weight is split; weights not named are whole on every rank."""
    halves: bool = False
    """Whether the output is two matrices of which each rank holds a part ([gate; up])."""

    def _make_adapter(self, lora: LoRAConfig, columns: int, rows: int, split: str) -> None:
        weight: Any = self.weight
        self.lora_scale = lora.alpha / lora.rank
        self.lora_a = torch.nn.Parameter(weight.new_empty(lora.rank, columns))
        self.lora_b = torch.nn.Parameter(weight.new_empty(rows, lora.rank))
        for name in ADAPTERS:
            parameter: Any = getattr(self, name)
            if name == split:
                axis = self.lora_axes[name]
                tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, axis, 1)
            else:
                # Each rank sees its own tokens then; Megatron sums such gradients over the ranks.
                parameter.sequence_parallel = self.sequence_parallel

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """megatron-core's description of the layer's weights and adapters."""
        layer: Any = self
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.lora_axes,
            sharded_offsets,
            tp_group=layer.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        if self.halves:  # The MLP does this for the weight, which it knows by name.
            key = f"{prefix}lora_b"
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


class LoRAColumnParallelLinear(_Adapted, tensor_parallel.ColumnParallelLinear):
    """Split over the output: A is whole on every rank, B has the rows of the weight."""

    lora_axes = {"weight": 0, "bias": 0, "lora_b": 0}

    def __init__(
        self, input_size: int, output_size: int, *, lora: LoRAConfig, stride: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, stride=stride, **kwargs)
        assert not self.gather_output and not self.is_expert
        self.halves = stride == 2  # how Megatron's gated MLP says it
        self._make_adapter(lora, input_size, self.output_size_per_partition, split="lora_b")

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[T, 1, in] ([T/TP, 1, in] under sequence parallelism) -> [T, 1, out/TP] and a bias."""
        output, bias = super().forward(input_, *args, **kwargs)
        return output + self._adapter(input_), bias

    def _adapter(self, input_: Tensor) -> Tensor:
        narrow = linear(input_, self.lora_a) * self.lora_scale
        if self.sequence_parallel:
            narrow = gather_from_sequence_parallel_region(narrow, group=self.tp_group)
        else:
            narrow = copy_to_tensor_model_parallel_region(narrow, group=self.tp_group)
        return linear(narrow, self.lora_b)


class LoRARowParallelLinear(_Adapted, tensor_parallel.RowParallelLinear):
    """Split over the input: A has the columns of the weight, B is whole on every rank."""

    lora_axes = {"weight": 1, "lora_a": 1}

    def __init__(
        self, input_size: int, output_size: int, *, lora: LoRAConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, **kwargs)
        assert self.input_is_parallel and not self.is_expert
        self._make_adapter(lora, self.input_size_per_partition, output_size, split="lora_a")

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, 1, in/TP] -> [T, 1, out] ([T/TP, 1, out] under sequence parallelism) and a bias."""
        output, bias = super().forward(input_)
        return output + self._adapter(input_), bias

    def _adapter(self, input_: Tensor) -> Tensor:
        partial = linear(input_, self.lora_a) * self.lora_scale
        if self.sequence_parallel:
            narrow = reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
        else:
            narrow = reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)
        return linear(narrow, self.lora_b)


SPLIT_AXIS = {LoRAColumnParallelLinear: 0, LoRARowParallelLinear: 1}
"""Axis over which each kind of layer splits its weight."""


def put_adapters(layer: ModuleSpec, lora: LoRAConfig) -> None:
    """Exchange the targets in a dense transformer layer's spec for layers with adapters; nothing
    changes if the rank is 0."""
    if not lora.rank:
        return
    parts: Any = layer.submodules
    for name in lora.target_modules:
        part = parts.self_attention if name in _ATTENTION else parts.mlp
        plain = getattr(part.submodules, name)
        column = plain is tensor_parallel.ColumnParallelLinear
        adapted = LoRAColumnParallelLinear if column else LoRARowParallelLinear
        setattr(part.submodules, name, ModuleSpec(module=adapted, params={"lora": lora}))


def is_adapter(name: str) -> bool:
    """Whether a weight of this name belongs to an adapter."""
    return name.rpartition(".")[2] in ADAPTERS


def freeze_base(module: MegatronModule) -> None:
    """Leave only the adapters of one part of the network trainable, if there are any."""
    if not any(is_adapter(name) for name, _ in module.named_parameters()):
        return
    for name, parameter in module.named_parameters():
        parameter.requires_grad = is_adapter(name)
    embedding = getattr(module, "embedding", None)
    if embedding is not None and module.config.recompute_granularity is not None:
        embedding.register_forward_hook(_begin_graph)


def _begin_graph(_module: Any, _inputs: Any, output: Tensor) -> None:
    """Layers that are computed again in the backward pass get a gradient only if their input wants
    one, and nothing before the first adapter does."""
    if torch.is_grad_enabled():
        output.requires_grad_()
