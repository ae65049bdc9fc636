"""Full disks, too small a quota, folders that cannot be written: told, survived, or refused."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.checkpoint.saver import save_now
from nemo_selfpref.checkpoint.seal import problems
from nemo_selfpref.checkpoint.snapshot import Snapshot
from nemo_selfpref.checkpoint.training_state import save_weights
from nemo_selfpref.config.loader import load_config
from nemo_selfpref.config.schema import CheckpointParams
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.training.checkpoints import StageCheckpoints
from nemo_selfpref.training.reference_segments import Segments
from nemo_selfpref.training.store import write_pairs, write_tensors
from nemo_selfpref.types import PreferencePair

CPU = torch.device("cpu")
_MIB = 1 << 20
WHERE = f"rank 0: .*\\(on {socket.gethostname()}\\)"
Full = Callable[[], AbstractContextManager[None]]


def snapshot(number: int, mib: float = 1.0) -> Snapshot:
    """A checkpoint's content that takes some MiB."""
    made = Snapshot()
    made.add_json("checkpoint.json", {"format": "nemo_selfpref", "version": 1, "number": number})
    made._shards["weights"] = shards = _shards(number, int(mib * _MIB))
    assert shards.entries
    return made


def _shards(number: int, size: int) -> Any:
    from nemo_selfpref.checkpoint.sharded import ShardWriter

    writer = ShardWriter()
    tensor = torch.full((size // 4,), float(number))
    writer.add("w", tensor, (0,), tuple(tensor.shape))
    return writer


@contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Hardly any space on the file system below a folder."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as handle:
        try:
            while handle.write(bytes(_MIB)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
        handle.truncate(max(handle.tell() - _MIB // 2, 0))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def limited() -> Iterator[None]:
    """No file may grow beyond 256 KiB, as under a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MIB // 4, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here; the limited files are tested")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(params=["full disk", "limited files"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Full, str]:
    """A folder, what takes its space away, and what the system says then."""
    if request.param == "limited files":
        return tmp_path, limited, os.strerror(errno.EFBIG)
    folder: Path = request.getfixturevalue("small_disk")
    return folder, lambda: filled(folder), os.strerror(errno.ENOSPC)


def of_stage(folder: Path, allowed: int, background: bool, said: list[str]) -> StageCheckpoints:
    params = CheckpointParams(failed_saves_allowed=allowed, async_save=background)
    return StageCheckpoints(folder / "stage", params, CPU, said.append)


@pytest.fixture(autouse=True)
def joined(policy: Policy) -> Policy:
    """A process group of one."""
    return policy


@pytest.mark.parametrize("background", [False, True], ids=["at-once", "background"])
def test_saves_fail_are_told_and_work_again(disk: tuple[Path, Full, str], background: bool) -> None:
    folder, full, reason = disk
    said: list[str] = []
    checkpoints = of_stage(folder, 2, background, said)
    saver = checkpoints.saver
    saver.begin(checkpoints.path(1), snapshot(1))
    assert saver.finish() and said == []
    with full():
        for step in (2, 3):
            saver.begin(checkpoints.path(step), snapshot(step))
            assert not saver.finish()  # training goes on
        assert checkpoints.newest() == checkpoints.path(1)
        assert sorted(os.listdir(folder / "stage" / "checkpoints")) == ["latest", "step-000001"]
    for line, step in zip(said, (2, 3), strict=True):
        start = f"checkpoint {checkpoints.path(step)} could not be written: rank 0: "
        assert line.startswith(start) and reason in line and "shard-00000.safetensors" in line
        assert f"(on {socket.gethostname()})" in line
        assert f"the newest whole one is {checkpoints.path(1)}" in line
    saver.begin(checkpoints.path(4), snapshot(4))
    assert saver.finish() and len(said) == 2
    assert checkpoints.newest() == checkpoints.path(4)
    with full():  # the count has begun anew
        for step in (5, 6):
            saver.begin(checkpoints.path(step), snapshot(step))
            assert not saver.finish()
        saver.begin(checkpoints.path(7), snapshot(7)) if background else None
        with pytest.raises(CheckpointError, match=r"step-000007 could not be .*Free some space"):
            saver.finish() if background else saver.begin(checkpoints.path(7), snapshot(7))
    assert checkpoints.newest() == checkpoints.path(4)
    saver.close()


def test_weights_that_do_not_fit_leave_the_old_ones(
    disk: tuple[Path, Full, str], policy: Policy, tokenizer: ChatTokenizer
) -> None:
    folder, full, reason = disk
    target = folder / "checkpoint"
    save_weights(target, policy, tokenizer)
    with full(), pytest.raises(CheckpointError) as caught:
        save_weights(target, policy, tokenizer)
    assert str(caught.value).startswith(f"{target} could not be written: rank 0: ")
    assert reason in str(caught.value)
    assert problems(target) == [] and os.listdir(folder) == ["checkpoint"]
    save_weights(target, policy, tokenizer)


def test_a_tokenizer_that_does_not_fit(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """Its files come from code that raises errors of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    made = Snapshot()
    made.add_file("tokenizer", lambda path: tokenizer.save_pretrained(str(path)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(CheckpointError, match=f"could not be written: {WHERE}"):
            save_now(tmp_path / "checkpoint", made, CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_a_file_where_a_folder_belongs(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "stage").write_text("in the way")
    checkpoints = of_stage(tmp_path, 0, True, said)
    with pytest.raises(CheckpointError, match=r"step-000001 could not be written: .*Not a dir"):
        checkpoints.saver.begin(checkpoints.path(1), snapshot(1))
    checkpoints.saver.close()


@pytest.fixture
def read_only(small_disk: Path) -> Iterator[Callable[[], None]]:
    """Makes the small disk read-only."""

    def make() -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)

    yield make
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


def test_a_disk_that_became_read_only(small_disk: Path, read_only: Callable[[], None]) -> None:
    said: list[str] = []
    checkpoints = of_stage(small_disk, 1, False, said)
    checkpoints.saver.begin(checkpoints.path(1), snapshot(1))
    read_only()
    checkpoints.saver.begin(checkpoints.path(2), snapshot(2))
    assert len(said) == 1 and "Read-only file system" in said[0]
    assert checkpoints.newest() == checkpoints.path(1)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        checkpoints.saver.begin(checkpoints.path(3), snapshot(3))


def config() -> Any:
    schemas = {name: cls.config_class for name, cls in algorithms().items()}
    return load_config("dpo", ["data.train_path=[rows.jsonl]"], schemas)


def test_results_that_do_not_fit_leave_the_old_ones(disk: tuple[Path, Full, str]) -> None:
    folder, full, reason = disk
    pairs = [PreferencePair(str(n), tuple(range(n, n + 99)), (n,), (2,)) for n in range(20)]
    write_pairs(folder / "pairs.parquet", pairs[:1])
    write_tensors(folder / "t.safetensors", {"a": torch.ones(9)})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    draw = random.Random(1)
    many = [
        PreferencePair(str(n), tuple(draw.getrandbits(40) for _ in range(1000)), (n,), (2,))
        for n in range(200)
    ]
    with full():
        with pytest.raises(OSError, match=reason):
            write_pairs(folder / "pairs.parquet", many)
        with pytest.raises((OSError, CheckpointError), match=reason):
            write_tensors(folder / "t.safetensors", {"a": torch.ones(_MIB)})
    for name, content in before.items():
        assert (folder / name).read_bytes() == content
    assert sorted(os.listdir(folder)) == sorted(before), "what was cut off takes space"


def test_the_reference_cache_says_so_and_the_run_goes_on(disk: tuple[Path, Full, str]) -> None:
    folder, full, reason = disk
    said: list[str] = []
    segments = Segments(folder / "cache", said.append)
    segments.open("c")
    for number in range(40_000):
        segments.add(number.to_bytes(32, "big"), (-1.0, 3))
    with full():
        segments.flush()
    assert len(said) == 1 and reason in said[0] and "Free some space there" in said[0]
    assert segments.get(bytes(32)) == (-1.0, 3)
    assert [p for p in (folder / "cache").rglob("*") if p.is_file()] == []
