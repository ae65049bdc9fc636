"""The NeMo model class. It trains whatever stage it is given; it names no algorithm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import DictConfig, OmegaConf

from nemo_selfpref.config.schema import OptimConfig
from nemo_selfpref.data.batching import PackedBatch, StepPlan, micro_batches
from nemo_selfpref.errors import TrainingError
from nemo_selfpref.megatron.optim import PolicyOptimizer, make_scheduler
from nemo_selfpref.megatron.policy import Policy, ReferenceLogps
from nemo_selfpref.models.nemo_adapter import ModelPT
from nemo_selfpref.objectives.objective import NLLScope, Objective
from nemo_selfpref.types import TrainingRow


@dataclass(frozen=True)
class TrainingStage:
    """One fit: rows in a planned order, a loss, and how to step."""

    name: str
    rows: Sequence[TrainingRow]
    plan: StepPlan
    objective: Objective
    optim: OptimConfig
    gradient_clip_val: float
    micro_batch_size: int
    reference: ReferenceLogps | None = None


class StepBatches:
    """This replica's batches of a stage, step by step; `start` skips what was done already."""

    def __init__(self, stage: TrainingStage, policy: Policy) -> None:
        self.stage, self.policy = stage, policy
        self.start = 0

    def __len__(self) -> int:
        return self.stage.plan.num_steps

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        layout, config = self.policy.layout, self.policy.config
        objective = self.stage.objective
        for step in range(self.start, self.stage.plan.num_steps):
            yield micro_batches(
                self.stage.rows,
                self.stage.plan.rows_of_step(step),
                replica=layout.data_rank,
                num_replicas=layout.data_size,
                micro_batch_size=self.stage.micro_batch_size,
                paired=objective.paired,
                prompt_targets=getattr(objective, "nll_scope", None) is NLLScope.full,
                pad_multiple=layout.tensor_size if config.sequence_parallel else 1,
            )


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
        self.batches: StepBatches | None = None
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
        self.batches = StepBatches(stage, self.policy)

    def train_dataloader(self) -> StepBatches:
        assert self.batches is not None
        return self.batches

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:  # type: ignore[override]
        assert self.stage is not None
        optimizer = PolicyOptimizer(self.policy, self.stage.optim, self.stage.gradient_clip_val)
        scheduler = make_scheduler(optimizer, self.stage.optim, self.stage.plan.num_steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Micro-batches move to the device one at a time, inside the schedule."""
        return batch

    def training_step(self, batch: list[PackedBatch], batch_idx: int) -> None:  # type: ignore[override]
        assert self.stage is not None
        optimizer: Any = self.optimizers()
        learning_rate = optimizer.param_groups[0]["lr"]
        metrics = self.policy.train_batch(batch, self.stage.objective, self.stage.reference)
        if not math.isfinite(metrics["loss"]):
            rows = sorted(n for micro_batch in batch for n in micro_batch.rows)
            raise TrainingError(
                f"stage {self.stage.name}, step {self.trainer.global_step + 1}: the loss is "
                f"{metrics['loss']}. Rows of this replica in the batch: {rows}. The weights were "
                "not changed; lower the learning rate, or look at those rows."
            )
        optimizer.step()
        schedulers: Any = self.lr_schedulers()
        schedulers.step()
        metrics["lr"] = learning_rate
        metrics["grad_norm"] = optimizer.optimizer.grad_norm
        self.last_metrics = metrics
        shown = {"loss", "rewards/accuracies"}
        for name, value in metrics.items():
            self.log(name, value, prog_bar=name in shown, batch_size=1, rank_zero_only=True)
