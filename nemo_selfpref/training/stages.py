"""A run's stages: their folders in order, what is done already, and the closing table's rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_selfpref.megatron.parallel import barrier
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.training.signals import StopSignals
from nemo_selfpref.training.store import (
    DROPPED,
    RunFolder,
    done_facts,
    mark_done,
    write_dropped,
)
from nemo_selfpref.types import DropReport


class Stages:
    """Bookkeeping of one run; every rank holds the same, the first one writes."""

    def __init__(
        self, folder: RunFolder, console: Console, policy: Policy, signals: StopSignals
    ) -> None:
        self.folder, self.console, self.signals = folder, console, signals
        self.is_main, self._device = policy.layout.is_main, policy.platform.device()
        self.summary: list[dict[str, Any]] = []
        self._notes = 0

    def next(self, name: str) -> Path:
        """Folder of the stage that begins."""
        return self.folder.stage(name)

    def skip(self, name: str, stage: Path) -> None:
        """List a finished stage as it was."""
        self.summary.append(done_facts(stage))
        self.console.skipped(name)

    def finish(self, stage: Path, facts: dict[str, Any], listed: bool = True) -> None:
        """Mark a stage done, once every rank has come here. Collective.

        Raises:
            RunStopped: a rank was asked to stop meanwhile.
        """
        barrier()
        if self.is_main:
            mark_done(stage, facts)
        barrier()
        if listed:
            self.summary.append(facts)
        self.signals.check(self._device, f"all stages up to {stage.name} are done")

    def note(self, stage: str, report: DropReport) -> None:
        """List rows kept and dropped."""
        self._notes += 1
        if self.is_main:
            name = re.sub(r"[^a-z0-9]+", "-", stage.lower())
            path = self.folder.path / DROPPED / f"{self._notes:02d}-{name}.jsonl"
            write_dropped(path, {stage: report})
        counted = {"kept": report.kept, "dropped": dict(report.dropped)}
        self.summary.append({"stage": stage, **counted, "examples": dict(report.examples)})
        self.console.rows(stage, report)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Facts about the stage listed last."""
        assert self.summary, "metrics are logged about a stage that is listed"
        self.summary[-1] = {**self.summary[-1], "metrics": dict(metrics)}
