"""Checkpoints on their way to the disk: whole or not at all, on every rank the same."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_selfpref.checkpoint.seal import problems, seal
from nemo_selfpref.checkpoint.snapshot import Snapshot, join
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import publish_folder
from nemo_selfpref.megatron.parallel import all_gather_json, world_group


def save_now(target: Path, snapshot: Snapshot, device: torch.device) -> None:
    """Write a snapshot as the folder `target`. Collective.

    Raises:
        CheckpointError: a rank could not write its part; what was there before still is.
    """
    writing = _Writing(target, snapshot, device)
    error = writing.start(None) or writing.end()
    if error:
        raise CheckpointError(f"{target} could not be written: {error}")


def problems_together(folder: Path, device: torch.device) -> list[str]:
    """seal.problems, each file read by one of the ranks. Collective; equal on every rank."""
    group = world_group()
    mine = problems(folder, group.rank(), group.size())
    return [line for share in all_gather_json(mine, group, device) for line in share]


class _Writing:
    """One folder on its way. Every rank calls every method; each returns the same on all."""

    def __init__(self, target: Path, snapshot: Snapshot, device: torch.device) -> None:
        self.target, self._snapshot, self._device = target, snapshot, device
        self._temporary = target.with_name(f".{target.name}.tmp")
        self._share: Future[dict[str, Any]] = Future()

    @property
    def done(self) -> bool:
        """Whether this rank's part is written."""
        return self._share.done()

    def start(self, pool: ThreadPoolExecutor | None) -> str | None:
        """Begin to write, in a thread of `pool` or at once; what went wrong, if something did."""
        error = self._all(_tried(self._make) if self._snapshot.is_main else None)
        if error is None and pool is not None:
            self._share = pool.submit(self._write)
        elif error is None:
            self._share.set_result(self._write())
        return error

    def end(self) -> str | None:
        """Wait for every rank's part and give the folder its name; what went wrong, if something
        did, and then nothing is left of it."""
        shares = self._gather(self._share.result())
        error = next((share["error"] for share in shares if "error" in share), None)
        if error is None:
            mine = _tried(lambda: self._publish(shares)) if self._snapshot.is_main else None
            error = self._all(mine)
        if error is not None and self._snapshot.is_main:
            shutil.rmtree(self._temporary, ignore_errors=True)
        return error

    def _make(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)

    def _write(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        error = _tried(lambda: found.update(self._snapshot.write(self._temporary)))
        return found if error is None else {"error": f"rank {self._snapshot.rank}: {error}"}

    def _publish(self, shares: list[dict[str, Any]]) -> None:
        seal(self._temporary, join(self._temporary, shares))
        publish_folder(self._temporary, self.target)

    def _gather(self, value: Any) -> list[Any]:
        return all_gather_json(value, world_group(), self._device)

    def _all(self, error: str | None) -> str | None:
        return next((found for found in self._gather(error) if found), None)


def _tried(act: Callable[[], None]) -> str | None:
    """Why it failed, where it did. Whatever it was: the other ranks wait to be told, and what
    writes files below raises errors of its own (safetensors, tokenizers) on a full disk."""
    try:
        act()
    except (OSError, CheckpointError) as error:
        return f"{error} (on {socket.gethostname()})"
    except Exception as error:
        return f"{type(error).__name__}: {error} (on {socket.gethostname()})"
    return None


@dataclass(frozen=True)
class SavePolicy:
    """How checkpoints are saved. `background`: while training goes on; `failures_allowed`: saves
    in a row that may fail before the run stops."""

    background: bool = True
    failures_allowed: int = 0


class Saver:
    """Saves a stage's checkpoints one after another. Every rank calls every method in step.

    Args:
        published: called on the first rank when a folder has its name.
        say: tells people of a save that failed.
    """

    def __init__(
        self,
        device: torch.device,
        policy: SavePolicy,
        say: Callable[[str], None],
        published: Callable[[Path], None] = lambda _: None,
    ) -> None:
        self._device, self._policy, self._say, self._published = device, policy, say, published
        self._pool = ThreadPoolExecutor(1, "checkpoint") if policy.background else None
        self._writing: _Writing | None = None
        self._failed = 0
        self._last: Path | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._writing is not None and not self._writing.done

    @property
    def waiting(self) -> bool:
        """Whether a save was begun and not finished."""
        return self._writing is not None

    def begin(self, target: Path, snapshot: Snapshot) -> None:
        """Save a snapshot; the save before is finished first.

        Raises:
            CheckpointError: more saves in a row have failed than are allowed.
        """
        self.finish()
        writing = _Writing(target, snapshot, self._device)
        error = writing.start(self._pool)
        if error is not None:
            self._note(writing, error)
            return
        self._writing = writing
        if self._pool is None:
            self.finish()

    def finish(self) -> bool:
        """Wait for the save that was begun; whether all that were begun so far are on disk.

        Raises:
            CheckpointError: as begin.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._note(writing, writing.end())
        return self._failed == 0

    def _note(self, writing: _Writing, error: str | None) -> None:
        target = writing.target
        if error is None:
            self._failed, self._last = 0, target
            if world_group().rank() == 0 and (late := _tried(lambda: self._published(target))):
                self._say(f"{target} is saved, but what lies beside it is not in order: {late}")
            return
        self._failed += 1
        kept = f"the newest whole one is {self._last}" if self._last else "none was saved before it"
        text = f"checkpoint {target} could not be written: {error}; {kept}"
        if self._failed > self._policy.failures_allowed:
            raise CheckpointError(f"{text}. Free some space or mend the disk, and run it again.")
        self._say(f"{text}. Training goes on.")

    def close(self) -> None:
        """End the thread; a save that was not finished is left without a name."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self._writing = None
