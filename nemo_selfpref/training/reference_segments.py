"""The reference cache on disk: files of log-probs that are written once and never changed.

    DIR/CONTEXT/SHA256.safetensors          a segment
    DIR/CONTEXT/SHA256.safetensors.bad      one that was found damaged, put aside

CONTEXT names what all entries below it have in common (reference_cache.py). A segment is named by
the SHA-256 of its bytes: a flipped bit, a cut, a hole or another file's content shows, and runs
that write the same entries at the same time write the same file.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import write_bytes

Entry = tuple[float, int]
"""Log-prob sum of a response and its length in tokens."""

SUFFIX = ".safetensors"
_CHECK_BYTES = 8
_GIB = 1 << 30


def encode_segment(entries: Mapping[bytes, Entry]) -> bytes:
    """Entries as safetensors: keys uint8 [N, 32], sums float64 [N], lengths int64 [N] and checks
    uint8 [N, 8], the first bytes of each entry's own SHA-256."""
    checks = b"".join(_check(key, entry) for key, entry in entries.items())
    return save(
        {
            "keys": np.frombuffer(b"".join(entries), np.uint8).reshape(-1, 32),
            "sums": np.array([total for total, _ in entries.values()], np.float64),
            "lengths": np.array([length for _, length in entries.values()], np.int64),
            "checks": np.frombuffer(checks, np.uint8).reshape(-1, _CHECK_BYTES),
        }
    )


def read_segment(path: Path) -> dict[bytes, Entry]:
    """The entries of a segment by key.

    Raises:
        CheckpointError: it is not what was written under this name.
        OSError: it cannot be read, or is gone.
    """
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != path.name.removesuffix(SUFFIX):
        raise CheckpointError(f"{path}: its SHA-256 is not the one in its name")
    try:
        rows = _rows(data)
        # The file's name vouches for its bytes; this for what a mending hand made of them.
        wrong = [n for n, (key, entry, check) in enumerate(rows) if _check(key, entry) != check]
    except (SafetensorError, KeyError, ValueError, TypeError, struct.error) as error:
        raise CheckpointError(f"{path}: not a segment ({error})") from error
    if wrong:
        raise CheckpointError(f"{path}: entry {wrong[0]} differs from its checksum")
    return {key: entry for key, entry, _ in rows}


def _rows(data: bytes) -> list[tuple[bytes, Entry, bytes]]:
    """Key, entry and checksum of each row."""
    found = load(data)
    keys = _pieces(found["keys"].tobytes(), 32)
    entries = zip(found["sums"].tolist(), found["lengths"].tolist(), strict=True)
    checks = _pieces(found["checks"].tobytes(), _CHECK_BYTES)
    return list(zip(keys, entries, checks, strict=True))


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[i : i + size] for i in range(0, len(data), size))


def _check(key: bytes, entry: Entry) -> bytes:
    return hashlib.sha256(key + struct.pack("<dq", *entry)).digest()[:_CHECK_BYTES]


class Segments:
    """Entries of one context at a time, in memory, and the segments they are kept in.

    Nothing here stops a run: what is damaged or cannot be read is scored anew, what cannot be
    written is scored anew next time, and `say` tells of both. One process of a run uses this.

    Args:
        root: the cache's folder; several runs may share it.
        max_gb: GiB that all segments together may take, the oldest go first; 0 for no bound.
    """

    def __init__(self, root: Path, say: Callable[[str], None], max_gb: float = 0.0) -> None:
        self.root, self.max_gb, self._say = root, max_gb, say
        self._context: str | None = None
        self._entries: dict[bytes, Entry] = {}
        self._new: dict[bytes, Entry] = {}
        self._told: set[str] = set()

    def open(self, context: str) -> None:
        """Turn to a context: what is new in the last one is written, this one's entries read."""
        if context == self._context:
            return
        self.flush()
        self._context, self._entries = context, {}
        for path in sorted((self.root / context).glob(f"*{SUFFIX}")):
            self._entries |= self._read(path)

    def get(self, key: bytes) -> Entry | None:
        return self._entries.get(key)

    def add(self, key: bytes, entry: Entry) -> None:
        """Keep an entry in memory; `flush` writes it. What is not finite is not kept."""
        if math.isfinite(entry[0]):
            self._entries[key] = self._new[key] = entry

    def flush(self) -> None:
        """Write what is new as one segment."""
        if not self._new:
            return
        assert self._context is not None, "entries belong to a context"
        data = encode_segment(self._new)
        name = hashlib.sha256(data).hexdigest() + SUFFIX
        count, self._new = len(self._new), {}
        try:
            write_bytes(self.root / self._context / name, data)
            self._shrink()
        except OSError as error:
            self._tell(
                f"reference cache: {count} log-probs could not be kept in {self.root} "
                f"({error.strerror or error}). Free some space there, or set "
                "model.reference_cache_dir to another folder or to null. The run goes on; what is "
                "not kept is scored again."
            )

    def _read(self, path: Path) -> dict[bytes, Entry]:
        try:
            return read_segment(path)
        except FileNotFoundError:
            return {}  # another run made room, or put it aside
        except OSError as error:
            self._tell(
                f"reference cache: {path} cannot be read ({error.strerror or error}); left out"
            )
        except CheckpointError as error:
            self._put_aside(path)
            self._tell(
                f"reference cache: damaged segment {error}. It is left out (and kept as "
                f"{path.name}.bad where the folder can be written); its log-probs are scored again."
            )
        return {}

    def _put_aside(self, path: Path) -> None:
        try:
            os.replace(path, path.with_name(f"{path.name}.bad"))
        except OSError:
            return  # a folder we may only read, or another run was first

    def _shrink(self) -> None:
        if not self.max_gb:
            return
        stats = []
        for path in self.root.glob(f"*/*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # another run makes room too
                stats.append((path.stat(), path))
        size = sum(stat.st_size for stat, _ in stats)
        for stat, path in sorted(stats, key=lambda item: (item[0].st_mtime_ns, item[1])):
            if size <= self.max_gb * _GIB:
                return
            path.unlink(missing_ok=True)
            size -= stat.st_size

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)
