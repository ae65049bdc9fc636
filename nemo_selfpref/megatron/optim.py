"""Megatron's optimizer in the shape Lightning expects, and the learning-rate schedule."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer

from nemo_selfpref.config.model_schema import (
    OptimConfig,
    OptimizerName,
    Scheduler,
    SchedulerConfig,
)
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.megatron.cpu_shim import device_scope
from nemo_selfpref.megatron.policy import Policy


class PolicyOptimizer(torch.optim.Optimizer):
    """A torch optimizer that steps Megatron's: float32 main weights, global gradient clipping."""

    def __init__(self, policy: Policy, config: OptimConfig, clip_grad: float) -> None:
        self.policy = policy
        self.grad_norm = 0.0
        self._standing_still = False
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
            use_distributed_optimizer=policy.config.use_distributed_optimizer,
        )
        with device_scope():
            self.inner = get_megatron_optimizer(settings, list(policy.ddp))
        if config.name is OptimizerName.rmsprop:
            _exchange_for_rmsprop(cast(ChainedOptimizer, self.inner), config)
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
        if self._standing_still:
            return
        with device_scope():
            # (success, norm, zero gradients); the abstract method is annotated with nothing.
            _, grad_norm, _ = cast(tuple[bool, float | None, int | None], self.inner.step())
        self.grad_norm = float(grad_norm or 0.0)
        self.policy.weight_version += 1

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """Steps inside the block change nothing. Lightning and the schedule count by the calls of
        `step`, so a step that must not be made is made so."""
        self._standing_still = True
        try:
            yield
        finally:
            self._standing_still = False

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Empty: the checkpoint stores the state in shards (sharded_state_dict)."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: see load_sharded."""

    def sharded_state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        # The one of Megatron's formats that describes whole weights' state, so that another layout
        # can read it; the first replica gathers it.
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": True,
        }
        if is_loading and self.policy.config.use_distributed_optimizer:
            self._make_adam_state()
        with device_scope():
            return self.inner.sharded_state_dict(
                self.policy.sharded_state_dict(), is_loading, metadata=metadata
            )

    def _make_adam_state(self) -> None:
        """Give a distributed optimizer that has not stepped the state it describes to be read
        into. Megatron does so itself for every optimizer but torch's own Adam."""
        for wrapped in cast(ChainedOptimizer, self.inner).chained_optimizers:
            adam = wrapped.optimizer
            if isinstance(adam, torch.optim.Adam) and not adam.state:
                for parameter in (p for group in adam.param_groups for p in group["params"]):
                    adam.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }

    def load_sharded(self, state: dict[Any, Any]) -> None:
        with device_scope():
            if not self.policy.config.use_distributed_optimizer:
                self.inner.load_state_dict(state)
                return
            chained = cast(ChainedOptimizer, self.inner).chained_optimizers
            states = [state] if len(chained) == 1 else [state[n] for n in range(len(chained))]
            for wrapped, own in zip(chained, states, strict=True):
                _load_split(cast(Any, wrapped), own)


def _load_split(wrapped: Any, state: dict[str, Any]) -> None:
    """DistributedOptimizer.load_state_dict, which looks in vain for the step counts that torch's
    own Adam keeps beside each tensor: it reads these elsewhere."""
    rest = {key: value for key, value in state.items() if key != "param_state"}
    wrapped.load_state_dict(rest)
    states = wrapped.optimizer.state.values()
    counts = [own.pop("step", None) for own in states]
    wrapped.load_parameter_state_from_fully_reshardable(state["param_state"])
    for own, count in zip(states, counts, strict=True):
        if count is not None:
            own["step"] = count.clone()  # Megatron gives all tensors one count between them


def _exchange_for_rmsprop(inner: ChainedOptimizer, config: OptimConfig) -> None:
    """Put torch's RMSprop in the place of every Adam in a new Megatron optimizer.

    get_megatron_optimizer builds adam and sgd only. What it puts around them (float32 main weights,
    clipping over all model-parallel ranks, sharded state) asks of the torch optimizer no more than
    its parameter groups and its state, so both can change hands while there is no state yet.
    """
    for wrapped in inner.chained_optimizers:
        adam = wrapped.optimizer
        assert not adam.state
        # Megatron's marks on a group stay, and the float32 main weights in it; Adam's settings go.
        groups = [
            {key: value for key, value in group.items() if key not in adam.defaults}
            for group in adam.param_groups
        ]
        wrapped.optimizer = torch.optim.RMSprop(
            groups,
            lr=config.lr,
            alpha=config.alpha,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        wrapped.init_state_fn = _make_rmsprop_state


def _make_rmsprop_state(optimizer: torch.optim.Optimizer, _: OptimizerConfig | None = None) -> None:
    """Zeros in the shape of RMSprop's state, for a checkpoint to be read into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "square_avg": torch.zeros_like(parameter),
                }


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
