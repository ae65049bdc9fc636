"""Saving a part of what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nemo_selfpref.checkpoint.saver import save_now
from nemo_selfpref.checkpoint.snapshot import Snapshot


def save_into(folder: Path, save: Callable[[Snapshot], None]) -> None:
    """What `save` adds to a snapshot, as a folder."""
    snapshot = Snapshot()
    save(snapshot)
    save_now(folder, snapshot, torch.device("cpu"))


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """A sharded state dict, as a folder that a ShardReader reads."""
    save_into(folder, lambda snapshot: snapshot.add_state(".", state))
