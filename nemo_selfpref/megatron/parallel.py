"""Process group and Megatron parallel state of a run, and the small collectives built on them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from nemo_selfpref.config.model_schema import ModelConfig
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.megatron.cpu_shim import device_scope
from nemo_selfpref.megatron.platform import Platform

_TIMEOUT_S = 1800.0


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
    """Which of the replicas, each of which computes micro-batches of its own."""
    data_size: int
    context_rank: int = 0
    context_size: int = 1
    expert_size: int = 1
    virtual_size: int = 1

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def decoder(self) -> tuple[int, int]:
        """(number, count) of those that decode separately. Every rank holds whole sequences then,
        so the context ranks share the work as replicas do; ranks that split experts must move in
        step and decode the same."""
        rank = self.data_rank * self.context_size + self.context_rank
        together = max(self.expert_size // self.tensor_size, 1)
        return rank // together, self.data_size * self.context_size // together

    @property
    def scorer(self) -> tuple[int, int]:
        """(number, count) of the groups of replicas that score separately."""
        together = max(self.expert_size // (self.tensor_size * self.context_size), 1)
        return self.data_rank // together, self.data_size // together

    def describe(self) -> str:
        sizes = {
            "TP": self.tensor_size,
            "PP": self.pipeline_size,
            "VPP": self.virtual_size,
            "CP": self.context_size,
            "EP": self.expert_size,
            "DP": self.data_size,
        }
        always = ("TP", "PP", "DP")
        return " ".join(f"{k}={v}" for k, v in sizes.items() if v > 1 or k in always)


def initialize(cfg: RunConfig, platform: Platform) -> Layout:
    """Join the process group and set up Megatron's parallel state; idempotent.

    Rank, world size and address come from the launcher's environment (torchrun, or srun through
    the launch scripts); without one this is a world of a single process.
    """
    if platform.cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        join(platform, max(_TIMEOUT_S, 2 * cfg.exp_manager.heartbeat.hang_timeout_s))
    _check_world(cfg, dist.get_world_size())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            cfg.model.tensor_model_parallel_size,
            cfg.model.pipeline_model_parallel_size,
            cfg.model.virtual_pipeline_model_parallel_size,
            context_parallel_size=cfg.model.context_parallel_size,
            expert_model_parallel_size=cfg.model.expert_model_parallel_size,
            expert_tensor_parallel_size=expert_tensor_size(cfg.model),
        )
        with device_scope():
            tensor_parallel.model_parallel_cuda_manual_seed(cfg.seed)
    return current_layout()


def expert_tensor_size(model: ModelConfig) -> int:
    """Ranks that split one expert's weights: the tensor-parallel ones, unless these hold different
    experts. Megatron sums the gradients of whole experts over them in that case alone."""
    return 1 if model.expert_model_parallel_size > 1 else model.tensor_model_parallel_size


def join(platform: Platform, timeout_s: float = _TIMEOUT_S) -> None:
    """Join the process group that the launcher's environment describes. A collective that takes
    longer than `timeout_s` fails, on the ranks that wait and not on the one they wait for: whoever
    hangs should have been found before."""
    timeout = timedelta(seconds=timeout_s)
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
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        expert_size=parallel_state.get_expert_model_parallel_world_size(),
        virtual_size=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
    )


def leave_layout() -> None:
    """Give up Megatron's groups, so that `initialize` can make others; safe to call twice."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


def shutdown() -> None:
    """Leave the process group; safe to call twice."""
    leave_layout()
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


def any_of(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Each flag as it is on any rank. Collective over all ranks."""
    if dist.get_world_size() == 1:
        return list(flags)
    found = torch.tensor([int(flag) for flag in flags], dtype=torch.int32, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


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
    """The ranks in this one's place in each model replica."""
    return _own(parallel_state.get_data_parallel_group())


def context_group() -> dist.ProcessGroup:
    """The ranks that split the tokens of this rank's micro-batches."""
    return _own(parallel_state.get_context_parallel_group())


def decoder_group() -> dist.ProcessGroup:
    """The replicas' and context ranks in this one's place in the network."""
    return _own(parallel_state.get_data_parallel_group(with_context_parallel=True))


def _own(group: Any) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup), "this rank is in no such group"
    return group


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()
