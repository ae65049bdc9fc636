"""Every file of conf/model goes with every method, and splits the model it is for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.checkpoint.hf_config import read_architecture
from nemo_selfpref.config.checks import check_architecture, check_config
from nemo_selfpref.config.loader import load_config, to_typed
from nemo_selfpref.config.paths import conf_dir
from nemo_selfpref.config.schema import Precision, RunConfig
from nemo_selfpref.errors import ConfigError

MODELS = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
METHODS = sorted(path.stem for path in conf_dir().glob("*.yaml"))
SCHEMAS = {name: cls.config_class for name, cls in algorithms().items()}


def llama(layers: int, hidden: int, ffn: int, heads: int, groups: int, **more: Any) -> dict:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 32768,
        **more,
    }


QWEN2 = {"model_type": "qwen2", "vocab_size": 152064, "use_sliding_window": False}
SHAPES = {
    "llama3_8b": llama(32, 4096, 14336, 32, 8, vocab_size=128256),
    "llama3_70b": llama(80, 8192, 28672, 64, 8, vocab_size=128256),
    "mistral_7b": llama(
        32, 4096, 14336, 32, 8, vocab_size=32768, model_type="mistral", sliding_window=None
    ),
    "mixtral_8x7b": llama(
        *(32, 4096, 14336, 32, 8),
        vocab_size=32000,
        model_type="mixtral",
        num_local_experts=8,
        num_experts_per_tok=2,
    ),
    "qwen2_5_7b": llama(28, 3584, 18944, 28, 4, **QWEN2),
    "qwen2_5_72b": llama(80, 8192, 29568, 64, 8, **QWEN2),
    "qwen3_8b": llama(36, 4096, 12288, 32, 8, vocab_size=151936, model_type="qwen3", head_dim=128),
    "qwen3_30b_a3b": llama(
        *(48, 2048, 6144, 32, 4),
        vocab_size=151936,
        model_type="qwen3_moe",
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    "tinyllama": llama(22, 2048, 5632, 32, 4, vocab_size=32000, max_position_embeddings=2048),
}
"""The models' own config.json, as far as a layout depends on it."""


def run_of(method: str, model: str, *more: str) -> RunConfig:
    targets = ["algorithm.targets.source=file", "algorithm.targets.path=answers.jsonl"]
    overrides = [
        "data.train_path=[rows.jsonl]",
        f"model={model}",
        *(targets if method == "sgpo" else []),
        *more,
    ]
    return to_typed(load_config(method, overrides, SCHEMAS))


@pytest.mark.parametrize("model", MODELS)
def test_a_model_goes_with_every_method(model: str, tmp_path: Path) -> None:
    for method in METHODS:
        cfg = run_of(method, model)
        check_config(cfg)
        algorithms()[cfg.algorithm.name](cfg.algorithm).check(cfg)
        arch = cfg.model.architecture
        if model in SHAPES:
            (tmp_path / "config.json").write_text(json.dumps(SHAPES[model]))
            arch = read_architecture(tmp_path)
        check_architecture(cfg, arch)


def test_every_model_file_has_a_shape_to_hold_it_against() -> None:
    assert {*SHAPES, "tiny"} == set(MODELS)


@pytest.mark.parametrize("model", sorted(SHAPES))
def test_weights_are_the_users_to_give_and_large_models_are_split(
    model: str, tmp_path: Path
) -> None:
    """18 bytes a weight (bf16, and float32 gradient, main weight and two moments) fit 80 GB with
    room for activations and a frozen copy."""
    from nemo_selfpref.checkpoint.hf_weights import megatron_shapes

    cfg = run_of("dpo", model)
    assert cfg.model.restore_from_path is None and cfg.trainer.precision is Precision.bf16
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[model]))
    m, held = cfg.model, 0.0
    stages = m.pipeline_model_parallel_size
    for key, shape in megatron_shapes(read_architecture(tmp_path)).items():
        count = 1
        for size in shape:
            count *= size
        split = m.tensor_model_parallel_size if len(shape) == 2 and "router" not in key else 1
        if len(shape) == 3:
            split = m.expert_model_parallel_size
        held += count / (split * (stages if "layers" in key else 1))
    assert held * 18 / 1e9 < 50


def test_a_methods_settings_come_after_a_models_and_the_users_last() -> None:
    cfg = run_of("orpo", "tiny")
    assert cfg.model.optim.lr == 5e-6  # orpo.yaml's, not the tiny model's 1e-3
    assert run_of("dpo", "tiny").model.optim.lr == 1e-3
    assert run_of("orpo", "tiny", "model.optim.lr=0.25").model.optim.lr == 0.25
    cfg = run_of("sgpo", "llama3_8b", "model.restore_from_path=/models/x", "trainer.devices=4")
    assert cfg.model.restore_from_path == "/models/x" and cfg.trainer.devices == 4
    assert cfg.model.tensor_model_parallel_size == 4 and cfg.model.global_batch_size == 128


def test_without_a_model_nothing_changes() -> None:
    plain = to_typed(load_config("dpo", ["data.train_path=[rows.jsonl]"], SCHEMAS))
    assert plain.model.tensor_model_parallel_size == 1
    assert plain.trainer.precision is Precision.fp32 and plain.model.architecture.num_layers == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=lama3_8b", "model=lama3_8b: expected one of llama3_70b, llama3_8b, mistral_7b"),
        ("model={rank: 1}", "unknown setting 'model.rank'"),
        ("model=null", "must be a string or a list"),
    ],
)
def test_a_model_that_there_is_not(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("dpo", ["data.train_path=[rows.jsonl]", override], SCHEMAS)


def test_a_model_file_of_ones_own(tmp_path: Path) -> None:
    """Beside a configuration of one's own; the shipped ones stay within reach."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "ours.yaml").write_text("micro_batch_size: 2\nglobal_batch_size: 6\n")
    text = "defaults: [run_schema, {algorithm: dpo}, _self_]\nname: mine\n"
    (tmp_path / "mine.yaml").write_text(text)
    rows = "data.train_path=[rows.jsonl]"
    cfg = to_typed(load_config("mine", [rows, "model=ours"], SCHEMAS, tmp_path))
    assert (cfg.model.micro_batch_size, cfg.model.global_batch_size) == (2, 6)
    cfg = to_typed(load_config("mine", [rows, "model=llama3_8b"], SCHEMAS, tmp_path))
    assert cfg.model.tensor_model_parallel_size == 4
