"""A long stage's results, kept part by part: an interruption loses at most the part under way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from nemo_selfpref.checkpoint.seal import sum_of
from nemo_selfpref.errors import CheckpointError, RolloutCancelled
from nemo_selfpref.files import read_json, write_json
from nemo_selfpref.megatron.parallel import all_gather_json, barrier, world_group
from nemo_selfpref.training.signals import StopSignals

T = TypeVar("T")


Files = tuple[Callable[[Path, Sequence[T]], None], Callable[[Path], list[T]]]
"""How results are written and read back."""


class Parts:
    """STAGE/parts/000000-004096.parquet, with the sum of each beside it. Every rank calls every
    method in step; the first writes.

    Args:
        size: results in a part; a stage with no more of them keeps no parts.
    """

    def __init__(self, stage: Path, size: int, device: torch.device, signals: StopSignals) -> None:
        self._folder, self._size = stage / "parts", size
        self._name, self._device, self._signals = stage.name, device, signals

    def stop(self) -> bool:
        """Whether this rank was asked to stop, for whoever makes a part."""
        return self._signals.received is not None

    def collect(
        self,
        count: int,
        make: Callable[[slice], list[T]],
        files: Files[T],
        progress: Callable[[int, int], None],
    ) -> list[T]:
        """The results of all parts: read where they were kept, else made and kept.

        Raises:
            RunStopped: a rank was asked to stop.
        """
        found: list[T] = []
        while len(found) < count:
            part = slice(len(found), min(len(found) + self._size, count))
            if part.start:
                self._signals.check(self._device, self._saved(part.start))
            try:
                found += self._part(part, count, make, files, progress)
            except RolloutCancelled:
                self._signals.check(self._device, self._saved(part.start))
                raise
        return found

    def _part(
        self,
        part: slice,
        count: int,
        make: Callable[[slice], list[T]],
        files: Files[T],
        progress: Callable[[int, int], None],
    ) -> list[T]:
        path = self._folder / f"{part.start:06d}-{part.stop:06d}.parquet"
        write, read = files
        if self._kept(path):
            progress(part.stop - part.start, 0)
            return read(path)
        found = make(part)
        if count > self._size and self._is_main:
            write(path, found)
            write_json(path.with_suffix(".json"), list(sum_of(path)))
        return found

    def _saved(self, number: int) -> str:
        return f"{number} results of {self._name} are kept"

    def clear(self) -> None:
        """Forget the parts, once the whole is kept."""
        barrier()
        if self._is_main:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _kept(self, path: Path) -> bool:
        mine = self._is_main and _is_whole(path)
        return bool(all_gather_json(mine, world_group(), self._device)[0])

    @property
    def _is_main(self) -> bool:
        return world_group().rank() == 0


def _is_whole(path: Path) -> bool:
    """Whether a part is what was written; one that is not is made anew."""
    try:
        return read_json(path.with_suffix(".json")) == list(sum_of(path))
    except (CheckpointError, OSError):
        return False
