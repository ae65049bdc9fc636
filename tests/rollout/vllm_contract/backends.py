"""Engines in this process, and weights for them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from contract import MAX_LENGTH, STOP_IDS
from safetensors.torch import load_file
from torch import Tensor

from nemo_selfpref.rollout.serving.engine_spec import EngineSpec
from nemo_selfpref.rollout.serving.manifest import write_weights
from nemo_selfpref.rollout.serving.vllm_backend import VLLMBackend
from nemo_selfpref.rollout.serving.wire import FolderSource, Probe, WeightsCall
from nemo_selfpref.types import WeightSet

FOLDER = Path(os.environ["SELFPREF_CONTRACT"])


def make_backend(model: Path, weights_dir: Path, *weight_sets: str) -> VLLMBackend:
    return VLLMBackend(
        EngineSpec(
            model=str(model),
            weights_dir=str(weights_dir),
            weight_sets=list(weight_sets),
            stop_ids=list(STOP_IDS),
            tokenizer_sha256="0" * 64,
            dtype="float32",
            max_length=MAX_LENGTH,
            max_num_seqs=64,
            kv_cache_bytes=2**26,
            device="cpu",
            token_file="unused",
            ready_file="unused",
        )
    )


class Sender:
    """Writes a model's weights, each times a factor, for an engine to take in."""

    def __init__(self, model: Path, weights_dir: Path) -> None:
        self.tensors = load_file(model / "model.safetensors")
        self.weights_dir, self._numbers = weights_dir, itertools.count()

    def scaled(self, scale: float) -> Iterator[tuple[str, Tensor]]:
        return ((name, tensor * scale) for name, tensor in self.tensors.items())

    def call(
        self,
        scale: float,
        version: int,
        *,
        weight_set: WeightSet = WeightSet.POLICY,
        run: str = "run",
        probe: Probe | None = None,
        timeout_s: float = 60.0,
    ) -> WeightsCall:
        folder = self.weights_dir / f"sent-{next(self._numbers)}"
        manifest = write_weights(
            folder,
            self.scaled(scale),
            weight_set=weight_set,
            version=version,
            run=run,
            probe=probe,
        )
        source = FolderSource(folder=str(folder))
        return WeightsCall(manifest=manifest, source=source, timeout_s=timeout_s)
