"""What a checkpoint costs the steps it is written beside, against torch.save of the same state."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Spread
from steps_kit import Bench, Facts, Part, Ratio, Stage, Trainee, counted, interleave, ratio, raw

from nemo_selfpref.checkpoint.saver import SavePolicy, Saver
from nemo_selfpref.checkpoint.training_state import take_training
from nemo_selfpref.files import fsync_path
from nemo_selfpref.objectives.objective import DPOObjective

_LIGHTNING = {
    "epoch": 0,
    "global_step": 1,
    "pytorch-lightning_version": "2",
    "loops": {},
    "lr_schedulers": [],
}
_COLUMNS = ("variant", "a step, s", "range", "saving step stands still, ms", "MiB")


class _Round:
    """A round of steps with one save, after the first of them."""

    def __init__(self, bench: Bench, save: Callable[[_Round], None] | None, background: bool):
        self.trainee = Trainee(bench)
        self.folder = bench.args.scratch / f"{id(self)}"
        self.stage = Stage(self.trainee, bench.rows, DPOObjective(0.1))
        self.saver = Saver(torch.device("cpu"), SavePolicy(background), print)
        self._save, self._after = save, self.stage.steps.after_step
        self.stage.steps.after_step = self._after_step  # type: ignore[method-assign]
        self._stood = 0.0

    @property
    def target(self) -> Path:
        return self.folder / "step-000001"

    def _after_step(self, done: int) -> None:
        self._after(done)
        if done == 1 and self._save is not None:
            started = time.perf_counter()
            self._save(self)
            self._stood = time.perf_counter() - started

    def run(self) -> Facts:
        shutil.rmtree(self.folder, ignore_errors=True)
        facts = self.stage.run()
        self.saver.finish()  # a later round must not pay for it
        files = self.folder.rglob("*") if self.folder.exists() else ()
        size = sum(path.stat().st_size for path in files if path.is_file())
        return {**facts, "stood": self._stood, "bytes": size}


def _ours(this: _Round) -> None:
    trainee = this.trainee
    snapshot = take_training(trainee.policy, trainee.optimizer, _LIGHTNING)
    this.saver.begin(this.target, snapshot)


def _torch(this: _Round) -> None:
    """The same numbers by torch.save, flushed; no sums, nothing renamed."""
    policy, optimizer = this.trainee.policy, this.trainee.optimizer
    state: dict[str, Any] = {
        "weights": policy.module.state_dict(),
        "optimizer": optimizer.inner.state_dict(),
    }
    this.folder.mkdir(parents=True)
    torch.save(state, this.target)
    fsync_path(this.target)


def saving(bench: Bench) -> Part:
    """One checkpoint in a round of steps: in the background, at once, by torch.save, and none."""
    rounds = {
        "no checkpoint": _Round(bench, None, False),
        "in the background": _Round(bench, _ours, True),
        "at once": _Round(bench, _ours, False),
        "torch.save": _Round(bench, _torch, False),
    }
    found = interleave({name: this.run for name, this in rounds.items()}, bench.args.runs)
    steps = rounds["no checkpoint"].stage.steps.num_steps
    rows = []
    for name in rounds:
        seconds = Spread.of([m.seconds / steps for m in counted(found[name])])
        stood = Spread.of([1000 * m.facts["stood"] for m in counted(found[name])])
        size = counted(found[name])[-1].facts["bytes"] / 2**20
        rows.append(
            [name, seconds.median, f"{seconds.min:.2f}-{seconds.max:.2f}", stood.median, size]
        )
    stood_ratio = [
        ours.facts["stood"] / theirs.facts["stood"]
        for ours, theirs in zip(
            counted(found["in the background"]), counted(found["torch.save"]), strict=True
        )
    ]
    parameters = sum(p.numel() for p in rounds["at once"].trainee.policy.module.parameters())
    size = counted(found["at once"])[-1].facts["bytes"]
    plain = found["no checkpoint"]
    return Part(
        f"Checkpoints: DPO in steps of {bench.args.global_batch} pairs, one save in {steps} steps",
        _COLUMNS,
        rows,
        [
            ratio("in the background / no checkpoint, round", found["in the background"], plain),
            ratio("at once / no checkpoint, round", found["at once"], plain),
            ratio("torch.save / no checkpoint, round", found["torch.save"], plain),
            Ratio("the step stands still: background / torch.save", Spread.of(stood_ratio)),
        ],
        [
            f"{size / parameters:.2f} bytes a parameter (float32 weights and both moments of Adam; "
            f"{parameters:,} parameters), every file flushed and with its SHA-256.",
            f"{os.cpu_count()} cores: the thread that writes takes one of those that train.",
        ],
        raw(found),
    )
