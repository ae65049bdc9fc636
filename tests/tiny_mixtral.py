"""A small mixture of experts made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import LLAMA, train_chatml

from nemo_selfpref.config.model_schema import ModelConfig
from nemo_selfpref.config.schema import AlgorithmConfig, DataConfig, ExportConfig, RunConfig
from nemo_selfpref.megatron.policy import Policy


def save_mixtral(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random Mixtral of transformers with four experts, two for each token, with a ChatML
    tokenizer, as a Hugging Face folder."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**{**LLAMA, **experts, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(str(folder))
    train_chatml(folder)
    return folder


def mixtral_policy(folder: Path) -> Policy:
    """The policy of such a folder in this process."""
    from nemo_selfpref.training.session import build_policy, find_start

    cfg = RunConfig(
        name="experts",
        model=ModelConfig(restore_from_path=str(folder)),
        data=DataConfig(train_path=[], max_length=64, max_prompt_length=32),
        algorithm=AlgorithmConfig(name="none"),
        export=ExportConfig(hf=False),
    )
    return build_policy(cfg, find_start(cfg))[0]
