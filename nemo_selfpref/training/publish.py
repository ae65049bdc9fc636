"""The trainer's weights on their way to the rollout servers: written, announced, confirmed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_selfpref.checkpoint.export import write_hf_folder
from nemo_selfpref.checkpoint.weight_stream import read_to_end, stream_weights
from nemo_selfpref.config.schema import WeightTransport
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError, RolloutError, SelfPrefError, WeightSyncError
from nemo_selfpref.megatron.parallel import all_gather_json, world_group
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.rollout.serving.manifest import write_weights
from nemo_selfpref.rollout.serving.wire import (
    FolderSource,
    Manifest,
    Probe,
    Stamp,
    UpdateReport,
    WeightsCall,
)
from nemo_selfpref.training.handover import Send, hand_over
from nemo_selfpref.types import TokenIds, WeightSet

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_PROBE_TOKENS = 16


@dataclass(frozen=True)
class PublishTimes:
    """What one hand-over cost: seconds in which tensors were gathered, written and taken in by the
    servers, and the tensors' bytes."""

    gather_s: float = 0.0
    write_s: float = 0.0
    send_s: float = 0.0
    bytes: int = 0


class WeightPublisher:
    """Hands the policy's weights and its copies to rollout servers. Every rank calls every method
    in the same order; rank 0 does the writing and the sending.

    Args:
        folder: where the folders of weights are put; the servers' weights folder.
        run: name of this process' run, new for each start.
        tolerance: Probe.tolerance; None is 1e-3 in float32 and 0.1 in bfloat16.
        transport: how the tensors reach a server: by their folder, or broadcast.
        host: this machine's address, for a broadcast.
        timeout_s: how long a server may take.
        max_length: tokens an engine can read, the one it samples included; None: the model's.
        keep: how many folders of a set stay, the newest among them.
    """

    def __init__(
        self,
        policy: Policy,
        weights: WeightSets,
        *,
        folder: Path,
        run: str,
        tolerance: float | None = None,
        transport: WeightTransport = WeightTransport.folder,
        host: str = "127.0.0.1",
        timeout_s: float = 600.0,
        max_length: int | None = None,
        keep: int = 2,
    ) -> None:
        self.policy, self.weights, self.folder, self.run = policy, weights, folder, run
        self.dtype: torch.dtype = policy.module.config.params_dtype
        self.tolerance = _TOLERANCE[self.dtype] if tolerance is None else tolerance
        self.transport, self.host, self.timeout_s = transport, host, timeout_s
        self.probe_ids = probe_ids(policy, max_length)
        self.last = PublishTimes()
        self.reports: list[UpdateReport] = []
        """What the servers said of the last weights; rank 0 alone."""
        self._stamps: dict[WeightSet, Stamp] = {}
        self._marks: dict[WeightSet, tuple[int, int]] = {}
        self._folders: dict[WeightSet, list[Path]] = {}
        self._confirmed: dict[WeightSet, list[Path]] = {}
        self._manifests: dict[WeightSet, Manifest] = {}
        self._count, self._keep = 0, keep

    def stamp(self, weight_set: WeightSet) -> Stamp | None:
        """The weights last published; None before the first time."""
        return self._stamps.get(weight_set)

    def needed(self, weight_set: WeightSet) -> bool:
        """Whether a set may hold other weights than those last published.

        The policy's are told by their version, which is new after every step and every reset. Who
        changes them without that calls `forget`.
        """
        if weight_set not in self.weights:
            return True
        return self._marks.get(weight_set) != self._mark(weight_set)

    def forget(self, weight_set: WeightSet) -> None:
        """Publish this set anew before it is next used."""
        self._marks.pop(weight_set, None)

    def _mark(self, weight_set: WeightSet) -> tuple[int, int]:
        # A copy of one version can hold several things: the last average of one stage, and the
        # first of the next.
        return self.weights.version(weight_set), self.weights.revision(weight_set)

    def publish(self, weight_set: WeightSet, send: Send | Sequence[Send] | None) -> Stamp:
        """Write these weights and have the servers take them in. Collective.

        `send` hands the call to a server; one for each of them, None to write alone. After an
        error the stamp is what it was, and a server that did confirm may hold the new weights.

        Raises:
            RolloutError: the run holds no such copy.
            WeightSyncError: on every rank: a value is not a number, the folder cannot be written,
                or a server did not take the weights.
        """
        if weight_set not in self.weights:
            raise RolloutError(f"no {weight_set.value} weights are held here: nothing to publish")
        sends = () if send is None else (send,) if callable(send) else tuple(send)
        mark, self._count = self._mark(weight_set), self._count + 1
        self._marks.pop(weight_set, None)
        probe = self._probe(weight_set)
        done = _together(
            self.policy, lambda: self._write_and_send(weight_set, probe, sends), WeightSyncError
        )
        stamp = Stamp.model_validate(done["stamp"])
        self.last = PublishTimes(**done["times"])
        self._stamps[weight_set], self._marks[weight_set] = stamp, mark
        return stamp

    def call(self, weight_set: WeightSet) -> WeightsCall:
        """What has a server take in the weights last published, from their folder; rank 0 alone."""
        source = FolderSource(folder=str(self._confirmed[weight_set][-1]))
        manifest = self._manifests[weight_set]
        return WeightsCall(manifest=manifest, source=source, timeout_s=self.timeout_s)

    def keep_newest(self) -> None:
        """Delete the folders that no server needs any more: all but each set's newest."""
        for weight_set, kept in self._confirmed.items():
            _delete([f for f in self._folders[weight_set] if f != kept[-1]])
            self._folders[weight_set], self._confirmed[weight_set] = kept[-1:], kept[-1:]

    def close(self) -> None:
        """Delete every folder this publisher wrote; the servers must have ended."""
        for folders in self._folders.values():
            _delete(folders)
        self._folders.clear()
        self._confirmed.clear()

    def _probe(self, weight_set: WeightSet) -> float:
        """Log-prob of the fixed text under these weights; may be no number where they are none."""
        first, *rest = self.probe_ids
        with self.weights.using(weight_set), self.policy.without_fp8():
            return float(self.policy.score([((first,), tuple(rest))]).sums[0])

    def _write_and_send(
        self, weight_set: WeightSet, logprob: float, sends: Sequence[Send]
    ) -> dict[str, Any]:
        """Rank 0 writes and sends; the others give their parts."""
        tensors = _Timed(self._tensors(weight_set))
        with read_to_end(tensors.source):
            if not self.policy.layout.is_main:
                return {}
            started = time.monotonic()
            version = self.weights.version(weight_set)
            folder = self.folder / f"{weight_set.value}-{version}-{self._count}"
            probe = self._probe_record(logprob) if isfinite(logprob) else None
            manifest = write_weights(
                folder, tensors, weight_set=weight_set, version=version, run=self.run, probe=probe
            )
        self._folders.setdefault(weight_set, []).append(folder)
        if probe is None:
            raise WeightSyncError(
                f"the log-prob of a fixed text under the {weight_set.value} weights of version "
                f"{version} is {logprob}, though every weight is finite: nothing was handed over. "
                "Has the training diverged?"
            )
        written = time.monotonic()
        self._send(folder, manifest, sends)
        self._confirm(weight_set, folder)
        self._manifests[weight_set] = manifest
        times = PublishTimes(
            tensors.seconds,
            written - started - tensors.seconds,
            time.monotonic() - written,
            tensors.bytes,
        )
        return {"stamp": manifest.stamp.model_dump(), "times": asdict(times)}

    def _tensors(self, weight_set: WeightSet) -> Iterator[tuple[str, Tensor]]:
        policy = weight_set is WeightSet.POLICY
        copy = None if policy else self.weights.sharded_state_dict(weight_set)
        return stream_weights(self.policy, self.dtype, copy)

    def _probe_record(self, logprob: float) -> Probe:
        return Probe(token_ids=list(self.probe_ids), logprob=logprob, tolerance=self.tolerance)

    def _send(self, folder: Path, manifest: Manifest, sends: Sequence[Send]) -> None:
        try:
            self.reports = hand_over(
                folder, manifest, sends, self.transport, self.host, self.timeout_s
            )
        except SelfPrefError as error:
            before = self._stamps.get(manifest.weight_set)
            held = str(before) if before else "none that this run sent"
            raise WeightSyncError(
                f"{manifest.weight_set.value} {manifest.stamp} was not taken in by every server: "
                f"{error} (confirmed before: {held})"
            ) from error

    def _confirm(self, weight_set: WeightSet, new: Path) -> None:
        """Keep the new folder and those confirmed last before it."""
        kept = [*self._confirmed.get(weight_set, []), new][-self._keep :]
        _delete([folder for folder in self._folders[weight_set] if folder not in kept])
        self._folders[weight_set], self._confirmed[weight_set] = [*kept], kept


