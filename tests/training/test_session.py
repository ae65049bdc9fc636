from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from tiny import train_byte_level

from nemo_selfpref.checkpoint.hf_weights import HuggingFaceSource, RandomSource
from nemo_selfpref.checkpoint.sharded import ShardReader
from nemo_selfpref.checkpoint.training_state import save_weights
from nemo_selfpref.config.model_schema import ArchitectureConfig, ModelConfig, TokenizerConfig
from nemo_selfpref.config.schema import DataConfig, RunConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError, ConfigError, DataError
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.training.session import build_policy, find_start, weights_source

SMALL = ArchitectureConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=8,
    vocab_size=500,
    max_position_embeddings=128,
)


def config(folder: Path | None = None, **model: object) -> RunConfig:
    return RunConfig(
        name="test",
        data=DataConfig(train_path=[], max_length=64, max_prompt_length=32),
        model=ModelConfig(restore_from_path=str(folder) if folder else None, **model),  # type: ignore[arg-type]
    )


def test_a_hugging_face_folder(llama_folder: Path) -> None:
    start = find_start(config(llama_folder))
    assert start.arch.num_layers == 4 and start.arch.num_query_groups == 2
    assert start.tokenizer.vocab_size == 500 and start.tokenizer.end_of_turn_id == 2
    assert isinstance(weights_source(start, 1), HuggingFaceSource)


def test_a_checkpoint(policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    policy.weight_version = 9
    save_weights(tmp_path / "checkpoint", policy, tokenizer)
    cfg = config(tmp_path / "checkpoint")
    start = find_start(cfg)
    assert start.arch == policy.arch
    assert start.tokenizer.fingerprint() == tokenizer.fingerprint()
    assert isinstance(weights_source(start, 1), ShardReader)
    assert build_policy(cfg, start)[0].weight_version == 9


def test_random_weights(llama_folder: Path) -> None:
    cfg = config(architecture=SMALL, tokenizer=TokenizerConfig(path=str(llama_folder)))
    start = find_start(cfg)
    assert start.folder is None and start.arch == SMALL
    assert isinstance(weights_source(start, 1), RandomSource)
    policy, layout = build_policy(cfg, start)
    again, _ = build_policy(cfg, start)
    assert layout.world_size == 1
    pairs = zip(policy.module.parameters(), again.module.parameters(), strict=True)
    assert all(a.equal(b) for a, b in pairs)


def test_nothing_to_start_from() -> None:
    with pytest.raises(ConfigError, match=r"nothing to start from: set model.restore_from_path"):
        find_start(config())


def test_a_shape_with_gaps() -> None:
    gaps = dataclasses.replace(SMALL, num_layers=0, kv_channels=-1)
    with pytest.raises(ConfigError, match="num_layers=0, kv_channels=-1; every size"):
        find_start(config(architecture=gaps))


def test_both_a_shape_and_a_folder(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="set only one of them"):
        find_start(config(llama_folder, architecture=SMALL))


def test_a_folder_that_is_neither(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a Hugging Face folder .* or a checkpoint"):
        find_start(config(tmp_path))


def test_a_folder_without_weights(llama_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_folder, tmp_path / "x")
    (tmp_path / "x" / "model.safetensors").unlink()
    start = find_start(config(tmp_path / "x"))
    with pytest.raises(CheckpointError, match=r"holds no model.safetensors"):
        weights_source(start, 1)


def test_random_weights_need_a_tokenizer() -> None:
    with pytest.raises(DataError, match=r"model\.tokenizer\.path=null"):
        find_start(config(architecture=SMALL))


def test_a_tokenizer_larger_than_the_model(llama_folder: Path) -> None:
    small = dataclasses.replace(SMALL, vocab_size=499)
    cfg = config(architecture=small, tokenizer=TokenizerConfig(path=str(llama_folder)))
    with pytest.raises(ConfigError, match="tokenizer has 500 entries, the model only 499"):
        find_start(cfg)


def test_the_model_is_checked_against_the_layout(llama_folder: Path) -> None:
    with pytest.raises(ConfigError, match="pipeline_model_parallel_size=3 does not divide"):
        find_start(config(llama_folder, pipeline_model_parallel_size=3))


def test_a_tokenizer_without_a_template(llama_folder: Path, tmp_path: Path) -> None:
    plain = train_byte_level(tmp_path, ["<|endoftext|>"], None, eos_token="<|endoftext|>")
    cfg = config(llama_folder, tokenizer=TokenizerConfig(path=str(plain)))
    with pytest.raises(DataError, match="template"):
        find_start(cfg)
