"""An exported folder computes what the policy computes, and damage to it is seen."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MakePolicy, save_llama
from torch import Tensor

from nemo_selfpref.checkpoint import export
from nemo_selfpref.checkpoint.export import export_checkpoint
from nemo_selfpref.checkpoint.training_state import save_weights
from nemo_selfpref.checkpoint.verify import (
    PROBES,
    Comparison,
    compare,
    hf_logits,
    policy_logits,
    verify_export,
)
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import sha256_of
from nemo_selfpref.megatron.policy import Policy

TOLERANCE = 1e-4
HEADS, KV_HEADS, DIM = 4, 2, 16
Tensors = dict[str, Tensor]


def prompts() -> list[tuple[int, ...]]:
    """Forty prompts of 1 to 40 tokens."""
    random_ = random.Random(0)
    return [tuple(random_.choices(range(3, 500), k=n)) for n in range(1, 41)]


def export_of(policy: Policy, tokenizer: ChatTokenizer, folder: Path) -> Path:
    save_weights(folder / "checkpoint", policy, tokenizer)
    export_checkpoint(folder / "checkpoint", folder / "hf")
    return folder / "hf"


@pytest.fixture
def exported(policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path) -> Path:
    return export_of(policy, tokenizer, tmp_path)


@pytest.mark.parametrize("which", ["llama_folder", "tied_folder"])
def test_import_and_export_keep_every_tensor(
    which: str,
    request: pytest.FixtureRequest,
    make_policy: MakePolicy,
    tokenizer: ChatTokenizer,
    tmp_path: Path,
) -> None:
    folder: Path = request.getfixturevalue(which)
    out = export_of(make_policy(folder), tokenizer, tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("which", ["llama_folder", "tied_folder"])
def test_logits_equal_those_of_transformers(
    which: str,
    request: pytest.FixtureRequest,
    make_policy: MakePolicy,
    tokenizer: ChatTokenizer,
    tmp_path: Path,
) -> None:
    policy = make_policy(request.getfixturevalue(which))
    out = export_of(policy, tokenizer, tmp_path)
    ours = policy_logits(policy, prompts())
    assert ours is not None and ours.shape == (40, 500)
    result = compare(ours, hf_logits(out, prompts()))
    assert result.max_difference <= TOLERANCE and result.top1_equal == result.prompts == 40


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_logits_with_scaled_positions(
    rope: dict[str, object], make_policy: MakePolicy, tmp_path: Path
) -> None:
    parameters = {"rope_theta": 10000.0, **rope}
    folder = save_llama(tmp_path / "llama", rope_parameters=parameters)
    ours = policy_logits(make_policy(folder), prompts())
    plain = policy_logits(make_policy(save_llama(tmp_path / "plain")), prompts())
    assert ours is not None and plain is not None
    compare(ours, hf_logits(folder, prompts())).check(TOLERANCE, folder)
    assert compare(ours, plain).max_difference > 0.01


def swap_gate_and_up(tensors: Tensors) -> None:
    for layer in range(4):
        gate, up = (f"model.layers.{layer}.mlp.{n}_proj.weight" for n in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]


def interleave_rope(tensors: Tensors) -> None:
    """Rows as a model that rotates neighbouring channels has them."""
    for layer in range(4):
        for name, heads in (("q", HEADS), ("k", KV_HEADS)):
            key = f"model.layers.{layer}.self_attn.{name}_proj.weight"
            halves = tensors[key].reshape(heads, 2, DIM // 2, -1)
            tensors[key] = halves.transpose(1, 2).reshape(heads * DIM, -1).contiguous()


def zero_ten_words(tensors: Tensors) -> None:
    tensors["lm_head.weight"][490:] = 0


@pytest.mark.parametrize("damage", [swap_gate_and_up, interleave_rope, zero_ten_words])
def test_a_wrong_export_is_refused(
    damage: Callable[[Tensors], None],
    exported: Path,
    policy: Policy,
    tokenizer: ChatTokenizer,
) -> None:
    result = verify_export(policy, tokenizer, exported)
    assert result is not None and result.prompts == len(PROBES)
    assert result.max_difference <= TOLERANCE
    path = exported / "model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="Do not use this folder"):
        verify_export(policy, tokenizer, exported)


def test_comparison_by_hand() -> None:
    ours = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    theirs = torch.tensor([[1.0, 2.5], [3.0, 3.25]])
    result = compare(ours, theirs)
    assert result == Comparison(prompts=2, max_difference=3.25, top1_equal=1)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Comparison(3, 0.5, 3), r"up to 0\.5 \(at most 0\.1 is accepted\); .* 3 of 3 prompts"),
        (Comparison(3, 0.0, 2), "the best token agrees for 2 of 3 prompts"),
    ],
)
def test_a_failed_comparison_says_how_far(result: Comparison, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^there: .*{message}"):
        result.check(0.1, Path("there"))
    Comparison(3, 0.1, 3).check(0.1, Path("there"))


def test_files_of_an_export(exported: Path, llama_folder: Path, tokenizer: ChatTokenizer) -> None:
    from transformers import AutoTokenizer

    names = {p.name for p in exported.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "manifest.json"} <= names
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [0, 2], "pad_token_id": 0, "do_sample": False}
    text = "Numbers such as 100"
    assert tuple(AutoTokenizer.from_pretrained(exported)(text)["input_ids"]) == (
        tokenizer.encode_text(text)
    )
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in exported.iterdir())


def test_manifest_sums(exported: Path) -> None:
    sums = json.loads((exported / "manifest.json").read_text())["sha256"]
    others = {p.name for p in exported.iterdir()} - {"manifest.json"}
    assert sums == {name: sha256_of(exported / name) for name in others}


def test_an_export_in_several_files(
    policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The embedding alone is 500 x 64 x 4 bytes.
    monkeypatch.setattr(export, "_FILE_BYTES", 130_000)
    out = export_of(policy, tokenizer, tmp_path)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count > 2
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    tensors = {n: t for file in files for n, t in load_file(out / file).items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    verify_export(policy, tokenizer, out)


def test_exporting_twice_replaces_the_folder(exported: Path) -> None:
    (exported / "stray").write_text("x")
    export_checkpoint(exported.parent / "checkpoint", exported)
    assert not (exported / "stray").exists()


def test_a_damaged_checkpoint_is_not_exported(exported: Path) -> None:
    shutil.rmtree(exported)
    shard = exported.parent / "checkpoint" / "weights" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"shard-00000\.safetensors is damaged"):
        export_checkpoint(exported.parent / "checkpoint", exported)
    assert not exported.exists()
