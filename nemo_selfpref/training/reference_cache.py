"""Log-probs of reference passes, kept on disk for later steps, stages and runs.

An entry is found by what it was computed from, its key:

    SHA-256(context, prompt token ids, response token ids)
    context = SHA-256(format version, name of the weights, precision, architecture)

The token ids already contain the template and the tokenizer, the architecture the rope scaling;
the weights' name is their content (reference_version.py). So an entry cannot grow stale: other
weights or another prompt are another key.

The parallel layout, the device and the micro-batch in which a sequence was scored are left out of
the key on purpose. They change the last bits of a log-prob as they do without a cache, and runs on
different machines are meant to share one. Whoever scores a sequence first decides its last bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_selfpref.config.model_schema import ModelConfig
from nemo_selfpref.data.batching import TokenSequence
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.scoring import SequenceLogps
from nemo_selfpref.training.copies import StageCopies
from nemo_selfpref.training.places import WeightPlaces
from nemo_selfpref.training.reference_segments import Segments
from nemo_selfpref.training.reference_version import ReferenceVersions
from nemo_selfpref.types import WeightSet

FORMAT = 1
"""Raised when a log-prob comes to mean something else; old entries are then not found any more."""

HIT_RATE = "reference_cache/hit_rate"

Ask = Callable[[Sequence[TokenSequence]], SequenceLogps]


def open_cache(
    model: ModelConfig, policy: Policy, places: WeightPlaces, say: Callable[[str], None]
) -> ReferenceCache | None:
    """The cache of model.reference_cache_dir; None where there is none."""
    if model.reference_cache_dir is None:
        return None
    segments = Segments(Path(model.reference_cache_dir), say, model.reference_cache_max_gb)
    return ReferenceCache(policy, ReferenceVersions(places), segments)


class ReferenceCache:
    """Asks the network only for sequences that have not been scored under the same weights.

    The first rank alone reads and writes files, and tells the others what it found: scoring is
    collective, so all must ask for the same sequences.
    """

    def __init__(self, policy: Policy, versions: ReferenceVersions, segments: Segments) -> None:
        self.policy, self.versions, self._segments = policy, versions, segments
        self._asked = self._found = 0

    def score(
        self,
        weights: WeightSet,
        copies: StageCopies,
        sequences: Sequence[TokenSequence],
        ask: Ask,
        progress: Callable[[int], None] | None = None,
    ) -> SequenceLogps:
        """Response log-prob sums float64 [N] and lengths int64 [N] of N sequences. Collective.

        Args:
            ask: scores what is missing under `weights`, each sequence once, in the order of its
                first occurrence; not called where nothing is missing.
            progress: told how many sequences are not asked for.
        """
        context = context_of(self.policy, self.versions.of(weights, copies))
        distinct = {sequence: n for n, sequence in enumerate(dict.fromkeys(sequences))}
        sums, lengths = self._known(context, list(distinct))
        missing = [s for s, is_new in zip(distinct, sums.isnan().tolist(), strict=True) if is_new]
        self._asked += len(distinct)
        self._found += len(distinct) - len(missing)
        if progress is not None:
            progress(len(sequences) - len(missing))
        if missing:
            found = ask(missing)
            at = [distinct[s] for s in missing]
            sums[at], lengths[at] = found.sums, found.lengths
            self._keep(context, missing, found)
        rows = torch.tensor([distinct[s] for s in sequences], dtype=torch.int64)
        return SequenceLogps(sums[rows], lengths[rows])

    def _known(self, context: bytes, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
        """What there is of some sequences, the same on every rank; a sum is NaN where nothing
        is there."""
        nothing = (math.nan, 0)
        found = [nothing] * len(sequences)
        if self.policy.layout.is_main:
            self._segments.open(context.hex())
            found = [self._segments.get(key_of(context, *s)) or nothing for s in sequences]
        known = torch.tensor(found, dtype=torch.float64)
        if self.policy.layout.world_size > 1:
            shared = known.to(self.policy.platform.device())
            dist.broadcast(shared, 0)
            known = shared.cpu()
        return known[:, 0].clone(), known[:, 1].long()

    def _keep(
        self, context: bytes, sequences: Sequence[TokenSequence], found: SequenceLogps
    ) -> None:
        if self.policy.layout.is_main:
            entries = zip(found.sums.tolist(), found.lengths.tolist(), strict=True)
            for sequence, entry in zip(sequences, entries, strict=True):
                self._segments.add(key_of(context, *sequence), entry)

    def flush(self) -> None:
        """Write what was scored since the last time."""
        if self.policy.layout.is_main:
            self._segments.flush()

    def take_metrics(self) -> Mapping[str, float]:
        """Of the different sequences asked for since the last time, the share that was there;
        empty where none was asked for."""
        asked, found, self._asked, self._found = self._asked, self._found, 0, 0
        return {HIT_RATE: found / asked} if asked else {}


def context_of(policy: Policy, weights: str) -> bytes:
    """What every entry under some weights has in common, 32 bytes."""
    recipe = policy.config.fp8_recipe
    parts: dict[str, Any] = {
        "format": FORMAT,
        "weights": weights,
        "precision": policy.precision.value,
        "fp8": recipe.value if recipe and policy.in_fp8 else None,
        "first_last_layers_bf16": policy.config.first_last_layers_bf16,
        "architecture": asdict(policy.arch),
    }
    if policy.config.lora.rank:
        # alpha is in no weight, but scales the adapters.
        parts["adapters"] = asdict(policy.config.lora)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def key_of(context: bytes, prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """The key of a sequence, 32 bytes; the prompt's length says where the response begins."""
    ids = np.array([len(prompt), *prompt, *response], dtype="<i8")
    return hashlib.sha256(context + ids.tobytes()).digest()
