"""Process group and Megatron parallel state of a run, and the small collectives built on them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.megatron.cpu_shim import device_scope
from nemo_selfpref.megatron.platform import Platform


@dataclass(frozen=True)
class Layout:
    """Where this process stands."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def describe(self) -> str:
        return f"TP={self.tensor_size} PP={self.pipeline_size} DP={self.data_size}"


def initialize(cfg: RunConfig, platform: Platform) -> Layout:
    """Join the process group and set up Megatron's parallel state; idempotent.

    Rank, world size and address come from the launcher's environment (torchrun, or srun through
    the launch scripts); without one this is a world of a single process.
    """
    if platform.cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        _join(platform)
    _check_world(cfg, dist.get_world_size())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            cfg.model.tensor_model_parallel_size, cfg.model.pipeline_model_parallel_size
        )
        with device_scope():
            tensor_parallel.model_parallel_cuda_manual_seed(cfg.seed)
    return current_layout()


def _join(platform: Platform) -> None:
    timeout = timedelta(minutes=30)
    if "RANK" in os.environ:
        dist.init_process_group(platform.backend, timeout=timeout)
        return
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(platform.backend, store=store, rank=0, world_size=1, timeout=timeout)


def _check_world(cfg: RunConfig, world_size: int) -> None:
    wanted = cfg.trainer.devices * cfg.trainer.num_nodes
    if world_size != wanted:
        raise ConfigError(
            f"trainer.devices={cfg.trainer.devices} x trainer.num_nodes={cfg.trainer.num_nodes} "
            f"asks for {wanted} processes, but the launcher started {world_size}."
        )


def current_layout() -> Layout:
    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def shutdown() -> None:
    """Leave the process group; safe to call twice."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def all_gather_json(value: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """Gather one JSON value from every rank of `group`, in rank order."""
    if group.size() == 1:
        return [value]
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor([payload.numel()], dtype=torch.int64, device=device)
    sizes = [torch.zeros_like(size) for _ in range(group.size())]
    dist.all_gather(sizes, size, group=group)
    longest = int(max(s.item() for s in sizes))
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    parts = [torch.zeros_like(padded) for _ in range(group.size())]
    dist.all_gather(parts, padded, group=group)
    texts = (bytes(p[: int(s.item())].cpu().numpy()) for p, s in zip(parts, sizes, strict=True))
    return [json.loads(text) for text in texts]


def world_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "the process group has not been joined"
    return group


def tensor_group() -> dist.ProcessGroup:
    """The ranks that split the weights of this rank's layers."""
    return _own(parallel_state.get_tensor_model_parallel_group())


def pipeline_group() -> dist.ProcessGroup:
    """The stages of this model replica."""
    return _own(parallel_state.get_pipeline_model_parallel_group())


def replica_group() -> dist.ProcessGroup:
    """The ranks that hold the same weights, one in each model replica."""
    return _own(parallel_state.get_data_parallel_group())


def _own(group: Any) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup), "this rank is in no such group"
    return group


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()
