"""Which tensors lie in which safetensors files: how they are cut into files, and what files hold
that are there, without reading the contents."""

from __future__ import annotations

import json
import math
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_selfpref.errors import WeightSyncError

TensorFacts = tuple[tuple[int, ...], str]
"""Shape and dtype name."""

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SHOWN = 4
"""How many problems an error lists."""


def bytes_of(facts: TensorFacts) -> int:
    shape, dtype = facts
    return math.prod(shape) * (4 if dtype == "float32" else 2)


# -- writing ----------------------------------------------------------------------------------


def batches(tensors: Iterable[tuple[str, Tensor]], file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors on the CPU, a dictionary for each file of at most `file_bytes`, but for a tensor
    that is larger alone. A name that comes twice ends a file; one file holds each name once."""
    pending: dict[str, Tensor] = {}
    memory, used = _Memory(), 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if (pending and used + size > file_bytes) or name in pending:
            yield pending
            pending, memory, used = {}, _Memory(), 0
        value = tensor.detach().cpu().contiguous()
        # A file cannot hold tensors that share their memory, such as one under two names.
        pending[name] = value if memory.takes(value.data_ptr(), size) else value.clone()
        used += size
    yield pending


class _Memory:
    """Ranges of bytes that do not overlap, in order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def takes(self, start: int, size: int) -> bool:
        """Add a range; False, and it is not added, where a byte of it is in another one."""
        if size == 0:
            return True
        place = bisect(self._starts, start)
        before = place > 0 and self._ends[place - 1] > start
        after = place < len(self._starts) and self._starts[place] < start + size
        if before or after:
            return False
        self._starts.insert(place, start)
        self._ends.insert(place, start + size)
        return True


# -- reading ----------------------------------------------------------------------------------


def files_below(folder: Path) -> list[Path]:
    """All safetensors files of a folder, by name."""
    return sorted(folder.glob("*.safetensors"))


def model_files(folder: Path) -> list[Path]:
    """The safetensors files a Hugging Face folder's model is made of: those its index names, or
    model.safetensors, or all. The folder may hold the same weights in another form, too.

    Raises:
        WeightSyncError: the index is damaged.
    """
    index = folder / _INDEX
    if not index.exists():
        whole = folder / _WHOLE
        return [whole] if whole.exists() else files_below(folder)
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return [folder / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightSyncError(
            f"{index} cannot be read: {error!r}. Expected a weight_map from tensors to files."
        ) from error


def facts_of_folder(folder: Path) -> dict[str, TensorFacts]:
    """Name, shape and type of every tensor of a Hugging Face folder's model.

    Raises:
        WeightSyncError: there is none, or a file cannot be read.
    """
    found: dict[str, TensorFacts] = {}
    for path in model_files(folder):
        found.update(_facts_of_file(path))
    if not found:
        raise WeightSyncError(f"{folder} holds no safetensors files")
    tied = _is_tied(folder) and "model.embed_tokens.weight" in found
    return {name: facts for name, facts in found.items() if not _is_extra(name, tied)}


def _is_tied(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "config.json").read_bytes()).get("tie_word_embeddings"))
    except (OSError, ValueError, AttributeError):
        return False


def _is_extra(name: str, tied: bool) -> bool:
    """Whether a folder may hold this tensor though the model has no such weight: buffers that older
    exports wrote, and the head of a model whose head is its embedding."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _facts_of_file(path: Path) -> Mapping[str, TensorFacts]:
    found: dict[str, TensorFacts] = {}
    try:
        with safe_open(path, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                part = handle.get_slice(key)
                dtype = str(part.get_dtype())
                found[key] = (tuple(part.get_shape()), _DTYPES.get(dtype, dtype))
    except (OSError, SafetensorError) as error:
        raise WeightSyncError(f"{path} cannot be read: {error}") from error
    return found


def check_names(folder: Path, expected: Set[str], files: Sequence[Path] | None = None) -> None:
    """Raise WeightSyncError unless the files, all below `folder` where none are named, hold each of
    the tensors, once, and no others."""
    found: list[str] = []
    try:
        for path in files_below(folder) if files is None else files:
            with safe_open(path, framework="pt") as handle:
                found += handle.keys()
    except (OSError, SafetensorError) as error:
        raise WeightSyncError(f"{folder}: the weights cannot be read: {error}") from error
    problems = [f"{name} is missing" for name in expected - set(found)]
    tied = "lm_head.weight" not in expected
    others = {name for name in set(found) - expected if not _is_extra(name, tied)}
    problems += [f"{name} is not listed" for name in others]
    problems += [f"{name} comes twice" for name, count in Counter(found).items() if count > 1]
    if problems:
        raise WeightSyncError(f"{folder}: {some(problems)}")


def some(problems: Sequence[str]) -> str:
    """The first problems, and how many more there are."""
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"{'; '.join(sorted(problems)[:_SHOWN])}{more}"
