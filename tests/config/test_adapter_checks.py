from __future__ import annotations

import re

import pytest

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.checks import check_architecture, check_config, check_lora
from nemo_selfpref.config.loader import load_config, to_typed
from nemo_selfpref.config.model_schema import ArchitectureConfig, LoRAConfig
from nemo_selfpref.config.schema import DataConfig, RunConfig
from nemo_selfpref.errors import ConfigError


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoRAConfig(rank=-1), "model.lora.rank=-1: expected 0 (off) or more"),
        (LoRAConfig(rank=4, alpha=0.0), "model.lora.alpha=0.0: expected a positive number"),
        (LoRAConfig(rank=4, alpha=float("nan")), "model.lora.alpha=nan: expected a positive"),
        (LoRAConfig(rank=4, alpha=float("inf")), "model.lora.alpha=inf: expected a positive"),
        (
            LoRAConfig(rank=4, target_modules=["q_proj", "linear_fc1", "all"]),
            "no layer is called q_proj, all; expected some of linear_qkv, linear_proj, "
            "linear_fc1, linear_fc2",
        ),
        (
            LoRAConfig(rank=4, target_modules=[]),
            "model.lora.rank=4 with no model.lora.target_modules trains nothing.",
        ),
    ],
)
def test_adapters_that_cannot_be_built(lora: LoRAConfig, message: str) -> None:
    cfg = RunConfig(name="test", data=DataConfig(train_path=["rows.jsonl"]))
    check_config(cfg)
    cfg.model.lora = lora
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(cfg)


def test_adapters_that_can() -> None:
    check_lora(LoRAConfig(rank=0, target_modules=[]))
    check_lora(LoRAConfig(rank=1, alpha=0.5, target_modules=["linear_qkv"]))


def test_experts_have_none() -> None:
    cfg = RunConfig(name="test", data=DataConfig(train_path=["rows.jsonl"]))
    arch = ArchitectureConfig(4, 64, 96, 4, 2, 16, 500)
    cfg.model.lora.rank = 4
    check_architecture(cfg, arch)
    arch.num_moe_experts = 4
    with pytest.raises(ConfigError, match=r"model\.lora\.rank=4 on a model with 4 experts"):
        check_architecture(cfg, arch)


def test_settings_from_the_command_line() -> None:
    given = [
        "data.train_path=[a.jsonl]",
        "model.lora.rank=8",
        "model.lora.target_modules=[linear_qkv]",
    ]
    schemas = {name: cls.config_class for name, cls in algorithms().items()}
    lora = to_typed(load_config("dpo", given, schemas)).model.lora
    assert lora == LoRAConfig(rank=8, alpha=32.0, target_modules=["linear_qkv"])