def probe_ids(policy: Policy, max_length: int | None = None) -> TokenIds:
    """A fixed text for Probe: random tokens, the same in every run of a model."""
    longest = min(max_length or policy.arch.max_position_embeddings, _PROBE_TOKENS + 1) - 1
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(policy.arch.vocab_size, (max(longest, 2),), generator=generator)
    return tuple(ids.tolist())


def write_model_folder(policy: Policy, tokenizer: ChatTokenizer, folder: Path) -> None:
    """Write the policy as it is to a Hugging Face folder that engines can start from: in the
    training's precision, adapters merged, not flushed to the disk. Collective.

    Raises:
        CheckpointError: on every rank: the folder cannot be written.
    """

    def write() -> None:
        tensors = stream_weights(policy, policy.module.config.params_dtype)
        with read_to_end(tensors):
            if policy.layout.is_main:
                write_hf_folder(folder, tensors, policy.arch, tokenizer, durable=False)

    _together(policy, write, CheckpointError)


def _together(policy: Policy, act: Callable[[], Any], kind: type[SelfPrefError]) -> Any:
    """Do something on every rank and give every rank what rank 0 got; the error of any is raised
    by all, so that none waits for one that gave up."""
    cause: Exception | None = None
    try:
        outcome = {"value": act()}
    except Exception as error:
        ours = isinstance(error, SelfPrefError)
        cause = error
        outcome = {"error": str(error) if ours else f"{type(error).__name__}: {error}"}
    outcomes = all_gather_json(outcome, world_group(), policy.platform.device())
    failed = next((o["error"] for o in outcomes if "error" in o), None)
    if failed is not None:
        raise kind(failed) from cause
    return outcomes[0]["value"]


class _Timed:
    """Tensors as they are gathered, with the seconds that took and their bytes."""

    def __init__(self, source: Iterator[tuple[str, Tensor]]) -> None:
        self.source, self.seconds, self.bytes = source, 0.0, 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        while True:
            started = time.monotonic()
            found = next(self.source, None)
            self.seconds += time.monotonic() - started
            if found is None:
                return
            self.bytes += found[1].numel() * found[1].element_size()
            yield found


def _delete(folders: Sequence[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
