from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.training.reference_segments import (
    Entry,
    Segments,
    encode_segment,
    read_segment,
)

ENTRIES: dict[bytes, Entry] = {bytes([n]) * 32: (-1.5 * n, n + 1) for n in range(4)}
CONTEXT = "ab" * 32


class Told(list[str]):
    """What was said, one message an item."""


def segments(root: Path, told: list[str] | None = None, max_gb: float = 0.0) -> Segments:
    made = Segments(root, (Told() if told is None else told).append, max_gb)
    made.open(CONTEXT)
    return made


def write(root: Path, entries: dict[bytes, Entry], context: str = CONTEXT) -> Path:
    """One segment of these entries."""
    before = set(root.glob("*/*"))
    made = Segments(root, lambda text: pytest.fail(text))
    made.open(context)
    for key, entry in entries.items():
        made.add(key, entry)
    made.flush()
    (path,) = set(root.glob("*/*")) - before
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, ENTRIES)
    assert path.parent.name == CONTEXT
    assert path.name == hashlib.sha256(path.read_bytes()).hexdigest() + ".safetensors"
    assert read_segment(path) == ENTRIES
    found = load(path.read_bytes())
    assert {name: (str(v.dtype), v.shape) for name, v in found.items()} == {
        "keys": ("uint8", (4, 32)),
        "sums": ("float64", (4,)),
        "lengths": ("int64", (4,)),
        "checks": ("uint8", (4, 8)),
    }
    assert found["sums"].tolist() == [0.0, -1.5, -3.0, -4.5]
    assert found["lengths"].tolist() == [1, 2, 3, 4]
    assert segments(tmp_path).get(bytes([2]) * 32) == (-3.0, 3)
    assert segments(tmp_path).get(bytes([9]) * 32) is None


def test_a_flush_of_nothing_writes_nothing(tmp_path: Path) -> None:
    made = segments(tmp_path)
    made.add(b"x" * 32, (float("nan"), 3))  # not a log-prob to go on with
    made.flush()
    assert list(tmp_path.iterdir()) == [] and made.get(b"x" * 32) is None


def test_another_context_has_other_entries(tmp_path: Path) -> None:
    made = segments(tmp_path)
    made.add(b"x" * 32, (-2.0, 3))
    made.open("cd" * 32)  # writes what is new first
    assert made.get(b"x" * 32) is None
    made.open(CONTEXT)
    assert made.get(b"x" * 32) == (-2.0, 3)


def test_any_flipped_byte_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path, ENTRIES)
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match="its SHA-256 is not the one in its name"):
            read_segment(path)


def renamed(path: Path, data: bytes) -> Path:
    """A file whose name fits its bytes, whatever they are."""
    made = path.with_name(hashlib.sha256(data).hexdigest() + ".safetensors")
    made.write_bytes(data)
    return made


@pytest.mark.parametrize("changed", ["keys", "sums", "lengths", "checks"])
def test_an_entry_mended_by_hand_is_seen(tmp_path: Path, changed: str) -> None:
    path = write(tmp_path, ENTRIES)
    tensors = {name: np.array(value) for name, value in load(path.read_bytes()).items()}
    tensors[changed][2:3] += 1
    with pytest.raises(CheckpointError, match="entry 2 differs from its checksum"):
        read_segment(renamed(path, save(tensors)))


@pytest.mark.parametrize("data", [b"", b"not safetensors at all", save({"keys": np.zeros(3)})])
def test_what_is_no_segment_is_seen(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CheckpointError, match="not a segment"):
        read_segment(renamed(tmp_path / "x", data))


def test_a_column_too_short_is_seen(tmp_path: Path) -> None:
    tensors = {name: np.array(value) for name, value in load(encode_segment(ENTRIES)).items()}
    tensors["sums"] = tensors["sums"][:3]
    with pytest.raises(CheckpointError, match="not a segment"):
        read_segment(renamed(tmp_path / "x", save(tensors)))


def test_two_writers_of_other_entries(tmp_path: Path) -> None:
    one, two = segments(tmp_path), segments(tmp_path)
    one.add(b"1" * 32, (-1.0, 1))
    two.add(b"2" * 32, (-2.0, 2))
    one.flush()
    two.flush()
    both = segments(tmp_path)
    assert both.get(b"1" * 32) == (-1.0, 1) and both.get(b"2" * 32) == (-2.0, 2)


def _write_many(root: Path, own: int, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    for n in range(40):
        made = segments(root)
        made.add(bytes([n]) * 32, (-float(n), n))  # the same in both
        made.flush()
        made.add(bytes([n, own]) * 16, (-float(own), own))
        made.flush()


def test_two_writers_at_the_same_time(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    start = fork.Event()
    writers = [fork.Process(target=_write_many, args=(tmp_path, own, start)) for own in (90, 91)]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    told = Told()
    both = segments(tmp_path, told)
    assert told == []
    assert all(both.get(bytes([n]) * 32) == (-n, n) for n in range(40))
    assert all(both.get(bytes([n, o]) * 16) == (-o, o) for n in range(40) for o in (90, 91))
    assert {p.suffix for p in tmp_path.glob("*/*")} == {".safetensors"}  # no leftovers


@contextmanager
def no_room(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes inside the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room(tmp_path: Path) -> None:
    told = Told()
    made = segments(tmp_path, told)
    for key, entry in ENTRIES.items():
        made.add(key, entry)
    with no_room(100):
        made.flush()
    assert len(told) == 1
    assert f"4 log-probs could not be kept in {tmp_path} (File too large)" in told[0]
    assert "Free some space there, or set model.reference_cache_dir" in told[0]
    assert list(tmp_path.glob("*/*")) == []
    assert made.get(bytes([2]) * 32) == (-3.0, 3)  # this run goes on with them
    made.add(b"x" * 32, (-2.0, 3))
    made.flush()
    assert len(told) == 1 and segments(tmp_path).get(b"x" * 32) == (-2.0, 3)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    told = Told()
    made = segments(tmp_path / "file", told)
    made.add(b"x" * 32, (-2.0, 3))
    made.flush()
    assert len(told) == 1 and "could not be kept" in told[0]


def test_a_segment_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, ENTRIES)
    path.unlink()
    path.mkdir()
    told = Told()
    assert segments(tmp_path, told).get(bytes([2]) * 32) is None
    assert told == [f"reference cache: {path} cannot be read (Is a directory); left out"]


def test_the_oldest_make_room(tmp_path: Path) -> None:
    paths = [write(tmp_path, {bytes([n]) * 32: (-1.0, 1)}, "ab" * 31 + f"0{n}") for n in range(3)]
    for age, path in enumerate(paths):
        os.utime(path, (1000 + age, 1000 + age))
    size = paths[0].stat().st_size
    made = segments(tmp_path, max_gb=3 * size / 2**30)
    made.add(b"x" * 32, (-1.0, 1))
    made.flush()
    assert [path.exists() for path in paths] == [False, True, True]
    assert segments(tmp_path).get(b"x" * 32) == (-1.0, 1)
