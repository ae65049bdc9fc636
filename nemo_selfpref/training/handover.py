"""A written folder of weights brought to rollout servers, on rank 0: by its name, or broadcast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

from nemo_selfpref.config.schema import WeightTransport
from nemo_selfpref.errors import SelfPrefError, WeightSyncError
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.manifest import read_tensor
from nemo_selfpref.rollout.serving.receiver import GroupSender
from nemo_selfpref.rollout.serving.wire import (
    FolderSource,
    Manifest,
    UpdateReport,
    WeightsCall,
)

_JOIN_S = 3.0
"""How long a server that was told of a broadcast may take to connect."""

Send = Callable[[WeightsCall], UpdateReport]
"""Has one server take in weights (ServerClient.update)."""


def hand_over(
    folder: Path,
    manifest: Manifest,
    sends: Sequence[Send],
    transport: WeightTransport,
    host: str,
    timeout_s: float,
) -> list[UpdateReport]:
    """Have every server take in the weights of `folder`, all at once; what they say of it.

    Raises:
        WeightSyncError, RolloutError: what the first server to fail said.
    """
    if not sends:
        return []
    sender: GroupSender | None = None
    if transport is not WeightTransport.folder:
        backend = "nccl" if transport is WeightTransport.nccl else "gloo"
        sender = GroupSender(host, backend, len(sends) + 1, timeout_s)
    sources = [
        sender.source(rank) if sender else FolderSource(folder=str(folder))
        for rank in range(1, len(sends) + 1)
    ]
    with ThreadPoolExecutor(len(sends)) as pool:
        calls = [
            pool.submit(send, WeightsCall(manifest=manifest, source=source, timeout_s=timeout_s))
            for send, source in zip(sends, sources, strict=True)
        ]
        if sender is not None:
            _broadcast(sender, folder, manifest, calls)
        first = wait(calls, return_when=FIRST_EXCEPTION).done
        # Where one has refused, the others still join, and end once the sender's store is gone.
        wait(calls, timeout=_JOIN_S if sender else None)
        sender = None
    for call in first:
        call.result()
    reports = [call.result() for call in calls]
    for report in reports:
        if report.stamp != manifest.stamp:
            raise WeightSyncError(f"a server holds {report.stamp} after taking in these weights")
    return reports


def _broadcast(
    sender: GroupSender, folder: Path, manifest: Manifest, calls: Sequence[Future[UpdateReport]]
) -> None:
    def refused() -> bool:
        return any(call.done() and call.exception() is not None for call in calls)

    tensors = ((entry.name, read_tensor(folder, entry)) for entry in manifest.tensors)
    try:
        sender.send(tensors, Until(None, refused))
    except SelfPrefError:
        # A server that refused says why; only without one is it the broadcast that failed.
        wait(calls, return_when=FIRST_EXCEPTION)
        if not refused():
            raise
