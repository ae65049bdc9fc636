"""What one fit trains on: steps that name their rows and log-probs, a loss, and how to step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from nemo_selfpref.checkpoint.snapshot import Snapshot
from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.models.nonfinite import NonFiniteSteps
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import Objective
from nemo_selfpref.types import TrainingRow


@dataclass(frozen=True)
class Step:
    """One global batch; `metrics` are of its making and join those of the loss."""

    rows: Sequence[TrainingRow]
    inputs: StepInputs
    metrics: Mapping[str, float] = field(default_factory=dict)


class StepSource(Protocol):
    """Steps of a stage, made one at a time. Every rank makes every step, in order."""

    @property
    def num_steps(self) -> int: ...

    def begin(self) -> None:
        """Called before the first step of a stage that starts anew."""
        ...

    def step(self, number: int) -> Step:
        """Step `number`, from 0."""
        ...

    def after_step(self, done: int) -> None:
        """Called when `done` optimizer steps have been made."""
        ...

    def skipped(self, done: int) -> None:
        """Called instead where the last of them was left out: nothing has moved."""
        ...

    def save(self, snapshot: Snapshot) -> None:
        """Add what the next step depends on besides weights and optimizer. Collective."""
        ...

    def load(self, folder: Path) -> None:
        """Read back what save added. Collective."""
        ...


class StepsAround:
    """A StepSource that passes on to another; base of those that watch or change a part of it."""

    def __init__(self, steps: StepSource) -> None:
        self.steps = steps

    @property
    def num_steps(self) -> int:
        return self.steps.num_steps

    def begin(self) -> None:
        self.steps.begin()

    def step(self, number: int) -> Step:
        return self.steps.step(number)

    def after_step(self, done: int) -> None:
        self.steps.after_step(done)

    def skipped(self, done: int) -> None:
        self.steps.skipped(done)

    def save(self, snapshot: Snapshot) -> None:
        self.steps.save(snapshot)

    def load(self, folder: Path) -> None:
        self.steps.load(folder)


@dataclass(frozen=True)
class TrainingStage:
    """One fit."""

    name: str
    steps: StepSource
    objective: Objective
    optim: OptimConfig
    gradient_clip_val: float
    micro_batch_size: int
    nonfinite: NonFiniteSteps = field(default_factory=NonFiniteSteps)


class StepNumbers:
    """The data loader of a stage: the numbers of its steps; `start` skips what was done already."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.start = num_steps, 0

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.num_steps))
