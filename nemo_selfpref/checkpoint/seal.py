"""Sums of every file of a folder, kept beside them: a changed, lost or added file is found by name.

manifest.json   {"sha256": {name: sum}, "bytes": {name: size}, "seal": SHA-256 over both}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import read_json, sha256_of, write_json

SEAL = "manifest.json"
_THREADS = 4
"""Files hashed at one time: the sums outrun one disk, and the trainer needs its cores."""

FileSum = tuple[str, int]
"""SHA-256 and size in bytes."""


def sum_of(path: Path) -> FileSum:
    return sha256_of(path), path.stat().st_size


def seal(folder: Path, known: Mapping[str, FileSum] | None = None) -> None:
    """Write the sums of all files below `folder`; those of `known` are not computed again."""
    known = known or {}
    sums = {name: known.get(name) or sum_of(folder / name) for name in _files(folder)}
    body = {
        "sha256": {name: digest for name, (digest, _) in sums.items()},
        "bytes": {name: size for name, (_, size) in sums.items()},
    }
    write_json(folder / SEAL, {**body, "seal": _digest(body)})


def is_sealed(folder: Path) -> bool:
    return (folder / SEAL).is_file()


def read_seal(folder: Path) -> dict[str, FileSum]:
    """The sums of a folder's files by name.

    Raises:
        CheckpointError: there is none, or it is not what was written.
    """
    found = read_json(folder / SEAL)
    try:
        body = {"sha256": found["sha256"], "bytes": found["bytes"]}
        genuine = found["seal"] == _digest(body)
        sums = {name: (body["sha256"][name], int(size)) for name, size in body["bytes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / SEAL} is damaged: {error!r}") from error
    if not genuine:
        raise CheckpointError(f"{folder / SEAL} is damaged: its own sum differs")
    return sums


def check_file(folder: Path, name: str, sums: Mapping[str, FileSum]) -> None:
    """Raise CheckpointError unless the file is what was sealed under this name."""
    problem = _problem(folder, name, sums.get(name))
    if problem:
        raise CheckpointError(f"{problem}. Use another checkpoint.")


def problems(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a sealed folder, a line for each file; empty when it is whole.

    Args:
        part, parts: read only every `parts`-th file, from number `part`.
    """
    try:
        sums = read_seal(folder)
    except CheckpointError as error:
        return [str(error)] if part == 0 else []
    names = sorted({*sums, *_files(folder)})[part::parts]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _problem(folder, name, sums.get(name)), names)
        return [problem for problem in found if problem]


def _problem(folder: Path, name: str, expected: FileSum | None) -> str | None:
    path = folder / name
    if expected is None:
        return f"{path} does not belong there: the manifest does not know it"
    digest, size = expected
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path} is damaged: {found} bytes, the manifest says {size}"
        got = sha256_of(path)
    except FileNotFoundError:
        return f"{path} is missing: the folder is incomplete"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    if got != digest:
        return f"{path} is damaged: SHA-256 {got[:12]}..., the manifest says {digest[:12]}..."
    return None


def _files(folder: Path) -> Iterator[str]:
    """Names of the files below, as in a URL. What begins with a dot is the file system's."""
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(where, name).relative_to(folder).as_posix()
            if not name.startswith(".") and path != SEAL:
                yield path


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
