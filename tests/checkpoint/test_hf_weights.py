from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_selfpref.checkpoint.hf_config import read_architecture
from nemo_selfpref.checkpoint.hf_weights import (
    HuggingFaceSource,
    RandomSource,
    megatron_shapes,
    read_part,
    to_huggingface,
    to_megatron,
)
from nemo_selfpref.config.model_schema import ArchitectureConfig
from nemo_selfpref.errors import CheckpointError

TWO_GROUPS = ArchitectureConfig(
    num_layers=1,
    hidden_size=1,
    ffn_hidden_size=3,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=2,
    vocab_size=5,
)


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def test_query_key_value_of_a_group_lie_together() -> None:
    # Four query heads of two channels each; heads 0, 1 belong to key-value head 0, heads 2, 3 to 1.
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": column(*range(8)),
        "model.layers.0.self_attn.k_proj.weight": column(10, 11, 12, 13),
        "model.layers.0.self_attn.v_proj.weight": column(20, 21, 22, 23),
    }
    key = "decoder.layers.0.self_attention.linear_qkv.weight"
    joined = to_megatron(key, tensors.__getitem__, TWO_GROUPS)
    assert joined[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]
    back = dict(to_huggingface(key, joined, TWO_GROUPS))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_gate_comes_before_up() -> None:
    tensors = {
        "model.layers.7.mlp.gate_proj.weight": column(1, 2, 3),
        "model.layers.7.mlp.up_proj.weight": column(4, 5, 6),
    }
    key = "decoder.layers.7.mlp.linear_fc1.weight"
    joined = to_megatron(key, tensors.__getitem__, TWO_GROUPS)
    assert joined[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    back = dict(to_huggingface(key, joined, TWO_GROUPS))
    assert back["model.layers.7.mlp.gate_proj.weight"][:, 0].tolist() == [1, 2, 3]
    assert back["model.layers.7.mlp.up_proj.weight"][:, 0].tolist() == [4, 5, 6]


def test_shapes_by_hand() -> None:
    # 4 heads x 2 channels, and 2 groups x 2 channels twice.
    assert megatron_shapes(TWO_GROUPS) == {
        "embedding.word_embeddings.weight": (5, 1),
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": (1,),
        "decoder.layers.0.self_attention.linear_qkv.weight": (16, 1),
        "decoder.layers.0.self_attention.linear_proj.weight": (1, 8),
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": (1,),
        "decoder.layers.0.mlp.linear_fc1.weight": (6, 1),
        "decoder.layers.0.mlp.linear_fc2.weight": (1, 3),
        "decoder.final_layernorm.weight": (1,),
        "output_layer.weight": (5, 1),
    }


@pytest.mark.parametrize("which", ["llama_folder", "tied_folder"])
def test_there_and_back_tensor_by_tensor(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    arch = read_architecture(folder)
    source = HuggingFaceSource(folder, arch)
    back: dict[str, Tensor] = {}
    for key, shape in megatron_shapes(arch).items():
        tensor = source.read(key, (0,) * len(shape), shape)
        back |= to_huggingface(key, tensor, arch)
    original = load_file(folder / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


def test_read_part() -> None:
    tensor = torch.arange(1, 7).reshape(3, 2)
    assert read_part(tensor, (1, 0), (2, 2)).tolist() == [[3, 4], [5, 6]]
    assert read_part(tensor, (2, 1), (2, 1)).tolist() == [[6], [0]]
    assert read_part(tensor, (4, 0), (2, 2)).tolist() == [[0, 0], [0, 0]]


def test_weights_in_several_files(llama_folder: Path, tmp_path: Path) -> None:
    arch = read_architecture(llama_folder)
    tensors = load_file(llama_folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({n: tensors[n] for n in held}, tmp_path / file)
    index = {"weight_map": {n: file for file, held in halves.items() for n in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    whole, split = HuggingFaceSource(llama_folder, arch), HuggingFaceSource(tmp_path, arch)
    for key, shape in megatron_shapes(arch).items():
        start = (0,) * len(shape)
        assert torch.equal(split.read(key, start, shape), whole.read(key, start, shape))


def copy_with(folder: Path, target: Path, **changes: Tensor | None) -> Path:
    """A copy with tensors replaced, or left out where None; dots are written as double bars."""
    shutil.copytree(folder, target)
    path = target / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."))
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path)
    return target


def test_a_missing_tensor_is_named(llama_folder: Path, tmp_path: Path) -> None:
    folder = copy_with(llama_folder, tmp_path / "x", model__norm__weight=None)
    source = HuggingFaceSource(folder, read_architecture(folder))
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.norm\.weight"):
        source.read("decoder.final_layernorm.weight", (0,), (64,))


def test_a_tensor_of_another_shape_is_named(llama_folder: Path, tmp_path: Path) -> None:
    folder = copy_with(llama_folder, tmp_path / "x", model__norm__weight=torch.ones(32))
    source = HuggingFaceSource(folder, read_architecture(folder))
    with pytest.raises(
        CheckpointError, match=r"final_layernorm.weight has shape \(32,\), .* says \(64,\)"
    ):
        source.read("decoder.final_layernorm.weight", (0,), (64,))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pickled .bin weights are not read"):
        HuggingFaceSource(tmp_path, TWO_GROUPS)


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    arch = ArchitectureConfig(2, 64, 96, 4, 2, 16, 500, init_method_std=0.02)
    first, again, other = RandomSource(arch, 1), RandomSource(arch, 1), RandomSource(arch, 2)
    key, shape = "decoder.layers.1.mlp.linear_fc1.weight", (192, 64)
    whole = first.read(key, (0, 0), shape)
    assert torch.equal(again.read(key, (96, 32), (96, 32)), whole[96:, 32:])
    assert not torch.equal(other.read(key, (0, 0), shape), whole)
    twin = first.read("decoder.layers.0.mlp.linear_fc1.weight", (0, 0), shape)
    assert not torch.equal(twin, whole)
    assert whole.std().item() == pytest.approx(0.02, rel=0.05)
    assert first.read("decoder.final_layernorm.weight", (0,), (64,)).eq(1).all()


def test_random_weights_into_the_residual_are_smaller() -> None:
    # 0.02 / sqrt(2 x 2 layers) = 0.01.
    arch = ArchitectureConfig(2, 64, 96, 4, 2, 16, 500, init_method_std=0.02)
    for name, shape in (("self_attention.linear_proj", (64, 64)), ("mlp.linear_fc2", (64, 96))):
        tensor = RandomSource(arch, 3).read(f"decoder.layers.0.{name}.weight", (0, 0), shape)
        assert tensor.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"model.norm.weight": "gone.safetensors"}}'
            ),
            "gone.safetensors cannot be read",
        ),
    ],
    ids=["truncated", "absent", "empty index", "missing file"],
)
def test_damaged_folders_are_named(
    llama_folder: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(llama_folder, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceSource(folder, read_architecture(folder)).fetch("model.norm.weight")
