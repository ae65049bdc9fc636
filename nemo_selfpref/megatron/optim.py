"""Megatron's optimizer in the shape Lightning expects, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from nemo_selfpref.config.schema import OptimConfig, Precision, Scheduler, SchedulerConfig
from nemo_selfpref.megatron.cpu_shim import device_scope
from nemo_selfpref.megatron.policy import Policy


class PolicyOptimizer(torch.optim.Optimizer):
    """A torch optimizer that steps Megatron's: float32 main weights, global gradient clipping."""

    def __init__(self, policy: Policy, config: OptimConfig, clip_grad: float) -> None:
        self.policy = policy
        self.grad_norm = 0.0
        dtype = policy.platform.dtype(policy.precision)
        settings = OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=clip_grad,
            bf16=policy.precision is Precision.bf16,
            params_dtype=dtype,
        )
        with device_scope():
            self.inner = get_megatron_optimizer(settings, [policy.ddp])
        # Megatron marks norms with wd_mult 0, which only its own scheduler would apply.
        for group in self.inner.param_groups:
            group["weight_decay"] *= group["wd_mult"]
        # torch's constructor would put every parameter into one group of its own; the groups,
        # state and defaults of this optimizer are Megatron's.
        self.defaults = {"lr": config.lr}
        self._hook_for_profile = lambda: None
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(self, name, {})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update; `grad_norm` then holds the norm before clipping."""
        if closure is not None:
            closure()
        with device_scope():
            # (success, norm, zero gradients); the abstract method is annotated with nothing.
            _, grad_norm, _ = cast(tuple[bool, float | None, int | None], self.inner.step())
        self.grad_norm = float(grad_norm or 0.0)
        self.policy.weight_version += 1

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Empty: the checkpoint stores the state in shards (sharded_state_dict)."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: see load_sharded."""

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        with device_scope():
            return self.inner.sharded_state_dict(self.policy.sharded_state_dict(), is_loading)

    def load_sharded(self, state: dict[str, Any]) -> None:
        with device_scope():
            self.inner.load_state_dict(state)


def learning_rate_factor(step: int, num_steps: int, config: SchedulerConfig, lr: float) -> float:
    """Learning rate of optimizer step `step` (from 0) as a share of `lr`."""
    warmup = config.warmup_steps or round(config.warmup_ratio * num_steps)
    floor = config.min_lr / lr if lr else 0.0
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(num_steps - warmup, 1)
    if config.name is Scheduler.constant:
        return 1.0
    if config.name is Scheduler.LinearAnnealing:
        return floor + (1 - floor) * (1 - min(done, 1.0))
    if config.name is Scheduler.InverseSquareRoot:
        return max(math.sqrt(max(warmup, 1) / (step + 1)), floor)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def make_scheduler(
    optimizer: PolicyOptimizer, config: OptimConfig, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule over a stage of `num_steps` optimizer steps."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, num_steps, config.sched, config.lr)
    )
