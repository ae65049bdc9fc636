"""What the network is made of: megatron-core's configuration and the specification of a layer.

Two kinds of layer hold the same weights under the same names in a checkpoint: megatron-core's own,
which run everywhere, and Transformer Engine's, which FP8 needs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_selfpref.config.model_schema import (
    ArchitectureConfig,
    Fp8Recipe,
    LoRAConfig,
    ModelConfig,
    Recompute,
)
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.megatron.attention import PackedCoreAttention
from nemo_selfpref.megatron.lora import put_adapters
from nemo_selfpref.megatron.parallel import expert_tensor_size
from nemo_selfpref.megatron.platform import Platform


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked so that Megatron sums its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def uses_transformer_engine(model: ModelConfig, precision: Precision, platform: Platform) -> bool:
    """Whether the layers are Transformer Engine's: asked for, or left open where they run and
    nothing speaks against them."""
    if model.transformer_engine is not None:
        return model.transformer_engine
    return platform.transformer_engine and precision is Precision.bf16 and not model.lora.rank


def transformer_config(
    arch: ArchitectureConfig, model: ModelConfig, precision: Precision, platform: Platform
) -> TransformerConfig:
    """megatron-core's configuration for a model of this shape."""
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
        add_qkv_bias=arch.add_qkv_bias,
        qk_layernorm=arch.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        use_cpu_initialization=not platform.cuda,
        # It adds a layer's weight gradient where Megatron sums them; adapters leave none there.
        gradient_accumulation_fusion=platform.fused_wgrad and not model.lora.rank,
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
        moe_router_pre_softmax=arch.moe_router_pre_softmax,
        # A balancing loss would pull the policy off its reference.
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        calculate_per_token_loss=True,
        # Gloo may still be sending from that memory when the interleaved schedule frees it.
        deallocate_pipeline_outputs=platform.cuda or virtual is None,
        **_recompute(model),
        **_fp8(model),
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


def _fp8(model: ModelConfig) -> dict[str, Any]:
    if model.fp8_recipe is None:
        return {}
    blockwise = model.fp8_recipe is Fp8Recipe.blockwise
    return {
        "fp8": "e4m3" if blockwise else "hybrid",
        "fp8_recipe": model.fp8_recipe.value,
        "first_last_layers_bf16": model.first_last_layers_bf16,
        "moe_router_padding_for_fp8": True,
    }


def block_spec(
    config: TransformerConfig, virtual: int | None, lora: LoRAConfig, fused: bool
) -> TransformerBlockSubmodules:
    """The layers of one part of the network; `fused` takes Transformer Engine's."""
    parts: dict[str, Any] = {
        "num_experts": config.num_moe_experts,
        "qk_layernorm": config.qk_layernorm,
    }
    if fused:
        layer: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(**parts)
    else:
        layer = get_gpt_layer_local_spec(normalization="RMSNorm", **parts)
    submodules = cast(Any, layer.submodules)
    if not fused:
        submodules.input_layernorm = RMSNorm
        submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            submodules.self_attention.submodules.q_layernorm = RMSNorm
            submodules.self_attention.submodules.k_layernorm = RMSNorm
    submodules.self_attention.submodules.core_attention = PackedCoreAttention
    put_adapters(layer, lora)
    count = get_num_layers_to_build(config, vp_stage=virtual)
    # Annotated as a module, used as a class.
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=cast(Any, RMSNorm))
