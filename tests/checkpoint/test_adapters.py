"""Adapters begin at no change, survive a checkpoint, and merge into the weights they belong to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import with_adapters
from torch import Tensor

from nemo_selfpref.checkpoint.export import export_checkpoint
from nemo_selfpref.checkpoint.hf_weights import RandomSource
from nemo_selfpref.checkpoint.lora import FreshAdapters, MergedSource, adapter_shapes
from nemo_selfpref.checkpoint.training_state import (
    lora_of,
    merged_weights_of,
    save_weights,
    weights_of,
)
from nemo_selfpref.checkpoint.verify import hf_logits, policy_logits, verify_export
from nemo_selfpref.config.model_schema import LoRAConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.files import read_json
from nemo_selfpref.megatron.lora import is_adapter
from nemo_selfpref.megatron.policy import Policy

LORA = LoRAConfig(rank=4, alpha=8.0)
PROMPTS = [(5, 6, 7), (30, 31), (9,) * 20]
FC1 = "decoder.layers.1.mlp.linear_fc1"


def logits(policy: Policy) -> Tensor:
    found = policy_logits(policy, PROMPTS)
    assert found is not None
    return found


def adapters_of(policy: Policy) -> dict[str, Tensor]:
    named = policy.module.named_parameters()
    return {name: p.detach() for name, p in named if is_adapter(name)}


@torch.no_grad()
def move(policy: Policy) -> None:
    """Adapters as training might leave them."""
    generator = torch.Generator().manual_seed(3)
    for adapter in adapters_of(policy).values():
        adapter.copy_(torch.randn(adapter.shape, generator=generator) * 0.05)
    policy.weight_version += 1


@pytest.fixture
def moved(llama_folder: Path) -> Policy:
    policy = with_adapters(llama_folder, LORA)
    move(policy)
    return policy


@pytest.fixture
def checkpoint(moved: Policy, tokenizer: ChatTokenizer, tmp_path: Path) -> Path:
    save_weights(tmp_path / "checkpoint", moved, tokenizer)
    return tmp_path / "checkpoint"


def test_fresh_adapters(llama_folder: Path, policy: Policy) -> None:
    base = RandomSource(policy.arch, 1)
    source = FreshAdapters(base, policy.arch, LORA, 1)
    a = source.read(f"{FC1}.lora_a", (0, 0), (4, 64))
    # Uniform in +-1/8: the mean of |a| is 1/16.
    assert float(a.abs().max()) <= 0.125 and float(a.abs().mean()) == pytest.approx(
        1 / 16, abs=0.01
    )
    assert not source.read(f"{FC1}.lora_b", (96, 0), (96, 4)).any()
    part = source.read(f"{FC1}.lora_a", (1, 32), (2, 32))
    assert torch.equal(part, a[1:3, 32:])
    seeded = FreshAdapters(base, policy.arch, LORA, 2).read(f"{FC1}.lora_a", (0, 0), (4, 64))
    other = source.read("decoder.layers.2.mlp.linear_fc1.lora_a", (0, 0), (4, 64))
    assert not torch.equal(seeded, a) and not torch.equal(other, a)
    weight = (f"{FC1}.weight", (2, 0), (3, 64))
    assert torch.equal(source.read(*weight), base.read(*weight))


def test_the_shapes_are_those_of_the_network(moved: Policy) -> None:
    shapes = {name: tuple(t.shape) for name, t in adapters_of(moved).items()}
    assert shapes == adapter_shapes(moved.arch, LORA)
    only = LoRAConfig(rank=2, target_modules=["linear_proj"])
    assert {n.split(".")[-2] for n in adapter_shapes(moved.arch, only)} == {"linear_proj"}


def test_a_part_of_a_merged_weight(checkpoint: Path, moved: Policy) -> None:
    layer = moved.module.get_submodule(FC1)
    w, a, b = (getattr(layer, n).detach() for n in ("weight", "lora_a", "lora_b"))
    source = merged_weights_of(checkpoint)
    assert isinstance(source, MergedSource)
    got = source.read(f"{FC1}.weight", (90, 8), (20, 16))  # over the seam of gate and up
    want = w[90:110, 8:24] + 2.0 * b[90:110] @ a[:, 8:24]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    norm = "decoder.final_layernorm.weight"
    assert torch.equal(
        source.read(norm, (0,), (64,)), weights_of(checkpoint).read(norm, (0,), (64,))
    )


def test_a_checkpoint_gives_the_adapters_back(checkpoint: Path, moved: Policy) -> None:
    assert lora_of(checkpoint) == LORA
    again = with_adapters(checkpoint, LORA)
    assert again.weight_version == 1
    pairs = zip(moved.module.named_parameters(), again.module.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    assert torch.equal(logits(again), logits(moved))


@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(target_modules=["linear_fc1"])])
def test_a_model_without_adapters_reads_them_merged(
    checkpoint: Path, moved: Policy, policy: Policy, lora: LoRAConfig
) -> None:
    merged = with_adapters(checkpoint, lora)
    assert not adapters_of(merged)
    assert all(p.requires_grad for p in merged.module.parameters())
    torch.testing.assert_close(logits(merged), logits(moved), rtol=0, atol=1e-5)
    assert float((logits(merged) - logits(policy)).abs().max()) > 0.1


def test_fresh_adapters_beside_a_checkpoint(
    policy: Policy, tokenizer: ChatTokenizer, llama_folder: Path, tmp_path: Path
) -> None:
    save_weights(tmp_path / "plain", policy, tokenizer)
    assert read_json(tmp_path / "plain" / "checkpoint.json")["lora"] is None
    ours = adapters_of(with_adapters(tmp_path / "plain", LORA))
    theirs = adapters_of(with_adapters(llama_folder, LORA))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoRAConfig(rank=8, alpha=8.0), "model.lora.rank: 4 there, 8 here"),
        (LoRAConfig(rank=4, alpha=16.0), r"model.lora.alpha: 8.0 there, 16.0 here"),
        (LoRAConfig(4, 8.0, ["linear_qkv"]), "model.lora.target_modules: "),
    ],
)
def test_other_adapters_are_refused(checkpoint: Path, lora: LoRAConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_adapters(checkpoint, lora)


def test_the_order_of_the_targets_does_not_matter(checkpoint: Path) -> None:
    with_adapters(checkpoint, LoRAConfig(4, 8.0, LORA.target_modules[::-1]))


@pytest.mark.parametrize("which", ["llama_folder", "tied_folder"])
def test_an_export_is_merged(
    which: str,
    request: pytest.FixtureRequest,
    tokenizer: ChatTokenizer,
    tmp_path: Path,
) -> None:
    folder = request.getfixturevalue(which)
    policy = with_adapters(folder, LORA)
    move(policy)
    save_weights(tmp_path / "checkpoint", policy, tokenizer)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")}
    torch.testing.assert_close(
        hf_logits(tmp_path / "hf", PROMPTS), logits(policy), rtol=0, atol=1e-5
    )
    result = verify_export(policy, tokenizer, tmp_path / "hf")
    assert result is not None and result.top1_equal == result.prompts
