"""The sets of weights an engine answers for: which are held, and which of them is loaded.

A set that shares the engine with another is swapped in between two batches, never within one. New
weights are all taken in, or the ones before are served on.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from nemo_selfpref.errors import RolloutError, StaleWeightsError, WeightSyncError
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec
from nemo_selfpref.rollout.serving.manifest import check_complete, check_digest
from nemo_selfpref.rollout.serving.vllm_engine import VLLMEngine
from nemo_selfpref.rollout.serving.weight_files import check_names, files_below, model_files
from nemo_selfpref.rollout.serving.wire import (
    GenerateCall,
    LabelsCall,
    Manifest,
    Probe,
    Stamp,
    UpdateReport,
)
from nemo_selfpref.types import WeightSet

INITIAL = Stamp(version=-1, digest="initial")
"""The weights of the model's folder, before any were sent."""


@dataclass(frozen=True)
class _Held:
    """Where a set of weights can be loaded from."""

    folder: Path
    stamp: Stamp
    run: str = ""
    probe: Probe | None = None

    def files(self) -> list[Path]:
        # What was sent is all there is in its folder; a model's may hold other forms of it.
        return model_files(self.folder) if self.stamp == INITIAL else files_below(self.folder)


class HeldWeights:
    """What is held may be asked and checked from any thread; what loads is called while nothing
    runs, on the engine's thread.

    `failure`: why the engine can be trusted no more; empty while it can.
    """

    def __init__(self, spec: EngineSpec, engine: VLLMEngine) -> None:
        self._spec, self._engine = spec, engine
        first = _Held(Path(spec.model), INITIAL)
        self._held = {WeightSet(name): first for name in spec.weight_sets}
        self._loaded = next(iter(self._held))
        self.failure = ""

    # -- called from any thread ---------------------------------------------------------------

    def stamps(self) -> dict[WeightSet, Stamp]:
        return {name: held.stamp for name, held in self._held.items()}

    def check(self, call: GenerateCall | LabelsCall) -> None:
        """Raise StaleWeightsError or RolloutError unless the weights asked for are held."""
        held = self._held.get(call.weight_set)
        if held is None:
            names = ", ".join(name.value for name in self._held)
            raise RolloutError(
                f"no {call.weight_set.value} weights are held here; there are {names}"
            )
        if call.expect is not None and held.stamp != call.expect:
            raise StaleWeightsError(
                f"{call.weight_set.value} weights of {call.expect} were asked for; "
                f"{held.stamp} are held"
            )

    def check_manifest(self, manifest: Manifest) -> None:
        """Raise WeightSyncError for weights that are not this model's, whole, and newer."""
        held = self._held.get(manifest.weight_set)
        if held is None:
            raise WeightSyncError(f"this engine does not hold {manifest.weight_set.value} weights")
        if held.run == manifest.run and manifest.version < held.stamp.version:
            raise WeightSyncError(
                f"{manifest.weight_set.value} {manifest.stamp} is older than {held.stamp}, which "
                "is served: refused"
            )
        self._check_probe(manifest)
        check_digest(manifest)
        check_complete(manifest, self._engine.facts)

    def _check_probe(self, manifest: Manifest) -> None:
        probe, most = manifest.probe, self._engine.info.vocab_size
        if probe is not None and (
            max(probe.token_ids) >= most or len(probe.token_ids) >= self._spec.max_length
        ):
            raise WeightSyncError(
                f"the probe of {manifest.weight_set.value} {manifest.stamp} is no prompt of this "
                f"model: {len(probe.token_ids)} tokens up to {max(probe.token_ids)}; at most "
                f"{self._spec.max_length - 1} below {most} are possible"
            )

    # -- on the engine's thread ---------------------------------------------------------------

    def is_loaded(self, name: WeightSet) -> bool:
        return name is self._loaded

    def load_for(self, call: GenerateCall | LabelsCall) -> Stamp:
        """Have the weights a call asks for in the engine; which they are.

        Raises:
            RolloutError: they are not held, or cannot be loaded, or the engine sleeps or failed.
        """
        if self.failure:
            raise RolloutError(f"the engine is quarantined: {self.failure}")
        if self._engine.asleep:
            raise RolloutError("the engine sleeps: wake it first")
        self.check(call)
        self._swap_to(call.weight_set)
        return self._held[call.weight_set].stamp

    def _swap_to(self, name: WeightSet) -> None:
        if name is self._loaded:
            return
        if self._held[name] != self._held[self._loaded]:
            try:
                self._load(self._held[name])
            except Exception as failure:
                self._restore(self._held[self._loaded], failure)
                raise
        self._loaded = name

    def install(
        self, folder: Path, manifest: Manifest, verify_s: float, since: float
    ) -> UpdateReport:
        """Load new weights and hold them, in the place of the set's before.

        Args:
            folder: of the files, verified already, which took `verify_s` seconds.
            since: when this began to wait for the engine, by time.monotonic().

        Raises:
            WeightSyncError: refused or failed; the weights before are served.
        """
        if self._engine.asleep:
            raise WeightSyncError("the engine sleeps and takes in no weights: wake it first")
        self.check_manifest(manifest)  # again: a newer one may have been taken in meanwhile
        before = self._held[manifest.weight_set]
        wait_s = time.monotonic() - since
        new = _Held(folder, manifest.stamp, manifest.run, manifest.probe)
        # Loaded even where another set is in the engine: what cannot be loaded must not be held.
        try:
            load_s, probe_s, error = self._load(new)
        except Exception as failure:
            self._restore(self._held[self._loaded], failure)
            raise WeightSyncError(
                f"{manifest.weight_set.value} {manifest.stamp} was not taken in: {failure}. "
                f"{before.stamp} is served."
            ) from failure
        self._held[manifest.weight_set] = new
        self._loaded = manifest.weight_set
        return UpdateReport(
            stamp=manifest.stamp,
            wait_s=wait_s,
            verify_s=verify_s,
            load_s=load_s,
            probe_s=probe_s,
            probe_error=error,
        )

    def _restore(self, held: _Held, failure: Exception) -> None:
        try:
            self._load(held)
        except Exception as second:
            self.failure = (
                f"an update failed ({failure}) and the weights before it could not be put back "
                f"({second})"
            )
            raise WeightSyncError(self.failure) from failure

    def _load(self, held: _Held) -> tuple[float, float, float | None]:
        """Weights into vLLM, an empty prefix cache, the probe; seconds and the probe's error."""
        started = time.monotonic()
        files = held.files()
        # A set may be swapped in long after its files were verified: vLLM would load what is left
        # of a folder without a word.
        check_names(held.folder, self._engine.facts.keys(), files)
        self._engine.load(files)
        loaded = time.monotonic()
        error = None if held.probe is None else self._engine.probe(held.probe)
        return loaded - started, time.monotonic() - loaded, error
