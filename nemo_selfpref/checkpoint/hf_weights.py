"""The correspondence between Hugging Face weights and Megatron's, by tensor.

Both directions work on one global tensor at a time, so neither ever holds a whole model. Megatron
keeps query, key and value of one group together (their biases too), the two halves of the gated MLP
in one matrix and the experts of a layer in one tensor; rotary channels are in the same order on
both sides. Only the experts' names differ between families (families.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_selfpref.checkpoint.families import family_of
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
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
_ROUTER = "mlp.router.weight"
_EXPERTS_FC1 = "mlp.experts.experts.linear_fc1.weight"
_EXPERTS_FC2 = "mlp.experts.experts.linear_fc2.weight"
"""Tensors [experts, rows, columns]: gate over up, and down."""
_QKV = "self_attention.linear_qkv.weight"
_QKV_BIAS = "self_attention.linear_qkv.bias"
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
        if arch.add_qkv_bias:
            shapes[prefix + _QKV_BIAS] = (heads + 2 * groups,)
        if arch.qk_layernorm:
            shapes[prefix + "self_attention.q_layernorm.weight"] = (arch.kv_channels,)
            shapes[prefix + "self_attention.k_layernorm.weight"] = (arch.kv_channels,)
        shapes[prefix + "self_attention.linear_proj.weight"] = (hidden, heads)
        shapes[prefix + "mlp.linear_fc1.layer_norm_weight"] = (hidden,)
        if experts := arch.num_moe_experts:
            shapes[prefix + _ROUTER] = (experts, hidden)
            shapes[prefix + _EXPERTS_FC1] = (experts, 2 * ffn, hidden)
            shapes[prefix + _EXPERTS_FC2] = (experts, hidden, ffn)
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


def huggingface_names(key: str, arch: ArchitectureConfig) -> list[str]:
    """The Hugging Face tensors that make one Megatron tensor, in the order in which they do. Of a
    tensor with experts in it, those of the first expert come first."""
    if key in _PLAIN:
        return [_PLAIN[key]]
    prefix, name = _split(key)
    if name in (_QKV, _QKV_BIAS):
        kind = name.rpartition(".")[2]
        return [f"{prefix}self_attn.{p}_proj.{kind}" for p in ("q", "k", "v")]
    if name == _FC1:
        return [f"{prefix}mlp.{p}_proj.weight" for p in ("gate", "up")]
    if name in _PLAIN_IN_LAYER:
        return [prefix + _PLAIN_IN_LAYER[name]]
    names = family_of(arch).experts
    assert names is not None, key
    if name == _ROUTER:
        return [prefix + names.router]
    matrices = {_EXPERTS_FC1: names.gate_up, _EXPERTS_FC2: (names.down,)}[name]
    return [
        f"{prefix}{names.folder}{expert}.{matrix}.weight"
        for expert in range(arch.num_moe_experts)
        for matrix in matrices
    ]


def _of_each_expert(key: str, arch: ArchitectureConfig) -> list[list[str]]:
    """The names of a tensor with experts in it, by expert."""
    names = huggingface_names(key, arch)
    each = len(names) // arch.num_moe_experts
    return [names[at : at + each] for at in range(0, len(names), each)]


def to_megatron(
    key: str, fetch: Fetch, arch: ArchitectureConfig, experts: range | None = None
) -> Tensor:
    """One Megatron tensor out of Hugging Face ones; `fetch` returns those by name. Of a tensor
    with experts in it only those of `experts`, where given, which is all it fetches."""
    if key.endswith((_EXPERTS_FC1, _EXPERTS_FC2)):
        named = _of_each_expert(key, arch)
        wanted = range(len(named)) if experts is None else experts
        return torch.stack([torch.cat([fetch(name) for name in named[e]]) for e in wanted])
    parts = [fetch(name) for name in huggingface_names(key, arch)]
    if key.endswith((_QKV, _QKV_BIAS)):
        groups = arch.num_query_groups
        if any(part.shape[0] % groups for part in parts):
            rows = ", ".join(str(part.shape[0]) for part in parts)
            raise CheckpointError(
                f"{key} is made of query, key and value with {rows} rows; config.json says "
                f"{groups} key-value heads, which have to divide each"
            )
        grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, dim=1).flatten(0, 1)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def to_huggingface(
    key: str, tensor: Tensor, arch: ArchitectureConfig
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that one Megatron tensor holds."""
    if key.endswith((_EXPERTS_FC1, _EXPERTS_FC2)):
        for names, matrices in zip(_of_each_expert(key, arch), tensor, strict=True):
            yield from zip(names, matrices.chunk(len(names)), strict=True)
        return
    names = huggingface_names(key, arch)
    if key.endswith((_QKV, _QKV_BIAS)):
        dim, columns = arch.kv_channels, tensor.shape[1:]
        heads = arch.num_attention_heads // arch.num_query_groups + 2
        split = tensor.reshape(arch.num_query_groups, heads, dim, *columns)
        parts = (split[:, :-2], split[:, -2], split[:, -1])
        yield from zip(names, (part.reshape(-1, *columns) for part in parts), strict=True)
    else:
        yield from zip(names, tensor.chunk(len(names)), strict=True)


