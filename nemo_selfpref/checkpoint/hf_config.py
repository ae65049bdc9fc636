"""config.json of a Hugging Face model, to and from our architecture (families.py lists which)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_selfpref.checkpoint.families import FAMILIES, Family, family_of
from nemo_selfpref.config.model_schema import ArchitectureConfig, RopeScalingConfig
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import read_json

_ROPE_TYPES = {"default", "linear", "llama3"}
_ROPE_SETTINGS = {
    *("rope_theta", "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "partial_rotary_factor"),
}
_REQUIRED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "use_mrope": False,
    "qk_norm": False,
    "is_causal": True,
    "quantization_config": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
"""Settings that would change the network, with the one value of each that is built. It is also what
a configuration without them means, in every family."""


def read_architecture(folder: Path) -> ArchitectureConfig:
    """Shape of the model in a Hugging Face folder.

    Raises:
        CheckpointError: of none of the families, or with a part this project does not build.
    """
    where = folder / "config.json"
    given = read_json(where)
    if not isinstance(given, dict):
        raise CheckpointError(f"{where}: expected an object, got {type(given).__name__}")
    family = _family(given, where)
    config = {**family.left_out, **{k: v for k, v in given.items() if v is not None}}
    _check_required(config, where)
    heads = _integer(config, "num_attention_heads", where)
    if "num_key_value_heads" in given and given["num_key_value_heads"] is None:
        config["num_key_value_heads"] = heads
    hidden = _integer(config, "hidden_size", where)
    positions = _integer(config, "max_position_embeddings", where)
    _check_window(given, family, positions, where)
    theta, scaling = _rope(config, where)
    arch = ArchitectureConfig(
        num_layers=_integer(config, "num_hidden_layers", where),
        hidden_size=hidden,
        ffn_hidden_size=_integer(config, _width(family), where),
        num_attention_heads=heads,
        num_query_groups=_integer(config, "num_key_value_heads", where, heads),
        kv_channels=_integer(config, "head_dim", where, hidden // heads),
        vocab_size=_integer(config, "vocab_size", where),
        max_position_embeddings=positions,
        rotary_base=theta,
        rope_scaling=scaling,
        layernorm_epsilon=_number(config, "rms_norm_eps", where),
        share_embeddings_and_output_weights=_flag(config, "tie_word_embeddings", where),
        init_method_std=_number(config, "initializer_range", where, 0.02),
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_norm,
        **_experts(given, config, family, where),
    )
    if family_of(arch) is not family:
        arch.family = family.model_type
    return arch


def _family(config: dict[str, Any], where: Path) -> Family:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type is {kind!r}; supported: {', '.join(FAMILIES)} (TinyLlama and "
            "Llama 2 and 3 are 'llama', Qwen2.5 is 'qwen2')"
        )
    return FAMILIES[kind]


def _check_required(config: dict[str, Any], where: Path) -> None:
    for name, expected in _REQUIRED.items():
        if config.get(name, expected) != expected:
            raise CheckpointError(
                f"{where}: {name}={config[name]!r}; only {expected!r} is supported"
            )


def _check_window(config: dict[str, Any], family: Family, positions: int, where: Path) -> None:
    """Refuse a window of attention shorter than the texts the model takes. A null means none."""
    on = not family.window_switch or _flag(config, "use_sliding_window", where)
    window = config.get("sliding_window", family.left_out.get("sliding_window"))
    if on and window is not None and not (isinstance(window, int) and window >= positions):
        raise CheckpointError(
            f"{where}: sliding_window={window!r} with max_position_embeddings={positions}; tokens "
            "here see all before them. Use a model without a window, or set "
            "max_position_embeddings to the window in a copy of the folder: texts that short are "
            "computed the same."
        )
    kinds = sorted({str(kind) for kind in config.get("layer_types") or []} - {"full_attention"})
    if kinds and not (on and window is not None and kinds == ["sliding_attention"]):
        raise CheckpointError(
            f"{where}: layer_types has {', '.join(kinds)}; only 'full_attention' is supported"
        )


def _width(family: Family) -> str:
    return family.experts.width if family.experts else "intermediate_size"


def _experts(
    given: dict[str, Any], config: dict[str, Any], family: Family, where: Path
) -> dict[str, Any]:
    if family.experts is None:
        return {}
    names = [name for name in family.experts.count if given.get(name) is not None]
    counts = {_integer(given, name, where) for name in names}
    if len(counts) > 1:
        said = ", ".join(f"{name}={given[name]}" for name in names)
        raise CheckpointError(f"{where}: {said}; expected one number of experts")
    normalised = not family.may_leave_weights_unnormalised or _flag(config, "norm_topk_prob", where)
    return {
        "num_moe_experts": counts.pop() if counts else family.left_out[family.experts.count[0]],
        "moe_router_topk": _integer(config, "num_experts_per_tok", where),
        "moe_router_pre_softmax": not normalised,
    }


def _flag(config: dict[str, Any], name: str, where: Path) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where}: {name} is {value!r}; expected true or false")
    return bool(value)


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
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = config.get(name) or {}
        if not isinstance(part, dict):
            raise CheckpointError(f"{where}: {name} is {part!r}; expected an object or null")
        rope.update(part)
    unknown = sorted(k for k, v in rope.items() if k not in _ROPE_SETTINGS and v is not None)
    theta = _number({"rope_theta": config["rope_theta"], **rope}, "rope_theta", where)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        raise CheckpointError(
            f"{where}: rope_type is {rope_type!r}; supported: {', '.join(sorted(_ROPE_TYPES))}"
        )
    if unknown or rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        said = ", ".join(f"{k}={rope[k]!r}" for k in unknown or ["partial_rotary_factor"])
        raise CheckpointError(f"{where}: {said} of the rotary embedding is not supported")
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
    """config.json for `arch`, in both spellings, so that transformers 4 and 5 and vLLM load it.

    Raises:
        ConfigError: no family has the architecture's parts.
    """
    family = family_of(arch)
    return {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.kv_channels,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings,
        **_written_rope(arch),
        "rms_norm_eps": arch.layernorm_epsilon,
        "tie_word_embeddings": arch.share_embeddings_and_output_weights,
        "initializer_range": arch.init_method_std,
        "attention_dropout": 0.0,
        **family.written,
        **_written_experts(arch, family),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _written_rope(arch: ArchitectureConfig) -> dict[str, Any]:
    scaling = arch.rope_scaling
    parameters: dict[str, Any] = {"rope_theta": arch.rotary_base, "rope_type": scaling.rope_type}
    if scaling.rope_type != "default":
        parameters["factor"] = scaling.factor
    if scaling.rope_type == "llama3":
        parameters["low_freq_factor"] = scaling.low_freq_factor
        parameters["high_freq_factor"] = scaling.high_freq_factor
        parameters["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    old = {k: v for k, v in parameters.items() if k != "rope_theta"}
    return {
        "rope_theta": arch.rotary_base,
        "rope_scaling": None if scaling.rope_type == "default" else old,
        "rope_parameters": parameters,
    }


def _written_experts(arch: ArchitectureConfig, family: Family) -> dict[str, Any]:
    if family.experts is None:
        return {}
    settings: dict[str, Any] = {
        **dict.fromkeys(family.experts.count, arch.num_moe_experts),
        "num_experts_per_tok": arch.moe_router_topk,
        family.experts.width: arch.ffn_hidden_size,
    }
    if family.may_leave_weights_unnormalised:
        settings["norm_topk_prob"] = not arch.moe_router_pre_softmax
    return settings
