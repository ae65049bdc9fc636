"""Weights over a process group, between two processes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_selfpref.errors import WeightSyncError
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.manifest import read_manifest, verify_files, write_weights
from nemo_selfpref.rollout.serving.process_group import Peer
from nemo_selfpref.rollout.serving.receiver import GroupSender, receive
from nemo_selfpref.rollout.serving.wire import (
    FolderSource,
    GroupSource,
    Manifest,
    Probe,
    WeightsCall,
)
from nemo_selfpref.types import WeightSet

PEER = Path(__file__).with_name("group_peer.py")
Named = list[tuple[str, Tensor]]


@pytest.fixture
def tensors() -> Named:
    made = torch.Generator().manual_seed(5)
    return [
        ("embed.weight", torch.randn(50, 16, generator=made)),
        ("scale", torch.randn((), generator=made).bfloat16()),
        ("none", torch.empty(0, 4)),
        ("head.weight", torch.randn(300, 1000, generator=made).half()),
    ]


@pytest.fixture
def announced(tensors: Named, tmp_path: Path) -> Manifest:
    probe = Probe(token_ids=[1, 2], logprob=-3.5, tolerance=1e-3)
    return write_weights(
        tmp_path / "sent",
        tensors,
        weight_set=WeightSet.EMA,
        version=7,
        run="r",
        probe=probe,
    )


class Receiver:
    """group_peer.py at work."""

    def __init__(self, folder: Path, manifest: Manifest, source: GroupSource, timeout_s: float):
        call = WeightsCall(manifest=manifest, source=source, timeout_s=timeout_s)
        file = folder / "call.json"
        file.write_text(call.model_dump_json())
        self.weights_dir = folder / "received"
        command = [sys.executable, str(PEER), str(file), str(self.weights_dir)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def outcome(self) -> dict[str, Any]:
        shown, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == 0
        return json.loads(shown)

    def left_behind(self) -> list[Path]:
        return list(self.weights_dir.iterdir()) if self.weights_dir.exists() else []


@pytest.fixture
def transfer(announced: Manifest, tmp_path: Path) -> Iterator[tuple[GroupSender, Receiver]]:
    sender = GroupSender("127.0.0.1", "gloo", 2, 60)
    receiver = Receiver(tmp_path, announced, sender.source(1), 60)
    yield sender, receiver
    receiver.process.kill()
    receiver.process.wait()


def test_every_byte_arrives(
    transfer: tuple[GroupSender, Receiver], tensors: Named, announced: Manifest
) -> None:
    sender, receiver = transfer
    sender.send(tensors)
    call = WeightsCall.model_validate(receiver.outcome())
    assert isinstance(call.source, FolderSource)
    folder = Path(call.source.folder)
    assert folder.parent == receiver.weights_dir
    assert read_manifest(folder) == call.manifest == announced
    verify_files(folder, announced)


def test_other_tensors_than_announced_are_refused(
    transfer: tuple[GroupSender, Receiver], tensors: Named
) -> None:
    sender, receiver = transfer
    changed = [(name, t + 1 if name == "scale" else t) for name, t in tensors]
    sender.send(changed)
    error = receiver.outcome()["error"]
    assert "ema version 7" in error and "scale differs" in error
    assert receiver.left_behind() == []


def test_a_value_that_is_not_a_number_is_refused(
    transfer: tuple[GroupSender, Receiver], tensors: Named
) -> None:
    sender, receiver = transfer
    with pytest.raises(WeightSyncError, match=r"rank 1 of 2 refused: .*embed\.weight"):
        sender.send([(name, t * float("nan")) for name, t in tensors])
    assert "embed.weight holds values that are not finite" in receiver.outcome()["error"]
    assert receiver.left_behind() == []


def test_a_sender_that_stalls_is_given_up(
    announced: Manifest, tensors: Named, tmp_path: Path
) -> None:
    sender = GroupSender("127.0.0.1", "gloo", 2, 60)
    receiver = Receiver(tmp_path, announced, sender.source(1), 6)
    answered = threading.Event()

    def stalling() -> Iterator[tuple[str, Tensor]]:
        yield tensors[0]
        answered.wait(120)

    thread, failures = in_thread(sender, stalling())
    error = receiver.outcome()["error"]
    answered.set()
    assert "scale (tensor 2 of 4) from rank 0 at 127.0.0.1" in error and "deadline" in error
    assert receiver.left_behind() == []
    thread.join(60)
    assert "rank 1 of 2 refused: scale (tensor 2 of 4)" in str(failures[0])


def in_thread(
    sender: GroupSender, tensors: Iterable[tuple[str, Tensor]]
) -> tuple[threading.Thread, list[WeightSyncError]]:
    failures: list[WeightSyncError] = []

    def run() -> None:
        try:
            sender.send(tensors)
        except WeightSyncError as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, failures


def test_a_receiver_that_dies_is_noticed(
    transfer: tuple[GroupSender, Receiver], tensors: Named
) -> None:
    sender, receiver = transfer

    def killing() -> Iterator[tuple[str, Tensor]]:
        yield tensors[0]
        receiver.process.kill()
        receiver.process.wait()
        # More than the kernel's buffers take: it cannot look as if it had been sent.
        yield "head.weight", torch.zeros(2**25)

    with pytest.raises(WeightSyncError, match=r"head\.weight \(tensor 2\) to 1 receivers"):
        sender.send(killing())


def test_a_receiver_that_never_comes_is_named() -> None:
    sender = GroupSender("127.0.0.1", "gloo", 3, 0.3)
    with pytest.raises(WeightSyncError, match="rank 1, 2 of 3 has not joined within"):
        sender.send([("a", torch.zeros(1))])


def test_a_sender_that_is_not_there_is_named(announced: Manifest, tmp_path: Path) -> None:
    gone = GroupSender("127.0.0.1", "gloo", 2, 1).source(1)  # closed at once
    call = WeightsCall(manifest=announced, source=gone, timeout_s=0.5)
    with pytest.raises(WeightSyncError, match=f"group at 127.0.0.1:{gone.port}"):
        receive(call, tmp_path / "received")
    assert list((tmp_path / "received").iterdir()) == []


def test_a_sender_listens_where_it_was_told_to() -> None:
    with pytest.raises(WeightSyncError, match="expected an address of this machine".capitalize()):
        GroupSender("192.0.2.1", "gloo", 2, 1)


def test_a_folder_needs_no_transfer(announced: Manifest, tmp_path: Path) -> None:
    call = WeightsCall(manifest=announced, source=FolderSource(folder=str(tmp_path / "sent")))
    assert receive(call, tmp_path / "received") is call
    assert not (tmp_path / "received").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nccl is not refused")
def test_nccl_without_a_gpu_is_refused() -> None:
    sender = GroupSender("127.0.0.1", "nccl", 2, 5)
    with pytest.raises(WeightSyncError, match=r"rollout\.vllm\.transport=gloo"):
        Peer.join(sender.source(1), Until.within(5))


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="nccl takes no two ranks on one GPU: needs two GPUs"
)
def test_every_byte_arrives_by_nccl(tensors: Named, announced: Manifest, tmp_path: Path) -> None:
    sender = GroupSender("127.0.0.1", "nccl", 2, 60)
    torch.cuda.set_device(1)  # the receiver takes the first
    receiver = Receiver(tmp_path, announced, sender.source(1), 60)
    sender.send(tensors)
    call = WeightsCall.model_validate(receiver.outcome())
    assert call.manifest == announced
