"""config.json of a Hugging Face Llama or Mixtral model, to and from our architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_selfpref.config.model_schema import ArchitectureConfig, RopeScalingConfig
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import read_json

_ROPE_TYPES = {"default", "linear", "llama3"}
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "mixtral": {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
"""What a configuration of each type means where it does not say."""


def read_architecture(folder: Path) -> ArchitectureConfig:
    """Shape of the model in a Hugging Face folder.

    Raises:
        CheckpointError: neither a Llama nor a Mixtral, or one with a part this project does not
            build.
    """
    where = folder / "config.json"
    config = read_json(where)
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: expected an object, got {type(config).__name__}")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _LEFT_OUT:
        raise CheckpointError(
            f"{where}: model_type is {kind!r}; the Llama family ('llama') and Mixtral ('mixtral') "
            "are supported"
        )
    config = {**_LEFT_OUT[kind], **{k: v for k, v in config.items() if v is not None}}
    for name, expected in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("pretraining_tp", 1),
        ("partial_rotary_factor", 1.0),
        *([("sliding_window", None)] if kind == "mixtral" else []),
    ):
        if config.get(name, expected) != expected:
            raise CheckpointError(
                f"{where}: {name}={config[name]!r}; only {expected!r} is supported"
            )
    heads = _integer(config, "num_attention_heads", where)
    hidden = _integer(config, "hidden_size", where)
    theta, scaling = _rope(config, where)
    return ArchitectureConfig(
        num_layers=_integer(config, "num_hidden_layers", where),
        hidden_size=hidden,
        ffn_hidden_size=_integer(config, "intermediate_size", where),
        num_attention_heads=heads,
        num_query_groups=_integer(config, "num_key_value_heads", where, heads),
        kv_channels=_integer(config, "head_dim", where, hidden // heads),
        vocab_size=_integer(config, "vocab_size", where),
        max_position_embeddings=_integer(config, "max_position_embeddings", where),
        rotary_base=theta,
        rope_scaling=scaling,
        layernorm_epsilon=_number(config, "rms_norm_eps", where),
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings")),
        init_method_std=_number(config, "initializer_range", where, 0.02),
        **_experts(config, where),
    )


def _experts(config: dict[str, Any], where: Path) -> dict[str, int]:
    if config["model_type"] != "mixtral":
        return {}
    return {
        "num_moe_experts": _integer(config, "num_local_experts", where),
        "moe_router_topk": _integer(config, "num_experts_per_tok", where),
    }


def _integer(config: dict[str, Any], name: str, where: Path, default: int | None = None) -> int:
    value = default if config.get(name) is None else config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where}: {name} is {value!r}; expected a positive integer")
    return value


def _number(config: dict[str, Any], name: str, where: Path, default: float | None = None) -> float:
    value = default if config.get(name) is None else config[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(f"{where}: {name} is {value!r}; expected a positive number")
    return float(value)


def _rope(config: dict[str, Any], where: Path) -> tuple[float, RopeScalingConfig]:
    """Rotary base and scaling, from either spelling (rope_theta + rope_scaling of transformers 4,
    rope_parameters of transformers 5)."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = _number({"rope_theta": config["rope_theta"], **rope}, "rope_theta", where)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        raise CheckpointError(
            f"{where}: rope_type is {rope_type!r}; supported: {', '.join(sorted(_ROPE_TYPES))}"
        )
    if rope_type == "default":
        return theta, RopeScalingConfig()
    scaling = RopeScalingConfig(rope_type=rope_type, factor=_number(rope, "factor", where))
    if rope_type == "llama3":
        scaling.low_freq_factor = _number(rope, "low_freq_factor", where)
        scaling.high_freq_factor = _number(rope, "high_freq_factor", where)
        original = "original_max_position_embeddings"
        scaling.original_max_position_embeddings = _integer(rope, original, where)
    return theta, scaling


def write_config(
    arch: ArchitectureConfig, dtype: str, bos_id: int | None, eos_id: int, pad_id: int | None
) -> dict[str, Any]:
    """config.json for `arch`, in both spellings, so that transformers 4 and 5 and vLLM load it."""
    scaling = arch.rope_scaling
    parameters: dict[str, Any] = {"rope_theta": arch.rotary_base, "rope_type": scaling.rope_type}
    if scaling.rope_type != "default":
        parameters["factor"] = scaling.factor
    if scaling.rope_type == "llama3":
        parameters["low_freq_factor"] = scaling.low_freq_factor
        parameters["high_freq_factor"] = scaling.high_freq_factor
        parameters["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    old = {k: v for k, v in parameters.items() if k != "rope_theta"}
    mixture = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": arch.num_moe_experts,
        "num_experts_per_tok": arch.moe_router_topk,
        "sliding_window": None,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **(mixture if arch.num_moe_experts else {}),
        "hidden_act": "silu",
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.kv_channels,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings,
        "rope_theta": arch.rotary_base,
        "rope_scaling": None if scaling.rope_type == "default" else old,
        "rope_parameters": parameters,
        "rms_norm_eps": arch.layernorm_epsilon,
        "tie_word_embeddings": arch.share_embeddings_and_output_weights,
        "initializer_range": arch.init_method_std,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
