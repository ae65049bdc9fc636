from __future__ import annotations

import re
from typing import Any

import pytest

from nemo_selfpref.config.checks import check_architecture, check_config
from nemo_selfpref.config.model_schema import (
    ArchitectureConfig,
    Fp8Fallback,
    LoRAConfig,
    OptimConfig,
    OptimizerName,
)
from nemo_selfpref.config.schema import DataConfig, RunConfig
from nemo_selfpref.errors import ConfigError

DENSE = ArchitectureConfig(8, 64, 128, 8, 4, 8, 500)
EXPERTS = ArchitectureConfig(8, 64, 128, 8, 4, 8, 500, num_moe_experts=4)


def run_of(devices: int, **model: Any) -> RunConfig:
    cfg = RunConfig(name="x", data=DataConfig(train_path=["a"]))
    cfg.trainer.devices, cfg.export.hf = devices, False
    for name, value in model.items():
        setattr(cfg.model, name, value)
    return cfg


TP, PP, VPP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
CP, EP, SP = "context_parallel_size", "expert_model_parallel_size", "sequence_parallel"


@pytest.mark.parametrize(
    ("devices", "model", "message"),
    [
        (6, {TP: 2, CP: 2}, "= 4. Set trainer.devices to a multiple of that."),
        (1, {CP: 0}, "model.context_parallel_size=0: expected at least 1"),
        (2, {PP: 2, VPP: 1}, "the interleaved schedule needs 2 or more of both"),
        (1, {VPP: 2}, "model.virtual_pipeline_model_parallel_size=2 with model.pipeline_mod"),
        (6, {EP: 4}, "model.expert_model_parallel_size=4 does not divide the 6 ranks"),
        (6, {TP: 2, SP: True, EP: 3}, "and the 2 ranks of tensor x context parallelism: one has"),
        (
            1,
            {"use_distributed_optimizer": True, "optim": OptimConfig(OptimizerName.rmsprop)},
            "Megatron splits the state of Adam only",
        ),
        (1, {"micro_batch_tokens": 4095}, "cannot hold a pair of two sequences of data.max_le"),
        (1, {"recompute_num_layers": 0}, "model.recompute_num_layers=0: expected at least 1"),
        (1, {"fp8_fallback": Fp8Fallback.stop}, "model.fp8_fallback does nothing without model"),
        (1, {"fp8_max_noise": 0.0}, "model.fp8_max_noise=0.0: expected a positive number"),
    ],
)
def test_contradictions(devices: int, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(run_of(devices, **model))


@pytest.mark.parametrize(
    ("devices", "model"),
    [
        (8, {TP: 2, PP: 2, VPP: 2, CP: 2, SP: True, "use_distributed_optimizer": True}),
        (8, {TP: 2, SP: True, EP: 4}),
        (8, {CP: 4, EP: 2}),
        (3, {"micro_batch_tokens": 4096}),  # no divisibility is asked of packed batches
    ],
)
def test_layouts_that_go(devices: int, model: dict[str, Any]) -> None:
    cfg = run_of(devices, **model)
    check_config(cfg)
    check_architecture(cfg, EXPERTS if EP in model else DENSE)


@pytest.mark.parametrize(
    ("model", "arch", "message"),
    [
        ({TP: 8}, DENSE, "does not divide the model's 4 key-value heads. Use a divisor of 4."),
        ({PP: 2, VPP: 3}, DENSE, "size=2 x 3 virtual stages does not divide the model's 8 layers"),
        ({EP: 2}, DENSE, "does not divide the model's 0 experts"),
        ({EP: 8}, EXPERTS, "does not divide the model's 4 experts"),
        ({TP: 2}, EXPERTS, "set model.sequence_parallel=true"),
        ({"lora": LoRAConfig(rank=4)}, EXPERTS, "experts"),
    ],
)
def test_what_a_model_cannot_be_split_into(
    model: dict[str, Any], arch: ArchitectureConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_architecture(run_of(8, **model), arch)


def test_experts_need_a_choice() -> None:
    single = ArchitectureConfig(8, 64, 128, 8, 4, 8, 500, num_moe_experts=4, moe_router_topk=1)
    with pytest.raises(ConfigError, match="expected 2 to 4"):
        check_architecture(run_of(1), single)
