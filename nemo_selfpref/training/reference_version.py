"""Names for the weights that score a reference pass: equal names mean equal weights, bit by bit.

Weights that lie in a folder are named by the SHA-256 sums of the files there. One process reads
them, once a run (a checkpoint of ours has the sums in its index), whatever the layout.

A reference that moves during a stage lies in no folder. A name such as (start, run, stage, steps)
would cost nothing, but be true only as long as nothing else decides what those steps did, and
tell another run's trajectory apart only by the run's name. So such weights are named by their
content too: each rank hashes its own shards, and the sums of all ranks together are the name. It
costs one pass over the weights for each move, in parallel over the ranks, and in exchange depends
on nothing but the weights: a move invalidates nothing but itself, a resumed run finds the names it
had, and another trajectory cannot have the same. Under another layout the shards and so the name
are others, which is a miss and never a false hit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from nemo_selfpref.checkpoint.folders import is_checkpoint
from nemo_selfpref.checkpoint.sharded import INDEX
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import read_json, sha256_of
from nemo_selfpref.megatron.parallel import all_gather_json, world_group
from nemo_selfpref.training.copies import StageCopies
from nemo_selfpref.training.places import Seeded, WeightPlaces
from nemo_selfpref.types import WeightSet

_CHUNK = 1 << 26
"""Bytes of a weight that are on the CPU at one time while it is hashed."""


class ReferenceVersions:
    """Names the weight sets of a run. Collective, and the same on every rank."""

    def __init__(self, places: WeightPlaces) -> None:
        self.places = places
        self._standing: dict[Path | Seeded, str | None] = {}
        self._moved: tuple[StageCopies, int, str] | None = None

    def of(self, name: WeightSet, copies: StageCopies) -> str:
        """The name of a weight set as it is now; `copies` says when it last moved."""
        place = self.places.standing(name)
        if place is None:
            return self._of_moved(name, copies)
        found = self._of_standing(place)
        if found and self._policy.config.lora.rank:
            # A folder of adapters is not to be taken for the same adapters on another base.
            base = self._of_standing(self.places.beginning)
            found = base and _digest(["adapted", base, found])
        # Files that are gone by now still are in memory.
        return found or self._in_memory(name, copies)

    def _of_standing(self, place: Path | Seeded) -> str | None:
        if place not in self._standing:
            mine = _of_place(place) if self._policy.layout.is_main else None
            self._standing[place] = self._gather(mine)[0]
        return self._standing[place]

    def _of_moved(self, name: WeightSet, copies: StageCopies) -> str:
        if name is not WeightSet.LAGGED:
            return self._in_memory(name, copies)
        if self._moved is None or self._moved[0] is not copies or self._moved[1] != copies.moves:
            self._moved = (copies, copies.moves, self._in_memory(name, copies))
        return self._moved[2]

    def _in_memory(self, name: WeightSet, copies: StageCopies) -> str:
        self.places.ready(name)
        with copies.weights.using(name):
            mine = hash_parameters(self._policy.module.named_parameters())
        return _digest(["shards", *self._gather(mine)])

    def _gather(self, value: str | None) -> list[Any]:
        return all_gather_json(value, world_group(), self._policy.platform.device())

    @property
    def _policy(self) -> Any:
        return self.places.weights.policy


@torch.no_grad()
def hash_parameters(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        for part in tensor.detach().contiguous().view(-1).view(torch.uint8).split(_CHUNK):
            digest.update(part.cpu().numpy().data)
    return digest.hexdigest()


def hash_folder(folder: Path) -> str:
    """A name for the weights of a Hugging Face folder or a checkpoint of ours.

    Raises:
        CheckpointError, OSError: a file is missing or cannot be read.
    """
    if is_checkpoint(folder):
        return _digest(["checkpoint", read_json(folder / "weights" / INDEX)["files"]])
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        # The index is one of them: it says which file a tensor is read from, should two hold it.
        files = {index.name, *map(str, read_json(index)["weight_map"].values())}
    return _digest(["hugging face", {name: sha256_of(folder / name) for name in files}])


def _of_place(place: Path | Seeded) -> str | None:
    try:
        # torch promises the same random numbers within one version only.
        if isinstance(place, Seeded):
            return _digest(["seed", place.seed, torch.__version__])
        return hash_folder(place)
    except (OSError, CheckpointError):
        return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
