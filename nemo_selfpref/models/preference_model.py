"""The NeMo model class. It trains whatever stage it is given; it names no algorithm."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import DictConfig, OmegaConf

from nemo_selfpref.data.batching import PackedBatch
from nemo_selfpref.data.packing import micro_batches
from nemo_selfpref.errors import TrainingError
from nemo_selfpref.megatron.optim import PolicyOptimizer, make_scheduler
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.models.nemo_adapter import ModelPT
from nemo_selfpref.models.stage import Step, StepNumbers, TrainingStage
from nemo_selfpref.objectives.objective import NLLScope


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

    def training_step(self, batch: int, batch_idx: int) -> None:  # type: ignore[override]
        assert self.stage is not None
        optimizer: Any = self.optimizers()
        learning_rate = optimizer.param_groups[0]["lr"]
        step = self.stage.steps.step(batch)
        metrics = self.policy.train_batch(
            self._micro_batches(step), self.stage.objective, step.inputs
        )
        if not math.isfinite(metrics["loss"]):
            raise TrainingError(
                f"stage {self.stage.name}, step {self.trainer.global_step + 1}: the loss is "
                f"{metrics['loss']}. Rows in the batch: {[row.id for row in step.rows]}. The "
                "weights were not changed; lower the learning rate, or look at those rows."
            )
        optimizer.step()
        schedulers: Any = self.lr_schedulers()
        schedulers.step()
        self.stage.steps.after_step(batch + 1)
        metrics |= step.metrics
        metrics["lr"] = learning_rate
        metrics["grad_norm"] = optimizer.optimizer.grad_norm
        self.last_metrics = metrics
        shown = {"loss", "rewards/accuracies"}
        for name, value in metrics.items():
            self.log(name, value, prog_bar=name in shown, batch_size=1, rank_zero_only=True)

    def _micro_batches(self, step: Step) -> list[PackedBatch]:
        """This replica's share of the step."""
        assert self.stage is not None
        layout, objective = self.policy.layout, self.stage.objective
        return micro_batches(
            step.rows,
            range(len(step.rows)),
            replica=layout.data_rank,
            num_replicas=layout.data_size,
            rule=self.policy.packing_rule(self.stage.micro_batch_size),
            paired=objective.paired,
            prompt_targets=getattr(objective, "nll_scope", None) is NLLScope.full,
        )
