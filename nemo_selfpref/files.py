"""Writing that survives a crash: a file or folder appears whole or not at all."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_selfpref.errors import CheckpointError

_HERE, _RENAME_EXCHANGE = -100, 2
"""Linux's AT_FDCWD and the flag of renameat2."""


def fsync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically with JSON."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, the whole of it or, where that fails, nothing.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as handle:
        size = handle.tell()
        data = f"{line}\n".encode()
        try:
            while data:
                data = data[handle.write(data) :]
        except OSError:
            handle.truncate(size)
            raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A failure to write `path` inside the block is an OSError that names it: a write's own does
    not, and safetensors and tokenizers have errors of their own.

    Raises:
        OSError: as said.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except Exception as error:  # tokenizers raises nothing more special
        raise OSError(f"{path}: {error}") from error


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        CheckpointError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the folder is incomplete") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def new_folder(target: Path, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary folder beside `target` that takes its name when the block succeeds.

    An existing target is replaced only then; a failure leaves it as it was. What need not outlive
    the machine's next start (durable=False) is not flushed to the disk.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    publish_folder(temporary, target, durable)


def publish_folder(temporary: Path, target: Path, durable: bool = True) -> None:
    """Flush everything below `temporary` and give it the name `target`."""
    for path in sorted(temporary.rglob("*")) if durable else ():
        fsync_path(path)
    if durable:
        fsync_path(temporary)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists() and _exchange(temporary, target):
        os.rename(temporary, old)
    else:
        if target.exists():
            os.rename(target, old)
        os.rename(temporary, target)
    if durable:
        fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names at once, so that at no moment one of them is free; False where the system or
    the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return rename(_HERE, bytes(first), _HERE, bytes(second), _RENAME_EXCHANGE) == 0


def remove_folder(folder: Path) -> None:
    """Delete a folder so that at no time a part of it has its name."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
