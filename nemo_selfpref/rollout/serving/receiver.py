"""Weights broadcast over the network: what the trainer sends with, and what a server takes them in
with. Plain torch on both sides.

Rank 0 sends. The peers are not authenticated: the ports belong on a private network. What arrives
must have the digest that was announced over the server's authenticated route.
"""

from __future__ import annotations

import math
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nemo_selfpref.errors import WeightSyncError
from nemo_selfpref.rollout.engine import FOREVER, Until
from nemo_selfpref.rollout.serving.manifest import check_digest, write_weights
from nemo_selfpref.rollout.serving.process_group import Peer, serve_store
from nemo_selfpref.rollout.serving.wire import (
    FolderSource,
    GroupSource,
    Manifest,
    TensorEntry,
    WeightsCall,
)

_POLL_S = 0.05
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def receive(call: WeightsCall, weights_dir: Path) -> WeightsCall:
    """Take in the tensors of a GroupSource: the same call, with a new folder below `weights_dir`
    as its source. A call with a folder is returned as it is.

    Raises:
        WeightSyncError: a tensor did not come within the call's time, or what came is not what the
            manifest announced. Nothing is left in `weights_dir`.
    """
    source, announced = call.source, call.manifest
    if not isinstance(source, GroupSource):
        return call
    check_digest(announced)
    until = Until.within(call.timeout_s)
    weights_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    name = f"{announced.weight_set.value}-{announced.version}-{secrets.token_hex(4)}"
    folder = weights_dir / name
    try:
        made = _receive_into(folder, announced, source, until)
        _check_same(announced, made)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return call.model_copy(
        update={
            "manifest": made,
            "source": FolderSource(folder=str(folder)),
            "timeout_s": max(1.0, until.remaining or 0.0),
        }
    )


def _receive_into(folder: Path, announced: Manifest, source: GroupSource, until: Until) -> Manifest:
    peer = Peer.join(source, until)
    try:
        made = write_weights(
            folder,
            _arriving(peer, announced, until),
            weight_set=announced.weight_set,
            version=announced.version,
            run=announced.run,
            probe=announced.probe,
        )
        peer.say(f"received/{source.rank}")
    except BaseException as error:
        # The sender would wait for the rest of its time.
        peer.say(f"refused/{source.rank}", str(error))
        raise
    finally:
        peer.leave()
    return made


def _arriving(peer: Peer, manifest: Manifest, until: Until) -> Iterator[tuple[str, Tensor]]:
    count = len(manifest.tensors)
    for number, entry in enumerate(manifest.tensors, start=1):
        what = f"{entry.name} (tensor {number} of {count}) from rank 0 at {peer.where}"
        flat = torch.empty(_bytes_of(entry), dtype=torch.uint8, device=peer.device)
        peer.broadcast(flat, what, until)
        yield entry.name, flat.cpu().view(_DTYPES[entry.dtype]).view(entry.shape)


def _bytes_of(entry: TensorEntry) -> int:
    if any(size < 0 for size in entry.shape):
        raise WeightSyncError(f"{entry.name}: the shape {entry.shape} has a negative size")
    return math.prod(entry.shape) * _DTYPES[entry.dtype].itemsize


def _check_same(announced: Manifest, made: Manifest) -> None:
    if made.digest == announced.digest:
        return
    pairs = zip(announced.tensors, made.tensors, strict=True)
    other = next((new.name for old, new in pairs if new.sha256 != old.sha256), "the order")
    raise WeightSyncError(
        f"{announced.weight_set.value} {announced.stamp} did not arrive as announced: {other} "
        f"differs (digest {made.digest[:12]}, announced {announced.digest[:12]}). It is refused."
    )


class GroupSender:
    """The trainer's half: rank 0 of a group of `world_size`, for one set of weights.

    Args:
        host: this machine's address, which the receivers connect to; it listens on no other.
        backend: gloo sends from CPU memory, nccl from the current CUDA device.
        world_size: this sender and its receivers.
        timeout_s: for all of it, from the call of `send` on.
    """

    def __init__(
        self, host: str, backend: Literal["gloo", "nccl"], world_size: int, timeout_s: float
    ) -> None:
        self.host, self.world_size, self.timeout_s = host, world_size, timeout_s
        self.backend: Literal["gloo", "nccl"] = backend
        self._store, self.port = serve_store(host, world_size, timeout_s)

    def source(self, rank: int) -> GroupSource:
        """What receiver `rank` (1 up) is told."""
        return GroupSource(
            backend=self.backend,
            host=self.host,
            port=self.port,
            rank=rank,
            world_size=self.world_size,
        )

    def send(self, tensors: Iterable[tuple[str, Tensor]], until: Until = FOREVER) -> None:
        """Broadcast the tensors in the manifest's order; returns once every receiver has them all.

        Raises:
            WeightSyncError: a receiver did not join, take a tensor or confirm in time, or `until`
                was over first.
        """
        own = time.monotonic() + self.timeout_s
        deadline = own if until.deadline is None else min(own, until.deadline)
        until = Until(deadline, until.cancelled)
        self._hear_all("joined", until)
        peer = Peer.lead(self._store, self.source(1), until)
        receivers = f"{self.world_size - 1} receivers"
        try:
            for number, (name, tensor) in enumerate(tensors, start=1):
                flat = tensor.detach().to(peer.device).contiguous().view(-1).view(torch.uint8)
                peer.broadcast(flat, f"{name} (tensor {number}) to {receivers}", until)
            self._hear_all("received", until)
        except WeightSyncError:
            self._check_refused()
            raise
        finally:
            peer.leave()

    def _check_refused(self) -> None:
        for rank in range(1, self.world_size):
            if self._store.check([f"refused/{rank}"]):
                why = self._store.get(f"refused/{rank}").decode()
                raise WeightSyncError(f"rank {rank} of {self.world_size} refused: {why}")

    def _hear_all(self, what: str, until: Until) -> None:
        missing = list(range(1, self.world_size))
        while missing := [rank for rank in missing if not self._store.check([f"{what}/{rank}"])]:
            self._check_refused()
            if until.over:
                ranks = ", ".join(map(str, missing))
                raise WeightSyncError(
                    f"rank {ranks} of {self.world_size} has not {what} within {self.timeout_s:.1f} "
                    f"s (group at {self.host}:{self.port})"
                )
            time.sleep(_POLL_S)
