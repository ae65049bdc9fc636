"""A mixture of experts comes from a Hugging Face folder and goes back to one as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_mixtral import mixtral_policy, save_mixtral

from nemo_selfpref.checkpoint.export import export_checkpoint
from nemo_selfpref.checkpoint.hf_config import read_architecture
from nemo_selfpref.checkpoint.hf_weights import HuggingFaceSource
from nemo_selfpref.checkpoint.training_state import save_weights
from nemo_selfpref.checkpoint.verify import compare, hf_logits, policy_logits, verify_export
from nemo_selfpref.checkpoint.weight_stream import stream_weights
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.megatron.policy import Policy

FC1 = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
PROMPTS = [(5, 6, 7), (30, 31), (9,) * 20, tuple(range(40, 90))]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture
def policy(mixtral: Path) -> Policy:
    return mixtral_policy(mixtral)


def test_logits_are_those_of_transformers(policy: Policy, mixtral: Path) -> None:
    ours = policy_logits(policy, PROMPTS)
    assert ours is not None and policy.arch.num_moe_experts == 4
    compare(ours, hf_logits(mixtral, PROMPTS)).check(1e-4, mixtral)


def test_import_export_and_stream_keep_every_tensor(
    policy: Policy, mixtral: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    save_weights(tmp_path / "checkpoint", policy, tokenizer)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    before = load_file(mixtral / "model.safetensors")
    streamed = dict(stream_weights(policy, torch.float32))
    for after in (load_file(tmp_path / "hf" / "model.safetensors"), streamed):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "mixtral"
    verify_export(policy, tokenizer, tmp_path / "hf")


def test_an_exchange_of_two_experts_is_seen(
    policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    save_weights(tmp_path / "checkpoint", policy, tokenizer)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    for layer in range(4):
        names = [f"model.layers.{layer}.block_sparse_moe.experts.{e}.w1.weight" for e in (0, 3)]
        tensors.update(zip(names, [tensors[name] for name in reversed(names)], strict=True))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="Do not use this folder"):
        verify_export(policy, tokenizer, tmp_path / "hf")


def test_one_expert_is_read_alone(mixtral: Path) -> None:
    """A rank that holds some experts reads no others."""
    source = HuggingFaceSource(mixtral, read_architecture(mixtral))
    whole = source.read(FC1, (0, 0, 0), (4, 192, 64))
    fetched: list[str] = []
    fetch = source.fetch

    def noting(name: str) -> torch.Tensor:
        fetched.append(name)
        return fetch(name)

    source.fetch = noting  # type: ignore[method-assign]
    part = source.read(FC1, (2, 96, 0), (1, 96, 64))
    assert torch.equal(part, whole[2:3, 96:])
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    assert fetched == [f"{prefix}.w1.weight", f"{prefix}.w3.weight"]


def test_an_expert_of_another_shape_is_refused(mixtral: Path, tmp_path: Path) -> None:
    tensors = load_file(mixtral / "model.safetensors")
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"] = torch.zeros(95, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    source = HuggingFaceSource(tmp_path, read_architecture(mixtral))
    with pytest.raises(CheckpointError, match=r"shape \(1, 191, 64\), config\.json says \(1, 192"):
        source.read(FC1, (2, 0, 0), (1, 96, 64))
