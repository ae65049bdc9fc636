from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from nemo_selfpref.config.checks import check_architecture, check_config, check_optim
from nemo_selfpref.config.model_schema import (
    ArchitectureConfig,
    OptimConfig,
    OptimizerName,
    SchedulerConfig,
)
from nemo_selfpref.config.schema import DataConfig, RunConfig
from nemo_selfpref.errors import ConfigError


def good() -> RunConfig:
    return RunConfig(name="test", data=DataConfig(train_path=["rows.jsonl"]))


def change(path: str, value: object) -> RunConfig:
    cfg: object = good()
    *groups, name = path.split(".")
    node = cfg
    for group in groups:
        node = getattr(node, group)
    assert hasattr(node, name)
    setattr(node, name, value)
    return cfg  # type: ignore[return-value]


def test_the_defaults_pass() -> None:
    check_config(good())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("trainer.devices", 0, "trainer.devices=0: expected at least 1"),
        ("trainer.num_nodes", -1, "trainer.num_nodes=-1: expected at least 1"),
        ("trainer.max_epochs", 0, "trainer.max_epochs=0: expected at least 1"),
        ("trainer.log_every_n_steps", 0, "trainer.log_every_n_steps=0: expected at least 1"),
        ("trainer.max_steps", 0, "trainer.max_steps=0: expected a positive number, or -1"),
        ("trainer.max_steps", -2, "trainer.max_steps=-2: expected a positive number, or -1"),
        ("trainer.gradient_clip_val", -0.5, "trainer.gradient_clip_val=-0.5: expected 0 (off)"),
        (
            "model.tensor_model_parallel_size",
            2,
            "1 processes (trainer.devices x trainer.num_nodes) cannot be split into replicas of "
            "model.tensor_model_parallel_size=2 x model.pipeline_model_parallel_size=1 x "
            "model.context_parallel_size=1 = 2.",
        ),
        ("model.pipeline_model_parallel_size", 0, "model.pipeline_model_parallel_size=0: expect"),
        ("model.sequence_parallel", True, "does nothing without tensor parallelism"),
        ("model.micro_batch_size", 0, "model.micro_batch_size=0: expected at least 1"),
        ("model.logprob_chunk_size", 0, "model.logprob_chunk_size=0: expected at least 1"),
        ("model.reference_cache_dir", " ", "model.reference_cache_dir is empty: give a folder"),
        ("model.reference_cache_max_gb", -1.0, "cache_max_gb=-1.0: expected 0 (no bound) or more"),
        ("model.reference_cache_max_gb", float("nan"), "max_gb=nan: expected 0 (no bound) or more"),
        ("model.reference_cache_max_gb", 5.0, "max_gb=5.0 does nothing without model.reference_c"),
        (
            "model.global_batch_size",
            63,
            "model.global_batch_size=63 is not a multiple of model.micro_batch_size=4 x 1 "
            "data-parallel replicas = 4. Use 64.",
        ),
        (
            "data.max_prompt_length",
            2048,
            "data.max_prompt_length=2048 leaves no room for an answer within data.max_length=2048",
        ),
        ("data.limit", 0, "data.limit=0: expected at least 1, or null"),
        ("rollout.temperature", -0.1, "rollout.temperature=-0.1: expected 0 (greedy) or more"),
        ("rollout.top_p", 0.0, "rollout.top_p=0.0: expected 0 < top_p <= 1"),
        ("rollout.top_p", 1.5, "rollout.top_p=1.5: expected 0 < top_p <= 1"),
        ("rollout.top_k", -1, "rollout.top_k=-1: expected 0 (off) or more"),
        ("rollout.max_new_tokens", 0, "rollout.max_new_tokens=0: expected at least 1"),
        ("rollout.batch_size", 0, "rollout.batch_size=0: expected at least 1"),
        ("model.optim.lr", 0.0, "model.optim.lr=0.0: expected a positive number"),
        ("model.optim.lr", float("nan"), "model.optim.lr=nan: expected a positive number"),
        ("model.optim.betas", [0.9], "model.optim.betas=[0.9]: expected two numbers in [0, 1)"),
        ("model.optim.betas", [0.9, 1.0], "model.optim.betas=[0.9, 1.0]: expected two numbers"),
        ("model.optim.weight_decay", -1.0, "model.optim.weight_decay=-1.0: expected 0 or more"),
        ("model.optim.sched.warmup_ratio", 1.0, "sched.warmup_ratio=1.0: expected [0, 1)"),
        ("model.optim.sched.min_lr", 1.0, "sched.min_lr=1.0: expected 0 <= min_lr <= lr"),
    ],
)
def test_a_contradiction(path: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config(change(path, value))


def test_every_contradiction_is_named_at_once() -> None:
    cfg = good()
    cfg.trainer.max_epochs, cfg.rollout.top_k, cfg.data.limit = 0, -1, 0
    with pytest.raises(ConfigError) as caught:
        check_config(cfg)
    assert [line.split("=")[0] for line in str(caught.value).splitlines()] == [
        "trainer.max_epochs",
        "data.limit",
        "rollout.top_k",
    ]


def test_warmup_is_given_once() -> None:
    optim = OptimConfig(sched=SchedulerConfig(warmup_steps=5, warmup_ratio=0.1))
    with pytest.raises(ConfigError, match=r"where\.sched: give warmup_steps or warmup_ratio, not"):
        check_optim("where", optim)


def test_each_optimizer_takes_its_own_settings() -> None:
    check_optim("where", OptimConfig(OptimizerName.adamw, betas=[0.8, 0.95]))
    check_optim("where", OptimConfig(OptimizerName.rmsprop, alpha=0.9))
    check_optim("where", OptimConfig(OptimizerName.rmsprop, alpha=0.0))


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (
            OptimConfig(OptimizerName.rmsprop, betas=[0.9, 0.95]),
            "where.betas=[0.9, 0.95] does nothing with where.name=rmsprop, whose smoothing "
            "constant is where.alpha. Set that, or where.name=adamw.",
        ),
        (
            OptimConfig(OptimizerName.adamw, alpha=0.9),
            "where.alpha=0.9 does nothing with where.name=adamw, whose smoothing constants are "
            "where.betas. Set those, or where.name=rmsprop.",
        ),
    ],
)
def test_settings_of_the_other_optimizer(optim: OptimConfig, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_optim("where", optim)
    assert str(caught.value) == message


@pytest.mark.parametrize("alpha", [1.0, -0.1, float("nan")])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(ConfigError, match=r"^where\.alpha=\S+: expected 0 <= alpha < 1$"):
        check_optim("where", OptimConfig(OptimizerName.rmsprop, alpha=alpha))


def test_a_batch_split_over_replicas() -> None:
    cfg = good()
    cfg.trainer.devices, cfg.trainer.num_nodes = 4, 2
    cfg.model.tensor_model_parallel_size = 2
    check_config(cfg)  # 64 = 4 rows x 4 replicas x 4 micro-batches
    cfg.model.global_batch_size = 24
    with pytest.raises(ConfigError, match=r"size=4 x 4 data-parallel replicas = 16\. Use 32\."):
        check_config(cfg)


ARCH = ArchitectureConfig(6, 96, 128, 6, 3, 16, 500, max_position_embeddings=2048)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (
            lambda cfg, arch: setattr(cfg.model, "tensor_model_parallel_size", 4),
            "tensor_model_parallel_size=4 does not divide the model's 6 attention heads. Use a "
            "divisor of 6.",
        ),
        (
            lambda cfg, arch: setattr(cfg.model, "tensor_model_parallel_size", 2),
            "tensor_model_parallel_size=2 does not divide the model's 3 key-value heads",
        ),
        (
            lambda cfg, arch: setattr(cfg.model, "tensor_model_parallel_size", 3),
            "tensor_model_parallel_size=3 does not divide the model's 128 feed-forward channels",
        ),
        (
            lambda cfg, arch: setattr(cfg.model, "pipeline_model_parallel_size", 4),
            "pipeline_model_parallel_size=4 does not divide the model's 6 layers",
        ),
        (
            lambda cfg, arch: setattr(arch, "num_query_groups", 4),
            "6 attention heads cannot share 4 key-value heads evenly",
        ),
        (lambda cfg, arch: setattr(arch, "kv_channels", 15), "kv_channels=15: the rotary"),
        (
            lambda cfg, arch: setattr(arch, "max_position_embeddings", 2047),
            "data.max_length=2048 passes the model's 2047 positions. Lower data.max_length.",
        ),
    ],
)
def test_a_model_that_cannot_be_split(
    alter: Callable[[RunConfig, ArchitectureConfig], None], message: str
) -> None:
    cfg, arch = good(), ArchitectureConfig(**vars(ARCH))
    check_architecture(cfg, arch)
    alter(cfg, arch)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_architecture(cfg, arch)
