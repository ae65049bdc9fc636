"""What a checkpoint holds, taken at one moment and written while training goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch.distributed as dist

from nemo_selfpref.checkpoint.seal import FileSum, sum_of
from nemo_selfpref.checkpoint.sharded import COMMON, ShardWriter, collect, encode, write_index
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import fsync_path, naming

Write = Callable[[Path], None]


class Snapshot:
    """One rank's part of a checkpoint. Taking it copies tensors into the CPU's memory; nothing in
    it changes afterwards. Every rank adds the same states; of the rest the first rank's count."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self._shards: dict[str, ShardWriter] = {}
        self._files: dict[str, Write] = {}

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def add_state(self, name: str, state: dict[str, Any]) -> None:
        """A sharded state dict, as the folder `name` ("." for the whole). Collective; `state` is
        consumed."""
        self._shards[name], common = collect(state, self.rank)
        self.add_json((PurePosixPath(name) / COMMON).as_posix(), encode(common))

    def add_json(self, name: str, value: Any) -> None:
        if self.is_main:
            text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
            self._files[name] = lambda path: _write_text(path, text)

    def add_file(self, name: str, write: Write) -> None:
        """A file, or a folder of them, that `write` makes at the path it is given, later: of what
        does not change."""
        if self.is_main:
            self._files[name] = write

    def write(self, folder: Path) -> dict[str, Any]:
        """Write this rank's part, flushed to the disk; returns what `join` needs of it, as JSON.

        Raises:
            CheckpointError: a tensor is not finite: such a state must not replace a good one.
            OSError: it cannot be written.
        """
        share: dict[str, Any] = {"entries": {}, "sums": {}}
        for name, shards in self._shards.items():
            wrong = shards.nonfinite()
            if wrong:
                raise CheckpointError(f"{name} holds values that are not finite: {wrong[:3]}")
            with naming(folder / name / shards.file):
                file = shards.write(folder / name)
            share["entries"][name] = shards.entries
            if file is not None:
                share["sums"] |= _flushed(folder, file)
        for name, write in self._files.items():
            path = folder / name
            with naming(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    share["sums"] |= _flushed(folder, file)
        return share


def join(folder: Path, shares: list[dict[str, Any]]) -> dict[str, FileSum]:
    """Write the indexes of all ranks' parts; returns the sums of what the ranks wrote."""
    sums: dict[str, FileSum] = {
        name: (found[0], found[1]) for share in shares for name, found in share["sums"].items()
    }
    for name in shares[0]["entries"]:
        entries = [entry for share in shares for entry in share["entries"][name]]
        inside = PurePosixPath(name)
        files = sorted({entry["file"] for entry in entries})
        found = {file: sums[(inside / file).as_posix()][0] for file in files}
        write_index(folder / name, entries, found)
    return sums


def _flushed(folder: Path, path: Path) -> dict[str, FileSum]:
    fsync_path(path)
    return {path.relative_to(folder).as_posix(): sum_of(path)}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
