"""The correspondence between Hugging Face Llama or Mixtral weights and Megatron's, by tensor.

Both directions work on one global tensor at a time, so neither ever holds a whole model. Megatron
keeps query, key and value of one group together, the two halves of the gated MLP in one matrix and
the experts of a layer in one tensor; rotary channels are in the same order on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_selfpref.config.model_schema import ArchitectureConfig
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import read_json

Fetch = Callable[[str], Tensor]

_PLAIN = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_PLAIN_IN_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "block_sparse_moe.gate.weight",
}
_EXPERTS = {
    "mlp.experts.experts.linear_fc1.weight": ("w1", "w3"),
    "mlp.experts.experts.linear_fc2.weight": ("w2",),
}
"""Tensors [experts, rows, columns], and the matrices that make one expert's rows: gate over up, and
down."""
_QKV = "self_attention.linear_qkv.weight"
_FC1 = "mlp.linear_fc1.weight"


def megatron_shapes(arch: ArchitectureConfig) -> dict[str, tuple[int, ...]]:
    """Name and global shape of every Megatron weight."""
    hidden, ffn, vocab = arch.hidden_size, arch.ffn_hidden_size, arch.vocab_size
    heads = arch.num_attention_heads * arch.kv_channels
    groups = arch.num_query_groups * arch.kv_channels
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (vocab, hidden)}
    for layer in range(arch.num_layers):
        prefix = f"decoder.layers.{layer}."
        shapes[prefix + "self_attention.linear_qkv.layer_norm_weight"] = (hidden,)
        shapes[prefix + _QKV] = (heads + 2 * groups, hidden)
        shapes[prefix + "self_attention.linear_proj.weight"] = (hidden, heads)
        shapes[prefix + "mlp.linear_fc1.layer_norm_weight"] = (hidden,)
        if experts := arch.num_moe_experts:
            shapes[prefix + "mlp.router.weight"] = (experts, hidden)
            shapes[prefix + "mlp.experts.experts.linear_fc1.weight"] = (experts, 2 * ffn, hidden)
            shapes[prefix + "mlp.experts.experts.linear_fc2.weight"] = (experts, hidden, ffn)
            continue
        shapes[prefix + _FC1] = (2 * ffn, hidden)
        shapes[prefix + "mlp.linear_fc2.weight"] = (hidden, ffn)
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if not arch.share_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (vocab, hidden)
    return shapes


def _split(key: str) -> tuple[str, str]:
    """(Hugging Face layer prefix, name within the layer) of a Megatron layer weight."""
    _, _, layer, rest = key.split(".", 3)
    return f"model.layers.{layer}.", rest


def _expert_names(prefix: str, name: str, expert: int) -> list[str]:
    """The Hugging Face tensors of one expert that make its part of a Megatron tensor."""
    part = f"{prefix}block_sparse_moe.experts.{expert}."
    return [f"{part}{matrix}.weight" for matrix in _EXPERTS[name]]


def to_megatron(
    key: str, fetch: Fetch, arch: ArchitectureConfig, experts: range | None = None
) -> Tensor:
    """One Megatron tensor out of Hugging Face ones; `fetch` returns those by name. Of a tensor
    with experts in it only those of `experts`, where given, which is all it fetches."""
    if key in _PLAIN:
        return fetch(_PLAIN[key])
    prefix, name = _split(key)
    if name in _EXPERTS:
        wanted = range(arch.num_moe_experts) if experts is None else experts
        return torch.stack(
            [torch.cat([fetch(n) for n in _expert_names(prefix, name, e)]) for e in wanted]
        )
    if name in _PLAIN_IN_LAYER:
        return fetch(prefix + _PLAIN_IN_LAYER[name])
    if name == _FC1:
        return torch.cat(
            [fetch(prefix + "mlp.gate_proj.weight"), fetch(prefix + "mlp.up_proj.weight")]
        )
    assert name == _QKV, key
    groups, dim = arch.num_query_groups, arch.kv_channels
    per_group = arch.num_attention_heads // groups
    parts = [
        fetch(prefix + f"self_attn.{p}_proj.weight").reshape(groups, n * dim, arch.hidden_size)
        for p, n in (("q", per_group), ("k", 1), ("v", 1))
    ]
    return torch.cat(parts, dim=1).reshape(-1, arch.hidden_size)


def to_huggingface(
    key: str, tensor: Tensor, arch: ArchitectureConfig
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that one Megatron tensor holds."""
    if key in _PLAIN:
        yield _PLAIN[key], tensor
        return
    prefix, name = _split(key)
    if name in _PLAIN_IN_LAYER:
        yield prefix + _PLAIN_IN_LAYER[name], tensor
    elif name in _EXPERTS:
        for expert, matrices in enumerate(tensor):
            names = _expert_names(prefix, name, expert)
            yield from zip(names, matrices.chunk(len(names)), strict=True)
    elif name == _FC1:
        gate, up = tensor.chunk(2)
        yield prefix + "mlp.gate_proj.weight", gate
        yield prefix + "mlp.up_proj.weight", up
    else:
        groups, dim = arch.num_query_groups, arch.kv_channels
        per_group = arch.num_attention_heads // groups
        split = tensor.reshape(groups, per_group + 2, dim, arch.hidden_size)
        for p, part in (("q", split[:, :-2]), ("k", split[:, -2]), ("v", split[:, -1])):
            yield prefix + f"self_attn.{p}_proj.weight", part.reshape(-1, arch.hidden_size)


