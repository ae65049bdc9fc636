from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_selfpref.checkpoint.hf_config import read_architecture, write_config
from nemo_selfpref.config.model_schema import ArchitectureConfig, RopeScalingConfig
from nemo_selfpref.errors import CheckpointError

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 4.5,
    "original_max_position_embeddings": 128,
}


def read(folder: Path, **changes: Any) -> ArchitectureConfig:
    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def test_a_plain_llama(tmp_path: Path) -> None:
    assert read(tmp_path) == ArchitectureConfig(
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=500,
        max_position_embeddings=256,
        rotary_base=5000.0,
        rope_scaling=RopeScalingConfig(),
        layernorm_epsilon=1e-5,
        share_embeddings_and_output_weights=True,
        init_method_std=0.02,
    )


def test_what_an_old_config_leaves_out(tmp_path: Path) -> None:
    left_out = dict.fromkeys(
        ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta"), ...
    )
    arch = read(tmp_path, **left_out, tie_word_embeddings=...)
    assert arch.num_query_groups == 4
    assert arch.max_position_embeddings == 2048
    assert arch.layernorm_epsilon == 1e-6
    assert arch.rotary_base == 10000.0
    assert not arch.share_embeddings_and_output_weights


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 3}


def test_a_mixtral(tmp_path: Path) -> None:
    arch = read(tmp_path, **MIXTRAL, sliding_window=None)
    assert (arch.num_moe_experts, arch.moe_router_topk) == (4, 3)
    assert replace(arch, num_moe_experts=0, moe_router_topk=2) == read(tmp_path)


def test_what_a_mixtral_leaves_out(tmp_path: Path) -> None:
    left_out = dict.fromkeys(
        ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta"), ...
    )
    arch = read(tmp_path, **left_out, model_type="mixtral", num_attention_heads=16)
    assert (arch.num_query_groups, arch.num_moe_experts, arch.moe_router_topk) == (8, 8, 2)
    assert arch.max_position_embeddings == 131072 and arch.rotary_base == 1e6
    assert arch.layernorm_epsilon == 1e-5


def test_head_dim_of_its_own(tmp_path: Path) -> None:
    assert read(tmp_path, head_dim=32).kv_channels == 32
    assert read(tmp_path, head_dim=None).kv_channels == 16


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 7.0, "rope_scaling": LLAMA3},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 7.0, **LLAMA3}},
        {"rope_theta": 7.0, "rope_scaling": None, "rope_parameters": LLAMA3},
    ],
    ids=["transformers 4", "transformers 5", "mixed"],
)
def test_both_spellings_of_llama3_rope(tmp_path: Path, rope: dict[str, Any]) -> None:
    arch = read(tmp_path, **rope)
    assert arch.rotary_base == 7.0
    assert arch.rope_scaling == RopeScalingConfig("llama3", 8.0, 1.5, 4.5, 128)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_both_spellings_of_linear_rope(tmp_path: Path, key: str) -> None:
    arch = read(tmp_path, rope_scaling={key: "linear", "factor": 4})
    assert arch.rope_scaling == RopeScalingConfig("linear", 4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2'; supported: llama, mistral, mixtral"),
        ({"model_type": ...}, "model_type is None"),
        ({**MIXTRAL, "sliding_window": 255}, "sliding_window=255 with max_position_embeddings=256"),
        ({**MIXTRAL, "num_local_experts": 0}, "num_local_experts is 0; expected a positive"),
        ({"attention_bias": True}, "attention_bias=True; only False is supported"),
        ({"mlp_bias": True}, "mlp_bias=True; only False is supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu' is supported"),
        ({"pretraining_tp": 2}, "pretraining_tp=2; only 1 is supported"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type is 'yarn'; supported: default, linear, llama3",
        ),
        ({"hidden_size": ...}, "hidden_size is None; expected a positive integer"),
        ({"vocab_size": "500"}, "vocab_size is '500'; expected a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a positive integer"),
        ({"rope_theta": "big"}, "rope_theta is 'big'; expected a positive number"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None; expected a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; only 1.0 is supported"),
    ],
)
def test_what_is_not_built_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        read(tmp_path, **changes)


@pytest.mark.parametrize("experts", [0, 8])
@pytest.mark.parametrize(
    "rope",
    [RopeScalingConfig(), RopeScalingConfig("linear", 4.0), RopeScalingConfig("llama3", 8.0)],
    ids=lambda rope: rope.rope_type,
)
def test_what_is_written_is_read_back(
    tmp_path: Path, rope: RopeScalingConfig, experts: int
) -> None:
    arch = ArchitectureConfig(3, 64, 96, 4, 2, 32, 500, 256, 5000.0, rope, 1e-6, True, 0.1, experts)
    config = write_config(arch, "bfloat16", None, 2, 0)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_architecture(tmp_path) == arch
    # Readers that know one spelling only find everything in it.
    old, new = config["rope_scaling"], config["rope_parameters"]
    assert new["rope_theta"] == config["rope_theta"] == 5000.0
    assert (old or {"rope_type": "default"}) == {k: new[k] for k in new if k != "rope_theta"}


def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    from transformers import AutoConfig

    rope = RopeScalingConfig("llama3", 8.0, 1.5, 4.5, 128)
    arch = ArchitectureConfig(3, 64, 96, 4, 2, 32, 500, 256, 5000.0, rope, 1e-6, True, 0.1)
    config = write_config(arch, "bfloat16", None, 2, 0)
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_back = AutoConfig.from_pretrained(tmp_path)
    assert read_back.num_key_value_heads == 2 and read_back.head_dim == 32
    assert read_back.rms_norm_eps == 1e-6 and read_back.tie_word_embeddings
    assert (read_back.bos_token_id, read_back.eos_token_id, read_back.pad_token_id) == (None, 2, 0)
    assert read_back.rope_parameters["rope_theta"] == 5000.0
    assert read_back.rope_parameters["low_freq_factor"] == 1.5
