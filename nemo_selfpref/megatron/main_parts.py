"""Which part of each weight this rank's optimizer holds in float32.

Without the distributed optimizer that is all of it. With it, Megatron cuts the buffer that holds
the weights end to end into one piece a replica, so a rank has a run of some weights and nothing of
others; the EMA is kept cut the same way and needs no gathering to be averaged.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from nemo_selfpref.megatron.cpu_shim import device_scope
from nemo_selfpref.megatron.policy import Policy


class MainParts:
    """The parts of a policy's trained weights on this rank, each flat."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.split = policy.config.use_distributed_optimizer

    @functools.cached_property
    def _ranges(self) -> dict[int, tuple[slice, Any]]:
        """By a weight's id: the part of it here, and the group that has the rest."""
        found = {}
        for ddp in self.policy.ddp:
            for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
                # Megatron's own cut; it has no public name.
                (buckets,) = DistributedOptimizer._build_gbuf_range_map(buffer).values()
                for parameter in buffer.params:
                    found[id(parameter)] = (slice(0, 0), buffer.data_parallel_group)
                for bucket in buckets:
                    for parameter, ranges in bucket["param_map"].items():
                        part = slice(ranges["param"].start, ranges["param"].end)
                        found[id(parameter)] = (part, buffer.data_parallel_group)
        return found

    def _parts(self) -> list[tuple[slice, Any]]:
        trained = (p for p in self.policy.module.parameters() if p.requires_grad)
        return [self._ranges[id(p)] for p in trained]

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This rank's part of tensors shaped as the weights, as views."""
        flat = [t.detach().view(-1) for t in tensors]
        if not self.split:
            return flat
        return [t[part] for t, (part, _) in zip(flat, self._parts(), strict=True)]

    def current(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The parts as the optimizer has them: float32 main weights where there are some."""
        mains = [getattr(p, "main_param", None) for p in parameters]
        parts = zip(mains, self.of(parameters), strict=True)
        return [part.float() if main is None else main.view(-1) for main, part in parts]

    def share(self) -> None:
        """Give every replica the parts of the weights that this one has just changed."""
        if self.split:
            with device_scope():
                for ddp in self.policy.ddp:
                    ddp.start_param_sync(force_sync=True)

    def whole(self, parameters: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """Tensors shaped as the weights out of every replica's parts. Collective."""
        if not self.split:
            return [part.view(p.shape) for p, part in zip(parameters, parts, strict=True)]
        joined = []
        for p, part, (where, group) in zip(parameters, parts, self._parts(), strict=True):
            flat = torch.zeros(p.numel(), dtype=part.dtype, device=p.device)
            flat[where] = part.to(p.device)
            dist.all_reduce(flat, group=group)
            joined.append(flat.view(p.shape))
        return joined