class HuggingFaceSource:
    """Megatron tensors read out of a Hugging Face folder of safetensors.

    Raises:
        CheckpointError: no safetensors, a tensor is missing or has another shape, or a layer has
            one that the architecture does not.
    """

    def __init__(self, folder: Path, arch: ArchitectureConfig) -> None:
        self.folder, self.arch = folder, arch
        self._shapes = megatron_shapes(arch)
        self._parts = _part_shapes(self._shapes, arch)
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
        self._check_layers()
        self._check_tied()

    def _check_layers(self) -> None:
        """A layer with more in it than config.json says would be computed wrongly, silently."""
        layers = {f"model.layers.{n}" for n in range(self.arch.num_layers)}
        more = sorted(
            name
            for name in self._files
            if name not in self._parts
            and ".".join(name.split(".")[:3]) in layers
            and not name.endswith("rotary_emb.inv_freq")
        )
        if more:
            raise CheckpointError(
                f"{self.folder} holds {', '.join(more[:3])} ({len(more)} such tensors), which a "
                "model as config.json describes it does not have: the two do not belong together, "
                "or the model has a part that is not supported"
            )

    def _check_tied(self) -> None:
        """transformers unties a head that differs from the embedding, whatever config.json says."""
        head, embedding = (
            _PLAIN[f"{n}.weight"] for n in ("output_layer", "embedding.word_embeddings")
        )
        if not self.arch.share_embeddings_and_output_weights or head not in self._files:
            return
        if not torch.equal(self.fetch(head), self.fetch(embedding)):
            raise CheckpointError(
                f"{self.folder}: config.json says tie_word_embeddings=true, but {head} differs "
                f"from {embedding}. Set tie_word_embeddings to false there, or remove the tensor."
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
        found: dict[str, tuple[int, ...]] = {}

        def noting(name: str) -> Tensor:
            part = self.fetch(name)
            found[name] = tuple(part.shape)
            return part

        tensor = to_megatron(key, noting, self.arch, experts)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{self.folder}: {key} has shape {tuple(tensor.shape)}, config.json says {expected}"
            )
        for name, shape_found in found.items():
            if shape_found != self._parts[name]:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {shape_found}, config.json says "
                    f"{self._parts[name]}"
                )
        return read_part(tensor, offset, shape)


def _part_shapes(
    shapes: Mapping[str, tuple[int, ...]], arch: ArchitectureConfig
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of a model."""
    return {
        name: tuple(part.shape)
        for key, shape in shapes.items()
        for name, part in to_huggingface(key, torch.empty(shape, device="meta"), arch)
    }


class RandomSource:
    """Fresh weights: normal(0, std), norms one, biases zero. A tensor depends on the seed and its
    name alone, so every parallel layout starts from the same model.

    Raises:
        ConfigError: a model of no family that could be exported.
    """

    def __init__(self, arch: ArchitectureConfig, seed: int) -> None:
        family_of(arch)
        self.arch, self.seed = arch, seed
        self._shapes = megatron_shapes(arch)

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        full = self._shapes[key]
        if len(full) == 1:
            value = 0.0 if key.endswith(".bias") else 1.0
            return read_part(torch.full(full, value), offset, shape)
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
