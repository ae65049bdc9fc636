"""Weights on their way to an engine: safetensors files with a manifest that says all of them.

A folder of weights is complete or not there: the files are written first, the manifest last. An
engine checks every name, shape, type, sum and value before it touches the weights it serves.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_selfpref.errors import WeightSyncError
from nemo_selfpref.files import new_folder, write_text
from nemo_selfpref.rollout.serving.weight_files import (
    TensorFacts,
    batches,
    facts_of_folder,
    some,
)
from nemo_selfpref.rollout.serving.wire import Manifest, Probe, TensorEntry
from nemo_selfpref.types import WeightSet

__all__ = [
    "MANIFEST",
    "TensorFacts",
    "check_complete",
    "check_digest",
    "digest_of",
    "dtype_name",
    "facts_of_folder",
    "read_manifest",
    "read_tensor",
    "sha256_of_tensor",
    "verify_files",
    "write_weights",
]

MANIFEST = "manifest.json"
_FILE_BYTES = 2 * 2**30
_POOL_FROM_BYTES = 16 * 2**20
"""Less is checked sooner than threads are started."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sha256_of_tensor(tensor: Tensor) -> str:
    """Over the values' bytes, row by row."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def digest_of(entries: Sequence[TensorEntry]) -> str:
    """What the weights are, whatever file they lie in."""
    facts = sorted((e.name, e.shape, e.dtype, e.sha256) for e in entries)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    weight_set: WeightSet,
    version: int,
    run: str,
    probe: Probe | None = None,
) -> Manifest:
    """Write a folder of weights; it appears whole or not at all.

    Raises:
        WeightSyncError: a value is not a number, a type is not one that is sent, a name comes
            twice, or the disk is full.
    """
    try:
        with new_folder(folder, durable=False) as temporary, ThreadPoolExecutor(_threads()) as pool:
            entries = _write_files(temporary, tensors, pool)
            manifest = Manifest(
                weight_set=weight_set,
                version=version,
                run=run,
                digest=digest_of(entries),
                tensors=entries,
                probe=probe,
            )
            write_text(temporary / MANIFEST, manifest.model_dump_json(indent=1))
    except ValidationError as error:
        first = error.errors()[0]
        raise WeightSyncError(
            f"{weight_set.value} weights of version {version} cannot be described: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r}"
        ) from error
    except (OSError, SafetensorError) as error:
        raise WeightSyncError(
            f"{weight_set.value} weights of version {version} cannot be written to {folder}: "
            f"{error}. Nothing was handed over. Make room there, or set rollout.vllm.weights_dir "
            "to another folder."
        ) from error
    return manifest


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def _write_files(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], pool: ThreadPoolExecutor
) -> list[TensorEntry]:
    entries: list[TensorEntry] = []
    seen: set[str] = set()
    for number, batch in enumerate(batches(tensors, _FILE_BYTES)):
        name = f"weights-{number:05d}.safetensors"
        twice = seen & batch.keys()
        if twice:
            raise WeightSyncError(f"the tensor {min(twice)} comes twice among the weights")
        seen |= batch.keys()
        sums = pool.map(_facts, batch.items())
        save_file(batch, folder / name, metadata={"format": "pt"})
        entries.extend(_entry(key, batch[key], digest, name) for key, digest in sums)
    return entries


def _facts(item: tuple[str, Tensor]) -> tuple[str, str]:
    name, tensor = item
    _refuse_not_finite(name, tensor)
    return name, sha256_of_tensor(tensor)


def _entry(name: str, tensor: Tensor, digest: str, file: str) -> TensorEntry:
    return TensorEntry.model_validate(
        {
            "name": name,
            "shape": list(tensor.shape),
            "dtype": dtype_name(tensor.dtype),
            "sha256": digest,
            "file": file,
        }
    )


def _refuse_not_finite(name: str, tensor: Tensor) -> None:
    # One pass without a mask in memory: the sum of finite numbers may overflow, so only a sum that
    # is not finite is looked at again.
    if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
        raise WeightSyncError(
            f"the tensor {name} holds values that are not finite: the weights are refused"
        )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of weights.

    Raises:
        WeightSyncError: it is missing, cut short, or its digest is another.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise WeightSyncError(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        raise WeightSyncError(f"{path} is damaged: {error.errors()[0]['msg']}") from error
    check_digest(manifest)
    return manifest


def check_digest(manifest: Manifest) -> None:
    """Raise WeightSyncError where the manifest is not what its digest says."""
    if digest_of(manifest.tensors) != manifest.digest:
        raise WeightSyncError(
            f"the manifest of {manifest.weight_set.value} version {manifest.version} does not "
            "match its digest: it was cut short or changed"
        )


def check_complete(manifest: Manifest, expected: Mapping[str, TensorFacts]) -> None:
    """Raise WeightSyncError unless the manifest lists exactly the expected tensors."""
    found = {e.name: (tuple(e.shape), e.dtype) for e in manifest.tensors}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} is not one of the model's" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} is {found[name][1]} {list(found[name][0])}, the model has "
        f"{expected[name][1]} {list(expected[name][0])}"
        for name in expected.keys() & found.keys()
        if found[name] != expected[name]
    ]
    if len(found) != len(manifest.tensors):
        problems.append("a tensor is listed twice")
    if problems:
        raise WeightSyncError(
            f"{manifest.weight_set.value} version {manifest.version} is not this model: "
            f"{some(problems)}"
        )


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Read every tensor and compare it with its entry.

    Raises:
        WeightSyncError: a file or tensor is missing, of another shape, type or content, or holds
            values that are not finite.
    """
    tensors = [*_mapped(folder, manifest)]
    if sum(tensor.nbytes for _, tensor in tensors) < _POOL_FROM_BYTES:
        for entry, tensor in tensors:
            _verify(folder, entry, tensor)
        return
    with ThreadPoolExecutor(_threads()) as pool:
        for _ in pool.map(lambda item: _verify(folder, *item), tensors):
            pass


