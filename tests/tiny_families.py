"""A small random model of each Hugging Face family made on the spot."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny import LLAMA, train_chatml

from nemo_selfpref.config.model_schema import ModelConfig
from nemo_selfpref.config.schema import AlgorithmConfig, DataConfig, ExportConfig, RunConfig
from nemo_selfpref.megatron.policy import Policy

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_QWEN3_MOE = {
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
}


@dataclass(frozen=True)
class Tiny:
    """One model: the type it is of, and what sets it apart from the tiny Llama."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "llama2": Tiny("llama", {"num_key_value_heads": 4}),
    "llama3": Tiny("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama3_1": Tiny("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama3_2": Tiny("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "mistral": Tiny("mistral", {"sliding_window": None, "head_dim": 32}),
    "mixtral": Tiny("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Tiny("qwen2", {"rms_norm_eps": 1e-6}),
    "qwen2_tied": Tiny("qwen2", {"tie_word_embeddings": True}),
    "qwen3": Tiny("qwen3", {"head_dim": 32, "rms_norm_eps": 1e-6}),
    "qwen3_tied": Tiny("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": Tiny("qwen3_moe", {**_QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3_moe_raw": Tiny("qwen3_moe", {**_QWEN3_MOE, "norm_topk_prob": False}),
}


def save_family(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """A random model of transformers with a ChatML tokenizer, as a Hugging Face folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny = MODELS[name]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(tiny.model_type, **{**LLAMA, **tiny.changes, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if "norm" in key:  # Norms of one and biases of zero would hide a mix-up.
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif key.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(str(folder))
    train_chatml(folder)
    return folder


def family_policy(folder: Path, **model: Any) -> Policy:
    """The policy of such a folder in this process."""
    from nemo_selfpref.training.session import build_policy, find_start

    cfg = RunConfig(
        name="families",
        model=ModelConfig(restore_from_path=str(folder), **model),
        data=DataConfig(train_path=[], max_length=64, max_prompt_length=32),
        algorithm=AlgorithmConfig(name="none"),
        export=ExportConfig(hf=False),
    )
    return build_policy(cfg, find_start(cfg))[0]
