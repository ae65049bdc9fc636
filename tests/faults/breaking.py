"""Damage to files, drawn from a seed: what disks, copies and mistaken hands do to them."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

PAGE = 4096


class Damage(StrEnum):
    FLIP = "a flipped bit"
    ZEROS = "a page of zeros"
    CUT = "cut off"
    DELETED = "deleted"
    SWAPPED = "swapped"


@dataclass(frozen=True)
class Broken:
    """What was done to which files (two where they were swapped)."""

    damage: Damage
    files: tuple[Path, ...]


def partners(path: Path, files: Sequence[Path]) -> list[Path]:
    """Files of the same kind with another content (the same name, or another shard or table); those
    of the same size where there are some."""
    content = path.read_bytes()
    kind = [p for p in files if p != path and _kind(p) == _kind(path) and p.read_bytes() != content]
    alike = [p for p in kind if p.stat().st_size == len(content)]
    return alike or kind


def _kind(path: Path) -> str:
    return path.suffix if path.suffix in (".safetensors", ".parquet") else path.name


def damages_of(path: Path, files: Sequence[Path]) -> list[Damage]:
    """What can be done to a file so that it is another one."""
    found = [Damage.FLIP, Damage.CUT, Damage.DELETED]
    if any(path.read_bytes()[:PAGE]):
        found.append(Damage.ZEROS)
    if partners(path, files):
        found.append(Damage.SWAPPED)
    return found


def break_file(path: Path, damage: Damage, files: Sequence[Path], draw: random.Random) -> Broken:
    """Damage a file; `files` are those it may be swapped with."""
    if damage is Damage.DELETED:
        path.unlink()
    elif damage is Damage.SWAPPED:
        other = draw.choice(partners(path, files))
        _swap(path, other)
        return Broken(damage, (path, other))
    else:
        data = path.read_bytes()
        path.write_bytes(
            {Damage.FLIP: _flip, Damage.ZEROS: _zero, Damage.CUT: _cut}[damage](data, draw)
        )
        assert path.read_bytes() != data
    return Broken(damage, (path,))


def _swap(first: Path, second: Path) -> None:
    aside = first.with_name(f".{first.name}.aside")
    os.rename(first, aside)
    os.rename(second, first)
    os.rename(aside, second)


def _flip(data: bytes, draw: random.Random) -> bytes:
    place, changed = draw.randrange(len(data)), bytearray(data)
    changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _zero(data: bytes, draw: random.Random) -> bytes:
    """A page that held something; of a small file the first half."""
    size = PAGE if len(data) > PAGE else (len(data) + 1) // 2
    starts = [n for n in range(0, len(data), size) if any(data[n : n + size])]
    start = draw.choice(starts) if len(data) > PAGE else 0
    size = min(size, len(data) - start)
    return data[:start] + bytes(size) + data[start + size :]


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]