class HuggingFaceSource:
    """Megatron tensors read out of a Hugging Face folder of safetensors.

    Raises:
        CheckpointError: no safetensors, a tensor is missing or has another shape.
    """

    def __init__(self, folder: Path, arch: ArchitectureConfig) -> None:
        self.folder, self.arch = folder, arch
        self._shapes = megatron_shapes(arch)
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self._files: dict[str, str] = self._weight_map(index)
        elif (folder / "model.safetensors").exists():
            with self._open("model.safetensors") as handle:
                self._files = dict.fromkeys(handle.keys(), "model.safetensors")
        else:
            raise CheckpointError(
                f"{folder} holds no model.safetensors (pickled .bin weights are not read). "
                "Save it with safe_serialization=True."
            )

    @staticmethod
    def _weight_map(index: Path) -> dict[str, str]:
        found = read_json(index)
        if not isinstance(found, dict) or not isinstance(found.get("weight_map"), dict):
            raise CheckpointError(f"{index} holds no weight_map: the folder is damaged")
        for name in found["weight_map"].values():
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{index} names the file {name!r}: expected one beside it")
        return found["weight_map"]

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        path = self.folder / name
        try:
            with safe_open(path, framework="pt") as handle:
                yield handle
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}): the folder is damaged"
            ) from error

    def fetch(self, name: str) -> Tensor:
        """One Hugging Face tensor."""
        if name not in self._files:
            raise CheckpointError(f"{self.folder} holds no tensor {name}")
        with self._open(self._files[name]) as handle:
            return handle.get_tensor(name)

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        expected, experts = self._shapes[key], None
        if len(expected) == 3:
            # One at a time is asked for; all of a layer's would be read again for each.
            experts = range(offset[0], offset[0] + shape[0])
            expected, offset = (len(experts), *expected[1:]), (0, *offset[1:])
        tensor = to_megatron(key, self.fetch, self.arch, experts)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{self.folder}: {key} has shape {tuple(tensor.shape)}, config.json says {expected}"
            )
        return read_part(tensor, offset, shape)


class RandomSource:
    """Fresh weights: normal(0, std), norms one. A tensor depends on the seed and its name alone,
    so every parallel layout starts from the same model."""

    def __init__(self, arch: ArchitectureConfig, seed: int) -> None:
        self.arch, self.seed = arch, seed
        self._shapes = megatron_shapes(arch)

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        full = self._shapes[key]
        if len(full) == 1:
            return read_part(torch.ones(full), offset, shape)
        generator = generator_for(key, self.seed)
        std = self.arch.init_method_std
        if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
            std /= (2 * self.arch.num_layers) ** 0.5
        return read_part(torch.randn(full, generator=generator) * std, offset, shape)


def generator_for(key: str, seed: int) -> torch.Generator:
    """Random numbers that depend on a tensor's name and the seed alone."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def read_part(tensor: Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """tensor[offset : offset + shape], zeros beyond its end (vocabulary padding)."""
    part = tensor[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]
    if tuple(part.shape) == shape:
        return part
    out = tensor.new_zeros(shape)
    out[tuple(slice(0, n) for n in part.shape)] = part
    return out
