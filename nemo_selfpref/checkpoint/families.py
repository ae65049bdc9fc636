"""The Hugging Face model families that are read and written: what sets each apart.

All are one network, megatron-core's GPTModel. A family adds some of its parts (biases on query, key
and value; norms of query and key; experts), has names of its own for the experts' weights, and
means something of its own by what a configuration leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_selfpref.config.model_schema import ArchitectureConfig
from nemo_selfpref.errors import ConfigError


@dataclass(frozen=True)
class Experts:
    """Names that a family with experts has for them."""

    router: str
    """The router's weight, within a layer."""
    folder: str
    """What precedes the number of an expert, within a layer."""
    gate_up: tuple[str, str]
    down: str
    count: tuple[str, ...]
    """Settings that give their number; the first is the one that is written."""
    width: str
    """The setting that gives the channels of one expert."""


@dataclass(frozen=True)
class Family:
    """One value of `model_type`."""

    model_type: str
    class_name: str
    left_out: Mapping[str, Any]
    """What a configuration means where it does not say."""
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None
    may_leave_weights_unnormalised: bool = False
    """Whether the weights of a token's experts need not sum to one (norm_topk_prob)."""
    window_switch: bool = False
    """Whether sliding_window counts only where use_sliding_window is true."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """Settings beyond the common ones that an export has, the same for every model."""

    def builds(self, arch: ArchitectureConfig) -> bool:
        """Whether the family has just the parts of this architecture."""
        return (
            self.qkv_bias == arch.add_qkv_bias
            and self.qk_norm == arch.qk_layernorm
            and (self.experts is not None) == (arch.num_moe_experts > 0)
            and (self.may_leave_weights_unnormalised or not arch.moe_router_pre_softmax)
        )


_NO_BIAS = {"attention_bias": False}
_QWEN = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}
_MIXTRAL_EXPERTS = Experts(
    router="block_sparse_moe.gate.weight",
    folder="block_sparse_moe.experts.",
    gate_up=("w1", "w3"),
    down="w2",
    count=("num_local_experts",),
    width="intermediate_size",
)
_QWEN_EXPERTS = Experts(
    router="mlp.gate.weight",
    folder="mlp.experts.",
    gate_up=("gate_proj", "up_proj"),
    down="down_proj",
    count=("num_experts", "num_local_experts"),
    width="moe_intermediate_size",
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
            written={**_NO_BIAS, "mlp_bias": False},
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            {
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-6,
                "rope_theta": 10000.0,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
            written={"sliding_window": None},
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            {
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1000000.0,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            experts=_MIXTRAL_EXPERTS,
            written={"sliding_window": None},
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            {**_QWEN, "num_key_value_heads": 32, "sliding_window": 4096},
            qkv_bias=True,
            window_switch=True,
            written=_NO_WINDOW,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            {**_QWEN, "num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
            qk_norm=True,
            window_switch=True,
            written={**_NO_BIAS, **_NO_WINDOW},
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            {
                **_QWEN,
                "num_key_value_heads": 4,
                "sliding_window": 4096,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": False,
            },
            qk_norm=True,
            experts=_QWEN_EXPERTS,
            may_leave_weights_unnormalised=True,
            window_switch=True,
            written={**_NO_BIAS, **_NO_WINDOW, "decoder_sparse_step": 1, "mlp_only_layers": []},
        ),
    )
}
"""By model_type. Where two have the same parts the first is taken, unless the architecture names
the other."""


def family_of(arch: ArchitectureConfig) -> Family:
    """The family as which a model is written.

    Raises:
        ConfigError: no family has these parts, or not the one that architecture.family names.
    """
    if arch.family is not None and arch.family not in FAMILIES:
        raise ConfigError(
            f"model.architecture.family={arch.family}: expected one of {', '.join(FAMILIES)}, or "
            "null"
        )
    named = FAMILIES.values() if arch.family is None else [FAMILIES[arch.family]]
    found = next((family for family in named if family.builds(arch)), None)
    if found is None:
        parts = ", ".join(
            f"{name}={getattr(arch, name)}"
            for name in (
                "add_qkv_bias",
                "qk_layernorm",
                "num_moe_experts",
                "moe_router_pre_softmax",
            )
        )
        raise ConfigError(
            f"model.architecture: {parts} together are none of the Hugging Face families "
            f"{', '.join(family.model_type for family in named)}, so the model could not be "
            "exported. Change them to those of one."
        )
    return found
