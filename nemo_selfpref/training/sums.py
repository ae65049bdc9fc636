"""JSON and tensors that carry the sum of their own content: a changed digit is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import read_json

_SUM = "sha256"


def own_sum(body: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, however it is laid out in its file."""
    text = json.dumps(json.loads(json.dumps(body)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_summed(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object whose `sum` is that of the rest of it, which is returned.

    Args:
        remedy: what to do about a damaged file, a sentence without its full stop.

    Raises:
        CheckpointError: the file is missing, is no such JSON or has another sum.
    """
    try:
        found = read_json(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {remedy}.") from error
    if not isinstance(found, dict) or "sum" not in found:
        raise CheckpointError(f"{path} is damaged: it has no sum of its content. {remedy}.")
    said = found.pop("sum")
    if said != own_sum(found):
        raise CheckpointError(
            f"{path} is damaged: its content has the sum {short(own_sum(found))}, it says "
            f"{short(said)}. {remedy}."
        )
    return found


def short(digest: object) -> str:
    """The beginning of a sum, enough to tell two apart."""
    return str(digest)[:16]


def tensors_sum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def with_sum(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata with which these tensors are to be saved."""
    return {_SUM: tensors_sum(tensors)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors out of a safetensors file that carries their sum.

    Raises:
        CheckpointError: the file is missing, cut off or damaged.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            said = (handle.metadata() or {}).get(_SUM)
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if said is None:
        raise CheckpointError(f"{path} has no sum: an earlier version wrote it, or it is damaged")
    if said != tensors_sum(tensors):
        raise CheckpointError(
            f"{path} is damaged: its values have the sum {short(tensors_sum(tensors))}, it says "
            f"{short(said)}"
        )
    return tensors
