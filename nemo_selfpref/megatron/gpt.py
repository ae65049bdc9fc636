"""The model: megatron-core's GPTModel with packed attention, returning hidden states.

The output projection belongs to the log-prob head (objectives/logprobs.py) and to the sampler, so
that logits never exist for more tokens than are being scored.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_selfpref.config.model_schema import ArchitectureConfig, ModelConfig, RopeScalingConfig
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.megatron.attention_layout import PackedAttention
from nemo_selfpref.megatron.cpu_shim import device_scope
from nemo_selfpref.megatron.layers import (
    block_spec,
    transformer_config,
    uses_transformer_engine,
)
from nemo_selfpref.megatron.lora import SPLIT_AXIS, freeze_base
from nemo_selfpref.megatron.parallel import Layout
from nemo_selfpref.megatron.platform import Platform
from nemo_selfpref.objectives.logprobs import GradSink, main_grad_sink


class PackedGPTModel(GPTModel):
    """GPTModel over packed tokens: rotary angles follow the positions it is given, and the last
    stage returns hidden states [T, 1, H] instead of logits."""

    rope_frequencies: Tensor
    valid_vocab: int
    """Real vocabulary rows on this rank; padding rows come after them."""
    vocab_start: int

    def _preprocess(self, input_ids, position_ids, *args, **kwargs):  # type: ignore[override]
        result = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        angles = position_ids.flatten()[:, None].float() * self.rope_frequencies[None]
        rotary = torch.cat([angles, angles], dim=-1)[:, None, None, :]
        return (result[0], rotary, *result[2:])

    def _postprocess(self, hidden_states, *args, **kwargs):  # type: ignore[override]
        return hidden_states

    def run(self, tokens: Tensor, positions: Tensor, layout: PackedAttention) -> Tensor:
        """Forward pass over packed tokens [T]; hidden states [T, 1, H] (or [T/TP, 1, H] under
        sequence parallelism)."""
        return self(tokens[None], positions[None], None, packed_seq_params=layout)

    def output_weight(self) -> Tensor:
        """Real rows of this rank's output projection, [valid_vocab, H]; last stage only."""
        return self._output_parameter()[: self.valid_vocab]

    def output_grad_sink(self) -> GradSink:
        """Where the gradient of output_weight() is summed in float32 once DDP holds the model."""
        return main_grad_sink(self._output_parameter(), self.valid_vocab)

    def _output_parameter(self) -> Tensor:
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        assert weight is not None, "only the last stage has an output projection"
        return weight

    def full_sequence(self, hidden: Tensor) -> Tensor:
        """[T, H] hidden states on every tensor-parallel rank."""
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False
            )
        return hidden[:, 0]


class VirtualStages(torch.nn.ModuleList):
    """The parts of the network on one rank of an interleaved pipeline, first to last."""

    def __init__(self, parts: list[PackedGPTModel]) -> None:
        super().__init__(parts)
        self.config = parts[0].config

    def sharded_state_dict(self, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """As a module's own; under this module's names for the parts' weights."""
        return {
            f"{number}.{name}": value
            for number, part in enumerate(parts_of(self))
            for name, value in part.sharded_state_dict(metadata=metadata).items()
        }


Network = PackedGPTModel | VirtualStages


def parts_of(network: Network) -> list[PackedGPTModel]:
    """The parts of the network on this rank: one, or those of its virtual stages."""
    return [network] if isinstance(network, PackedGPTModel) else cast(Any, list(network))


def rope_frequencies(arch: ArchitectureConfig) -> Tensor:
    """Rotary angle per position of each pair of channels, float32 [kv_channels / 2].

    The plain, linearly scaled and Llama-3 forms, as the Hugging Face models define them.
    """
    exponents = torch.arange(0, arch.kv_channels, 2, dtype=torch.float32) / arch.kv_channels
    frequencies = 1.0 / (arch.rotary_base**exponents)
    scaling = arch.rope_scaling
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "llama3":
        return _llama3_frequencies(frequencies, scaling)
    return frequencies


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    low = wavelengths > original / scaling.low_freq_factor
    high = wavelengths < original / scaling.high_freq_factor
    return torch.where(low, frequencies / scaling.factor, torch.where(high, frequencies, blended))


def padded_vocab_size(vocab_size: int, tensor_size: int) -> int:
    """Vocabulary rows after padding to a multiple of 128 for each tensor-parallel rank, as
    Megatron does; without tensor parallelism nothing is padded."""
    if tensor_size == 1:
        return vocab_size
    multiple = 128 * tensor_size
    return -(-vocab_size // multiple) * multiple


def build_model(
    arch: ArchitectureConfig,
    model: ModelConfig,
    precision: Precision,
    platform: Platform,
    layout: Layout,
) -> Network:
    """This rank's part of the model, weights not yet set."""
    config = transformer_config(arch, model, precision, platform)
    fused = uses_transformer_engine(model, precision, platform)

    def build(virtual: int | None) -> PackedGPTModel:
        return _build_part(arch, model, config, platform, layout, virtual, fused)

    if layout.virtual_size == 1:
        return build(None)
    return VirtualStages([build(n) for n in range(layout.virtual_size)])


def _build_part(
    arch: ArchitectureConfig,
    model: ModelConfig,
    config: TransformerConfig,
    platform: Platform,
    layout: Layout,
    virtual: int | None,
    fused: bool,
) -> PackedGPTModel:
    rows = padded_vocab_size(arch.vocab_size, layout.tensor_size)
    with device_scope():
        module = PackedGPTModel(
            config,
            cast(
                ModuleSpec, block_spec(config, virtual, model.lora, fused)
            ),  # the block takes it as it is
            vocab_size=rows,
            max_sequence_length=arch.max_position_embeddings,
            pre_process=layout.is_first_stage and not virtual,
            post_process=layout.is_last_stage and virtual in (None, layout.virtual_size - 1),
            share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
            position_embedding_type="none",
            parallel_output=True,
            vp_stage=virtual,
        )
    module = module.to(device=platform.device(), dtype=config.params_dtype)
    _mark_split_weights(module)
    freeze_base(module)
    module.rope_frequencies = rope_frequencies(arch).to(platform.device())
    local_rows = rows // layout.tensor_size
    module.vocab_start = layout.tensor_rank * local_rows
    module.valid_vocab = min(max(arch.vocab_size - module.vocab_start, 0), local_rows)
    return module


def _mark_split_weights(module: torch.nn.Module) -> None:
    """Tell Megatron which weights are split over tensor parallelism: it sets these marks while
    initialising, which we skip, and the gradient norm counts each split weight once by them."""
    split_axis = {
        tensor_parallel.ColumnParallelLinear: 0,
        tensor_parallel.VocabParallelEmbedding: 0,
        tensor_parallel.RowParallelLinear: 1,
        **SPLIT_AXIS,
    }
    for layer in module.modules():
        axis = split_axis.get(type(layer))
        weight = getattr(layer, "weight", None)
        if axis is not None and weight is not None:
            for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
                if hasattr(weight, name):
                    delattr(weight, name)
            tensor_parallel.set_tensor_model_parallel_attributes(weight, True, axis, 1)
