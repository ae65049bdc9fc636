"""The NeMo model class. It trains whatever stage it is given; it names no algorithm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import DictConfig, OmegaConf

from nemo_selfpref.data.batching import PackedBatch
from nemo_selfpref.data.packing import micro_batches
from nemo_selfpref.megatron.nonfinite import Trial
from nemo_selfpref.megatron.optim import PolicyOptimizer, make_scheduler
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.models.nemo_adapter import ModelPT
from nemo_selfpref.models.stage import Step, StepNumbers, TrainingStage
from nemo_selfpref.objectives.objective import NLLScope

_NONFINITE = "nonfinite"


class MegatronGPTPreferenceModel(ModelPT):
    """A Megatron GPT aligned by preference (or demonstration) batches.

    Manual optimisation: training_step drives megatron-core's forward-backward schedule over the
    micro-batches of one global batch and then steps Megatron's optimizer.
    """

    def __init__(self, cfg: DictConfig, policy: Policy, trainer: Any = None) -> None:
        plain = OmegaConf.create(OmegaConf.to_container(cfg))
        assert isinstance(plain, DictConfig)
        super().__init__(cfg=plain, trainer=trainer)
        self.automatic_optimization = False
        self.policy = policy
        self.network = policy.module
        self.stage: TrainingStage | None = None
        self.numbers: StepNumbers | None = None
        self.last_metrics: dict[str, float] = {}

    @classmethod
    def list_available_models(cls) -> None:
        """No pretrained models are published under NeMo's names."""
        return None

    def setup_training_data(self, train_data_config: Any) -> None:
        """Data arrive with the stage (begin_stage)."""

    def setup_validation_data(self, val_data_config: Any) -> None:
        """Data arrive with the stage (begin_stage)."""

    def begin_stage(self, stage: TrainingStage) -> None:
        """What the next Trainer.fit trains on."""
        self.stage = stage
        self.numbers = StepNumbers(stage.steps.num_steps)

    def train_dataloader(self) -> StepNumbers:
        assert self.numbers is not None
        return self.numbers

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:  # type: ignore[override]
        assert self.stage is not None
        optimizer = PolicyOptimizer(self.policy, self.stage.optim, self.stage.gradient_clip_val)
        scheduler = make_scheduler(optimizer, self.stage.optim, self.stage.steps.num_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """A batch is the number of a step; micro-batches move one at a time, in the schedule."""
        return batch

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.stage is not None
        self.stage.nonfinite.begin(self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Steps skipped in a row stay so after a resume."""
        assert self.stage is not None
        checkpoint[_NONFINITE] = self.stage.nonfinite.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what on_save_checkpoint gave."""
        assert self.stage is not None
        self.stage.nonfinite.load_state(checkpoint.get(_NONFINITE, {}))

    def training_step(self, batch: int, batch_idx: int) -> None:  # type: ignore[override]
        """Step number `batch` of the stage.

        Raises:
            TrainingError: its numbers are not finite, and it may not be skipped.
        """
        assert self.stage is not None
        optimizer: Any = self.optimizers()
        learning_rate = optimizer.param_groups[0]["lr"]
        step = self.stage.steps.step(batch)
        batches = self._micro_batches(step, range(len(step.rows)))
        metrics = self.policy.train_batch(batches, self.stage.objective, step.inputs)
        made = self.policy.finite_step(metrics)
        if made:
            optimizer.step()
            self.stage.nonfinite.finite()
        else:
            metrics = self._skip(batch + 1, step, batches, metrics["tokens"])
        schedulers: Any = self.lr_schedulers()
        schedulers.step()
        # A step that was not made moves no copy either: no EMA, no reference.
        if made:
            self.stage.steps.after_step(batch + 1)
            metrics["grad_norm"] = optimizer.optimizer.grad_norm
        else:
            self.stage.steps.skipped(batch + 1)
        self._report({**metrics, **_finite(step.metrics), "lr": learning_rate})

    def _skip(
        self, number: int, step: Step, batches: list[PackedBatch], tokens: float
    ) -> dict[str, float]:
        """Count step `number`, from 1, without making it; its metrics."""
        assert self.stage is not None
        fault = self.policy.find_fault(
            Trial(batches, self.stage.objective, step.inputs, partial(self._alone, step))
        )
        self.stage.nonfinite.skip(self.stage.name, number, fault, step.rows)
        optimizer: Any = self.optimizers()
        with optimizer.optimizer.standing_still():
            optimizer.step()
        return {"tokens": tokens, "skipped": 1.0}

    def _report(self, metrics: dict[str, float]) -> None:
        assert self.stage is not None
        if self.stage.nonfinite.total:
            metrics["nonfinite_steps"] = float(self.stage.nonfinite.total)
        self.last_metrics = metrics
        shown = {"loss", "rewards/accuracies"}
        for name, value in metrics.items():
            self.log(name, value, prog_bar=name in shown, batch_size=1, rank_zero_only=True)

    def _alone(self, step: Step, row: int) -> list[PackedBatch]:
        """One row of the step by itself, the same on every replica."""
        return self._micro_batches(step, [row], replica=0, num_replicas=1)

    def _micro_batches(
        self,
        step: Step,
        numbers: Sequence[int],
        replica: int | None = None,
        num_replicas: int | None = None,
    ) -> list[PackedBatch]:
        """A replica's share of some rows of the step; this one's unless another is named."""
        assert self.stage is not None
        layout, objective = self.policy.layout, self.stage.objective
        return micro_batches(
            step.rows,
            numbers,
            replica=layout.data_rank if replica is None else replica,
            num_replicas=num_replicas or layout.data_size,
            rule=self.policy.packing_rule(self.stage.micro_batch_size),
            paired=objective.paired,
            prompt_targets=getattr(objective, "nll_scope", None) is NLLScope.full,
        )


def _finite(measured: Mapping[str, float]) -> dict[str, float]:
    """Measurements of a step's making; those that are not finite are counted instead."""
    found = {name: value for name, value in measured.items() if math.isfinite(value)}
    left_out = len(measured) - len(found)
    return found | ({"nonfinite_metrics": float(left_out)} if left_out else {})
