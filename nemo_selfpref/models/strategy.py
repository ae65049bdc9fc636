"""The Lightning strategy: process groups are Megatron's, gradients are Megatron's, and checkpoints
are folders of safetensors and JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy

from nemo_selfpref.checkpoint.saver import Saver
from nemo_selfpref.checkpoint.training_state import (
    load_optimizer,
    load_training,
    take_training,
)
from nemo_selfpref.megatron.parallel import barrier
from nemo_selfpref.megatron.platform import Platform


class JoinedEnvironment(ClusterEnvironment):
    """Tells Lightning about the process group this process has already joined."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        return int(os.environ.get("MASTER_PORT", "0"))

    @staticmethod
    def detect() -> bool:
        return dist.is_initialized()

    def world_size(self) -> int:
        return dist.get_world_size()

    def set_world_size(self, size: int) -> None:
        """Fixed when the process group was joined."""

    def global_rank(self) -> int:
        return dist.get_rank()

    def set_global_rank(self, rank: int) -> None:
        """Fixed when the process group was joined."""

    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    def node_rank(self) -> int:
        return int(os.environ.get("GROUP_RANK", "0"))


class MegatronStrategy(DDPStrategy):
    """DDP's bookkeeping without its wrapper: Megatron reduces the gradients."""

    def __init__(self, platform: Platform, saver: Saver) -> None:
        super().__init__(
            cluster_environment=JoinedEnvironment(), process_group_backend=platform.backend
        )
        self._saver = saver

    def configure_ddp(self) -> None:
        """Megatron's own wrapper is already around the network."""

    def model_to_device(self) -> None:
        """The network was built on its device."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Empty: weights go to disk in shards."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Take the state as it is; `saver` writes it, whatever Lightning has in `checkpoint`."""
        module: Any = self.lightning_module
        steps, metrics = module.stage.steps, module.last_metrics
        snapshot = take_training(self._policy, self._optimizer, checkpoint, steps.save, metrics)
        self._saver.begin(Path(filepath), snapshot)

    def load_checkpoint(self, checkpoint_path: Any) -> dict[str, Any]:
        self._loading = Path(checkpoint_path)
        restored = load_training(self._loading, self._policy)
        self._stage.steps.load(self._loading)
        return restored

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Weights were read in load_checkpoint."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        load_optimizer(self._loading, self._optimizer)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        barrier()

    def teardown(self) -> None:
        """The process group and the weights outlive the stage; only the optimizer's state goes."""
        self.optimizers = []

    @property
    def _policy(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.policy

    @property
    def _stage(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.stage

    @property
    def _optimizer(self) -> Any:
        return self.optimizers[0]

    @property
    def root_device(self) -> torch.device:
        return self._policy.platform.device() if self.lightning_module else torch.device("cpu")
