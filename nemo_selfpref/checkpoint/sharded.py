"""Sharded tensors on disk, described by megatron-core and stored as safetensors.

megatron-core's dist_checkpointing says which part of which global tensor a rank holds
(ShardedTensor); this module stores those parts without pickle: one safetensors file a rank and an
index with shapes and SHA-256 sums. Any layout can read what any other wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import read_json, sha256_of, write_json

INDEX = "index.json"
COMMON = "common.json"
_SCALARS = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)
}
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float64)}


class TensorSource(Protocol):
    """Global tensors by name, read in parts."""

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The part [offset, offset + shape) of a global tensor; beyond its end, zeros."""
        ...


class ShardWriter:
    """Collects one rank's parts, copied into the CPU's memory, and writes them."""

    def __init__(self, rank: int = 0) -> None:
        self.file = f"shard-{rank:05d}.safetensors"
        self._tensors: dict[str, Tensor] = {}
        self.entries: list[dict[str, Any]] = []
        """This rank's share of the index."""

    def add(
        self, key: str, tensor: Tensor, offset: tuple[int, ...], global_shape: tuple[int, ...]
    ) -> None:
        name = f"{key}@{','.join(map(str, offset))}"
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        self._tensors[name] = copy.copy_(tensor.detach())
        self.entries.append(
            {
                "key": key,
                "file": self.file,
                "name": name,
                "offset": list(offset),
                "shape": list(tensor.shape),
                "global_shape": list(global_shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
            }
        )

    def nonfinite(self) -> list[str]:
        """Names of tensors with a value that is NaN or infinite."""
        return [n for n, t in self._tensors.items() if not bool(torch.isfinite(t).all())]

    def write(self, folder: Path) -> Path | None:
        """Write this rank's file into `folder`; None where it has no part."""
        folder.mkdir(parents=True, exist_ok=True)
        if not self._tensors:
            return None
        path = folder / self.file
        save_file(self._tensors, path)
        return path


def write_index(folder: Path, entries: list[dict[str, Any]], files: dict[str, str]) -> None:
    """The index of a folder: the parts of all ranks, and the SHA-256 sums of their files."""
    write_json(folder / INDEX, {"entries": entries, "files": files})


class ShardReader:
    """Reads what ShardWriters wrote. A file's sum is checked before anything is read from it.

    Raises:
        CheckpointError: on opening, a file is missing; on reading, its checksum differs, a tensor
            is absent or its parts do not cover what was asked for.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = folder
        index = read_json(folder / INDEX)
        self._parts: dict[str, list[dict[str, Any]]] = {}
        for entry in index["entries"]:
            self._parts.setdefault(entry["key"], []).append(entry)
        self._files = frozenset(index["files"])
        self._unchecked: dict[str, str] = dict(index["files"]) if verify else {}
        for name in index["files"]:
            if Path(name).name != name:
                raise CheckpointError(
                    f"{folder / INDEX} names the file {name!r}: not one of its own"
                )
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing: the checkpoint is incomplete")

    def _check(self, name: str) -> None:
        expected = self._unchecked.pop(name, None)
        path = self.folder / name
        if expected is not None and (got := sha256_of(path)) != expected:
            self._unchecked[name] = expected
            raise CheckpointError(
                f"{path} is damaged: SHA-256 is {got[:12]}..., the index says {expected[:12]}... "
                "Use another checkpoint."
            )

    def names(self) -> list[str]:
        return sorted(self._parts)

    def global_shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._entries(key)[0]["global_shape"])

    def _entries(self, key: str) -> list[dict[str, Any]]:
        if key not in self._parts:
            raise CheckpointError(f"{self.folder} holds no tensor {key}: is it of another model?")
        return self._parts[key]

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        entries = self._entries(key)
        out = torch.zeros(shape, dtype=_DTYPES[entries[0]["dtype"]])
        covered = 0
        for entry in entries:
            overlap = [
                (max(o, eo), min(o + s, eo + es))
                for o, s, eo, es in zip(offset, shape, entry["offset"], entry["shape"], strict=True)
            ]
            if any(low >= high for low, high in overlap):
                continue
            source = tuple(
                slice(low - eo, high - eo)
                for (low, high), eo in zip(overlap, entry["offset"], strict=True)
            )
            target = tuple(
                slice(low - o, high - o) for (low, high), o in zip(overlap, offset, strict=True)
            )
            if entry["file"] not in self._files:
                raise CheckpointError(f"{self.folder / INDEX} gives no sum for {entry['file']!r}")
            self._check(entry["file"])
            with safe_open(self.folder / entry["file"], framework="pt") as handle:
                part = (
                    handle.get_slice(entry["name"])[source]
                    if source
                    else handle.get_tensor(entry["name"])
                )
            out[target] = part
            covered += part.numel()
        self._check_cover(key, covered, offset, shape, entries[0]["global_shape"])
        return out

    def _check_cover(
        self,
        key: str,
        covered: int,
        offset: tuple[int, ...],
        shape: tuple[int, ...],
        global_shape: list[int],
    ) -> None:
        wanted = 1
        for o, s, g in zip(offset, shape, global_shape, strict=True):
            wanted *= max(min(o + s, g) - o, 0)
        if covered != wanted:
            raise CheckpointError(
                f"{self.folder}: the parts of {key} cover {covered} of {wanted} elements"
            )


def collect(state: dict[str, Any], rank: int) -> tuple[ShardWriter, dict[str, Any]]:
    """This rank's parts of a sharded state dict, and what of it is not a tensor.

    Collective: every rank calls it. `state` is consumed, as megatron-core's own save does.
    """
    sharded, common = save_preprocess(state)
    writer = ShardWriter(rank)
    for tensor in _sharded_tensors(sharded):
        if _is_main_replica(tensor.replica_id):
            data = tensor.data.reshape((1,) * tensor.prepend_axis_num + tuple(tensor.local_shape))
            writer.add(tensor.key, data, tensor.global_offset, tensor.global_shape)
    return writer, common


def read_common(folder: Path) -> dict[str, Any]:
    """What a state dict held besides tensors."""
    return _decode(read_json(folder / COMMON))


def encode(value: Any) -> Any:
    """JSON for plain state; scalar tensors (step counters) keep their type."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise CheckpointError(f"a tensor of shape {tuple(value.shape)} is not in any shard")
        return {"scalar": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [encode(v) for v in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"scalar", "dtype"}:
            return torch.tensor(value["scalar"], dtype=_SCALARS[value["dtype"]])
        # Megatron numbers the optimizers of a model with experts.
        return {int(k) if k.isdecimal() else k: _decode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_decode(v) for v in value]
    return value


def load_state(
    source: TensorSource, state: dict[str, Any], common: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Fill a sharded state dict from `source`, as megatron-core's own load does; what is not a
    tensor comes from `common`. Returns plain tensors under the same keys."""
    result: dict[str, Any] = dict(common or {})
    sharded, local, factories = load_preprocess(state)
    assert isinstance(factories, dict)
    merge(result, local)
    sharded, _ = extract_sharded_base(sharded)

    def fill(value: Any) -> Any:
        if not isinstance(value, ShardedTensor):
            return None
        shape = (1,) * value.prepend_axis_num + tuple(value.local_shape)
        part = source.read(value.key, tuple(value.global_offset), shape)
        return part.reshape(value.local_shape).to(value.dtype)

    merge(result, dict_list_map_inplace(fill, sharded))
    return apply_factory_merges(result, factories)


def _sharded_tensors(state: Any) -> Iterator[Any]:
    if isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, ShardedObject):
        # Transformer Engine keeps the scaling history of FP8 there; it starts anew.
        if state.data is not None and not state.key.endswith("_extra_state"):
            raise CheckpointError(f"{state.key} is a pickled object; only tensors are stored")
    elif isinstance(state, dict):
        for value in state.values():
            yield from _sharded_tensors(value)
    elif isinstance(state, list):
        for value in state:
            yield from _sharded_tensors(value)


def _is_main_replica(replica_id: int | tuple[int, ...]) -> bool:
    return all(r == 0 for r in replica_id) if isinstance(replica_id, tuple) else replica_id == 0
