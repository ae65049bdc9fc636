"""One training stage under a Lightning Trainer, with NeMo's experiment manager."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf

from nemo_selfpref.checkpoint.folders import is_checkpoint, step_of
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.errors import CheckpointError, RolloutError
from nemo_selfpref.files import append_line, write_text
from nemo_selfpref.megatron.parallel import any_of
from nemo_selfpref.models.nemo_adapter import exp_manager
from nemo_selfpref.models.preference_model import MegatronGPTPreferenceModel
from nemo_selfpref.models.stage import TrainingStage
from nemo_selfpref.models.strategy import MegatronStrategy
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.monitor.heartbeat import mark
from nemo_selfpref.training.checkpoints import StageCheckpoints
from nemo_selfpref.training.signals import StopSignals, stopped

METRICS = "metrics.jsonl"
_OF_STAGE = (
    "judge/",
    "replay/",
    "rollout/",
    "strength",
    "marginal",
    "augmented/",
    "reference_cache/",
)
"""Metrics whose means over the stage are in the closing table."""


def fit_stage(
    model: MegatronGPTPreferenceModel,
    stage: TrainingStage,
    cfg: RunConfig,
    folder: Path,
    console: Console,
    signals: StopSignals,
) -> dict[str, Any]:
    """Train to the end of the stage, continuing from its newest whole checkpoint if there is one.

    Returns the last step's metrics, and of the whole stage `tokens` and mean `metrics` of the
    rollouts.

    Raises:
        RunStopped: a signal asked for it; the step just made is saved.
        CheckpointError: checkpoints cannot be written, or a damaged one may not be passed over.
    """
    model.begin_stage(stage)
    assert model.numbers is not None
    params = cfg.exp_manager.checkpoint_callback_params
    checkpoints = StageCheckpoints(folder, params, model.policy.platform.device(), console.say)
    newest = checkpoints.newest()
    if newest is None:
        stage.steps.begin()
    else:
        model.numbers.start = step_of(newest)
    if model.policy.layout.is_main:
        _forget_steps_after(folder / METRICS, model.numbers.start)
    recorder = _Recorder(folder, cfg, model, console, stage, checkpoints, signals)
    trainer = _trainer(model, stage, cfg, folder, recorder)
    model.set_trainer(trainer)
    try:
        trainer.fit(model, ckpt_path=str(newest) if newest else None)
    finally:
        checkpoints.saver.close()
    return recorder.result()


def _forget_steps_after(path: Path, step: int) -> None:
    """Drop recorded steps that are about to be done again, and a line cut short."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    write_text(path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))


def _trainer(
    model: MegatronGPTPreferenceModel,
    stage: TrainingStage,
    cfg: RunConfig,
    folder: Path,
    recorder: _Recorder,
) -> pl.Trainer:
    policy = model.policy
    trainer = pl.Trainer(
        strategy=MegatronStrategy(policy.platform, recorder.checkpoints.saver),
        accelerator="gpu" if policy.platform.cuda else "cpu",
        devices=cfg.trainer.devices,
        num_nodes=cfg.trainer.num_nodes,
        max_epochs=1,
        max_steps=stage.steps.num_steps,
        log_every_n_steps=cfg.trainer.log_every_n_steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        logger=False,
        callbacks=[recorder],
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    settings = {
        "explicit_log_dir": str(folder / "logs"),
        "create_tensorboard_logger": cfg.exp_manager.create_tensorboard_logger,
        "create_checkpoint_callback": False,
        "log_step_timing": False,
        "resume_if_exists": False,
        "seconds_to_sleep": 0,
    }
    exp_manager(trainer, OmegaConf.create(settings))
    return trainer


class _Recorder(pl.Callback):
    """Progress, metrics.jsonl and checkpoints within a stage; the end of a run that is asked to."""

    def __init__(
        self,
        folder: Path,
        cfg: RunConfig,
        model: MegatronGPTPreferenceModel,
        console: Console,
        stage: TrainingStage,
        checkpoints: StageCheckpoints,
        signals: StopSignals,
    ) -> None:
        self.folder, self.params = folder, cfg.exp_manager.checkpoint_callback_params
        self.model, self.console, self.stage = model, console, stage
        self.checkpoints, self.signals = checkpoints, signals
        self.every = cfg.trainer.log_every_n_steps
        self._bar: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signals.install()  # Lightning has put handlers of its own there
        self._mark(trainer)
        self._context = self.console.progress(self.stage.name, self.stage.steps.num_steps, "steps")
        self._bar = self._context.__enter__()
        self._bar(trainer.global_step, 0)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        metrics = {"step": trainer.global_step, **self.model.last_metrics}
        self._bar(1, int(metrics["tokens"]), loss=metrics.get("loss"))
        if self.model.policy.layout.is_main:
            self._record(metrics)
        if metrics["step"] % self.every == 0 or metrics["step"] == self.stage.steps.num_steps:
            self.console.metrics(self.stage.name, self.stage.steps.num_steps, metrics)
        self._save(trainer)
        self._mark(trainer)

    def _record(self, metrics: dict[str, float]) -> None:
        path = self.folder / METRICS
        try:
            append_line(path, json.dumps(metrics))
        except OSError as error:  # a full disk: the saves say when it is too much
            step = int(metrics["step"])
            self.console.say(f"{path}: {error.strerror}; step {step} is left out of it")

    def _mark(self, trainer: pl.Trainer) -> None:
        mark(f"{self.stage.name}, step {trainer.global_step + 1}")

    def _save(self, trainer: pl.Trainer) -> None:
        mark("saving a checkpoint")
        saver, step = self.checkpoints.saver, trainer.global_step
        asked, busy = any_of([self.signals.received is not None, saver.busy], self._device)
        if saver.waiting and not busy:
            saver.finish()
        every = self.params.every_n_train_steps
        if asked or (every and step % every == 0):
            trainer.save_checkpoint(self.checkpoints.path(step))
        if asked:
            raise stopped(self._saved(step))

    def _saved(self, step: int) -> str:
        """Have the step just made on disk; tells where."""
        path = self.checkpoints.path(step)
        if not self.checkpoints.saver.finish():
            raise CheckpointError(f"stopped as asked, but {path} could not be written: see above")
        return f"everything up to step {step} of {self.stage.name} is in {path}"

    @property
    def _device(self) -> torch.device:
        return self.model.policy.platform.device()

    def on_train_end(self, *_: Any) -> None:
        self.checkpoints.saver.finish()
        self._context.__exit__(None, None, None)

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        if self._bar is not None:
            self._context.__exit__(None, None, None)
        # Every rank is told of it, between two steps: what was trained so far can be kept.
        if isinstance(exception, RolloutError) and trainer.global_step > 0:
            target = self.checkpoints.path(trainer.global_step)
            self.checkpoints.saver.finish()
            if not is_checkpoint(target):
                trainer.save_checkpoint(target)
            self.console.say(f"rollouts failed; {self._saved(trainer.global_step)}: run it again")

    def result(self) -> dict[str, Any]:
        """Last metrics; of the whole stage, steps before a resume too, the tokens and the means of
        what was measured on the rollouts."""
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        steps = [json.loads(line) for line in lines]
        measured = {n for step in steps for n in step if n.startswith(_OF_STAGE)}
        means = {n: fmean(s[n] for s in steps if n in s) for n in sorted(measured)}
        tokens = sum(step["tokens"] for step in steps)
        # Not what this process computed: all steps may have been made before it started.
        last = {name: value for name, value in (steps or [{}])[-1].items() if name != "step"}
        return {**last, "tokens": tokens, "metrics": means}