def _mapped(folder: Path, manifest: Manifest) -> Iterator[tuple[TensorEntry, Tensor]]:
    """Every entry with its tensor, mapped from its file; each file is opened once."""
    by_file: dict[str, list[TensorEntry]] = {}
    for entry in manifest.tensors:
        by_file.setdefault(entry.file, []).append(entry)
    for file, entries in by_file.items():
        with _opened(folder, file, entries[0].name) as handle:
            for entry in entries:
                yield entry, handle.get_tensor(entry.name)


def _verify(folder: Path, entry: TensorEntry, tensor: Tensor) -> None:
    found = (list(tensor.shape), dtype_name(tensor.dtype))
    if found != (entry.shape, entry.dtype):
        raise WeightSyncError(
            f"{folder / entry.file}: {entry.name} is {found[1]} {found[0]}, the manifest says "
            f"{entry.dtype} {entry.shape}"
        )
    _refuse_not_finite(entry.name, tensor)
    if (got := sha256_of_tensor(tensor)) != entry.sha256:
        raise WeightSyncError(
            f"{folder / entry.file}: {entry.name} is damaged: SHA-256 is {got[:12]}..., the "
            f"manifest says {entry.sha256[:12]}..."
        )


def read_tensor(folder: Path, entry: TensorEntry) -> Tensor:
    """One tensor, mapped from its file.

    Raises:
        WeightSyncError: the file cannot be read.
    """
    with _opened(folder, entry.file, entry.name) as handle:
        return handle.get_tensor(entry.name)


@contextmanager
def _opened(folder: Path, file: str, tensor: str) -> Iterator[Any]:
    path = folder / file
    if path.parent != folder:
        raise WeightSyncError(f"{file!r} of tensor {tensor} is not a file's name")
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (OSError, SafetensorError) as error:
        raise WeightSyncError(f"{path}: {tensor} cannot be read: {error}") from error
