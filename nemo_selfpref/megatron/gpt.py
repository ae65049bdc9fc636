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
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_selfpref.config.schema import (
    ArchitectureConfig,
    LoRAConfig,
    ModelConfig,
    Precision,
    Recompute,
    RopeScalingConfig,
)
from nemo_selfpref.megatron.attention import PackedAttention, PackedCoreAttention
from nemo_selfpref.megatron.cpu_shim import device_scope
from nemo_selfpref.megatron.lora import SPLIT_AXIS, freeze_base, put_adapters
from nemo_selfpref.megatron.parallel import Layout, expert_tensor_size
from nemo_selfpref.megatron.platform import Platform
from nemo_selfpref.objectives.logprobs import GradSink, main_grad_sink


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked so that Megatron sums its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


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


def transformer_config(
    arch: ArchitectureConfig, model: ModelConfig, precision: Precision, platform: Platform
) -> TransformerConfig:
    """megatron-core's configuration for a Llama-family shape."""
    dtype, virtual = platform.dtype(precision), model.virtual_pipeline_model_parallel_size
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        layernorm_epsilon=arch.layernorm_epsilon,
        init_method_std=arch.init_method_std,
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=model.context_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=expert_tensor_size(model),
        moe_ffn_hidden_size=arch.ffn_hidden_size if arch.num_moe_experts else None,
        sequence_parallel=model.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        use_cpu_initialization=not platform.cuda,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        variable_seq_lengths=virtual is None,
        # Batched, the messages of two stages that are each other's both neighbours get mixed up.
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        moe_token_dispatcher_type="alltoall",
        num_moe_experts=arch.num_moe_experts or None,
        moe_router_topk=arch.moe_router_topk,
        # A balancing loss would pull the policy off its reference.
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        calculate_per_token_loss=True,
        # Gloo may still be sending from that memory when the interleaved schedule frees it.
        deallocate_pipeline_outputs=platform.cuda or virtual is None,
        **_recompute(model),
    )


def _recompute(model: ModelConfig) -> dict[str, Any]:
    if model.recompute_granularity is Recompute.none:
        return {}
    if model.recompute_granularity is Recompute.selective:
        return {"recompute_granularity": "selective"}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": model.recompute_num_layers,
    }


def build_model(
    arch: ArchitectureConfig,
    model: ModelConfig,
    precision: Precision,
    platform: Platform,
    layout: Layout,
) -> Network:
    """This rank's part of the model, weights not yet set."""
    config = transformer_config(arch, model, precision, platform)
    if layout.virtual_size == 1:
        return _build_part(arch, config, platform, layout, None, model.lora)
    parts = [
        _build_part(arch, config, platform, layout, n, model.lora)
        for n in range(layout.virtual_size)
    ]
    return VirtualStages(parts)


def _build_part(
    arch: ArchitectureConfig,
    config: TransformerConfig,
    platform: Platform,
    layout: Layout,
    virtual: int | None,
    lora: LoRAConfig,
) -> PackedGPTModel:
    rows = padded_vocab_size(arch.vocab_size, layout.tensor_size)
    with device_scope():
        module = PackedGPTModel(
            config,
            cast(ModuleSpec, _block_spec(config, virtual, lora)),  # the block takes it as it is
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


def _block_spec(
    config: TransformerConfig, virtual: int | None, lora: LoRAConfig
) -> TransformerBlockSubmodules:
    experts = config.num_moe_experts
    layer: ModuleSpec = get_gpt_layer_local_spec(normalization="RMSNorm", num_experts=experts)
    submodules = cast(Any, layer.submodules)
    submodules.input_layernorm = RMSNorm
    submodules.pre_mlp_layernorm = RMSNorm
    submodules.self_attention.submodules.core_attention = PackedCoreAttention
    put_adapters(layer, lora)
    count = get_num_layers_to_build(config, vp_stage=virtual)
    # Annotated as a module, used as a class.
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=cast(Any, RMSNorm))
