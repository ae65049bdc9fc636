"""A past step done again: a run of its own in a temporary folder, over the recorded one's stages.

Finished stages and the checkpoint are links to the recorded run's files, which are only read. The
stage goes on from that checkpoint as after an interruption, and ends after the step wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from nemo_selfpref.algorithms.base import PairMaker, TrainSettings
from nemo_selfpref.checkpoint.folders import CHECKPOINTS, checkpoints_of, step_of
from nemo_selfpref.config.loader import to_typed
from nemo_selfpref.data.batching import StepPlan
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.megatron.parallel import all_gather_json, barrier, world_group
from nemo_selfpref.models.nemo_adapter import quiet
from nemo_selfpref.models.stage import Step, StepsAround, StepSource
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.objectives.objective import Objective
from nemo_selfpref.training.making import Made, PairSource, UnderWay
from nemo_selfpref.training.run import Run
from nemo_selfpref.training.run_files import RunFiles, StageFiles
from nemo_selfpref.training.session import build_policy, find_start
from nemo_selfpref.training.signals import StopSignals
from nemo_selfpref.training.store import RunFolder
from nemo_selfpref.training.train import pick_algorithm
from nemo_selfpref.training.trainer import StageTrainer
from nemo_selfpref.types import Demonstration, TrainingRow


def checkpoint_before(stage: Path, step: int) -> Path | None:
    """The newest checkpoint of a stage from which step `step`, counted from 1, can be done."""
    return max((p for p in checkpoints_of(stage) if step_of(p) < step), key=step_of, default=None)


def begun_before(stage: Path, step: int) -> int:
    """How many steps lie in that checkpoint; 0 where there is none."""
    checkpoint = checkpoint_before(stage, step)
    return 0 if checkpoint is None else step_of(checkpoint)


@dataclass
class Goal:
    """Which step of which stage is wanted, and what is to be found out about it.

    recorded: take the pairs of an online stage from its records; reference: take the log-probs
    scored once from theirs.
    """

    run: RunFiles
    stage: StageFiles
    step: int
    recorded: bool
    reference: bool = False
    begun: int = 0
    """Steps that lie in the checkpoint."""
    steps: list[dict[str, float]] = field(default_factory=list)
    """The metrics of each step done again."""
    rows: list[TrainingRow] = field(default_factory=list)
    """The rows of the step wanted."""


class Reached(Exception):
    """The step wanted has been made; nothing after it is of interest."""


class _Witness(Console):
    """Notes the metrics of every step, and ends the fit after the last one wanted."""

    def __init__(self, goal: Goal, enabled: bool) -> None:
        super().__init__(enabled=enabled)
        self.goal, self.watching = goal, False

    def metrics(self, stage: str, num_steps: int, metrics: Mapping[str, float]) -> None:
        super().metrics(stage, num_steps, metrics)
        if not self.watching:
            return
        self.goal.steps.append(dict(metrics))
        if int(metrics["step"]) == self.goal.step:
            raise Reached


class _Watched(StepsAround):
    """The stage's own steps; keeps the rows of the one wanted."""

    def __init__(self, steps: StepSource, goal: Goal) -> None:
        super().__init__(steps)
        self.goal = goal

    def step(self, number: int) -> Step:
        step = self.steps.step(number)
        if number + 1 == self.goal.step:
            self.goal.rows = list(step.rows)
        return step


class _Recorded:
    """A PairSource that reads what each step trained on; nothing is sampled."""

    def __init__(self, stage: StageFiles) -> None:
        self.stage = stage

    def take(self, number: int) -> Made:
        return Made(self.stage.pairs_of(number + 1), number, 0, 0, {}, {})

    def settle(self) -> None:
        pass

    def under_way(self, done: int) -> UnderWay:
        return UnderWay([])

    def restore(self, made: Sequence[Mapping[str, Any]]) -> None:
        """Steps made ahead are on record too."""

    def close(self) -> None:
        pass


class _Trainer(StageTrainer):
    """A run's trainer that watches the stage wanted."""

    def __init__(self, trainer: StageTrainer, goal: Goal, witness: _Witness) -> None:
        self.__dict__.update(trainer.__dict__)  # the same model, places and stages
        self._goal, self._witness = goal, witness

    def _source(
        self, scope: str, rows: Sequence[Demonstration], maker: PairMaker, plan: StepPlan
    ) -> PairSource:
        if self._goal.recorded:
            return _Recorded(self._goal.stage)
        return super()._source(scope, rows, maker, plan)

    def _fit(
        self,
        name: str,
        stage: Path,
        steps: StepSource,
        objective: Objective,
        settings: TrainSettings,
    ) -> dict[str, Any]:
        wanted = self._goal.stage.folder.name
        if stage.name != wanted:
            raise ConfigError(
                f"the run's next stage is {stage.name}, recorded was {wanted}: its method goes "
                "other ways than when it was recorded. Use the version that made the run."
            )
        self._witness.watching = True
        return super()._fit(name, stage, _Watched(steps, self._goal), objective, settings)


class _Run(Run):
    def watch(self, goal: Goal, witness: _Witness) -> None:
        self._trainer = _Trainer(self._trainer, goal, witness)


def do_again(cfg: DictConfig, goal: Goal, scratch: Path, show: bool) -> bool:
    """Do the steps up to the one wanted, filling `goal`; whether this is the first rank.

    Args:
        scratch: an existing folder, the same for all ranks, for everything that is written.
        show: let the first rank tell what it does.

    Raises:
        ConfigError: the recorded run does not lead to that step.
    """
    quiet()
    typed = to_typed(cfg)
    start = find_start(typed)
    policy, layout = build_policy(typed, start)
    witness = _Witness(goal, show and layout.is_main)
    name = str(scratch / "run")
    if layout.is_main:
        _link(goal, Path(name))
    barrier()
    algorithm = pick_algorithm(typed)
    # Signals that nothing takes: there is nothing to save, so a request to stop just ends it.
    asked, signals = algorithm.asked_weights(), StopSignals()
    run = _Run(cfg, policy, start, RunFolder(Path(name)), witness, signals, asked)
    run.watch(goal, witness)
    try:
        run.open()
        algorithm.run(run)
    except Reached:
        all_gather_json(
            True, world_group(), policy.platform.device()
        )  # all have read what they need
        return layout.is_main
    finally:
        run.close()
    raise ConfigError(f"the run ended before step {goal.step} of {goal.stage.folder.name}")


def _link(goal: Goal, target: Path) -> None:
    """A run's folder in which everything before the step wanted is done."""
    for stage in goal.run.stages:
        if stage.folder == goal.stage.folder:
            break
        _link_children(stage.folder, target / "stages" / stage.folder.name)
    own = target / "stages" / goal.stage.folder.name
    own.mkdir(parents=True)
    reference = goal.stage.folder / "reference.safetensors"
    if goal.reference and reference.is_file():
        (own / reference.name).symlink_to(reference.resolve())
    checkpoint = checkpoint_before(goal.stage.folder, goal.step)
    if checkpoint is not None:
        (own / CHECKPOINTS).mkdir()
        (own / CHECKPOINTS / checkpoint.name).symlink_to(checkpoint.resolve())


def _link_children(folder: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in folder.iterdir():
        (target / path.name).symlink_to(path.resolve())
