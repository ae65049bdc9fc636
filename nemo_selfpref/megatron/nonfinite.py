"""Numbers that are not finite: found before a step changes anything, and traced to where they come
from.

Finding them is one pass over Megatron's gradient buffers and one reduction of two numbers. Tracing
is done only then, by all ranks together, and costs at most one more step and a forward and backward
pass of some single rows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from nemo_selfpref.data.batching import PackedBatch
from nemo_selfpref.megatron.parallel import all_gather_json, any_of, world_group
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import Objective

if TYPE_CHECKING:
    from nemo_selfpref.megatron.policy import Policy

_ROWS_ALONE = 32
"""At most so many rows of suspicious micro-batches are computed one by one."""


class FaultKind(StrEnum):
    """Where a step's numbers first stop being finite."""

    WEIGHTS = "weights"
    """They were so before the step."""
    PASSES = "passes"
    """Log-probs of the reference, or under the augmented prompt, that the loss was given."""
    LOSS = "loss"
    """The policy's log-probs, the loss or one of its metrics."""
    GRADIENT = "gradient"
    """The gradient alone, or a sum over finite micro-batches."""


@dataclass(frozen=True)
class Fault:
    """What was not finite in one step; the same on every rank.

    rows: numbers of rows of the step. micro_batches: (replica, number) each. tensors: weights by
    their names in a checkpoint. passes: by pass, its rows. ranks: which ranks saw it. Empty where
    nothing alone could be made responsible, as for a sum that overflows.
    """

    kind: FaultKind
    rows: tuple[int, ...] = ()
    micro_batches: tuple[tuple[int, int], ...] = ()
    tensors: tuple[str, ...] = ()
    passes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trial:
    """A step that was computed and not made.

    alone: the micro-batches in which one row is computed by itself.
    """

    batches: Sequence[PackedBatch]
    objective: Objective
    inputs: StepInputs
    alone: Callable[[int], Sequence[PackedBatch]]


def finite_step(policy: Policy, metrics: Mapping[str, float]) -> bool:
    """Whether the metrics and the global gradient of the last train_batch are finite. Collective,
    and the same answer on every rank."""
    wrong = [not all(map(math.isfinite, metrics.values())), not finite_gradient(policy)]
    return not any(any_of(wrong, policy.platform.device()))


def finite_gradient(policy: Policy) -> bool:
    """Whether this rank's gradient buffers are finite, and so small that the sum of squares over
    all ranks is, too: Megatron clips by that, in float32."""
    buffers = [b for ddp in policy.ddp for b in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    norms = [torch.linalg.vector_norm(b.grad_data, dtype=torch.float32) for b in buffers]
    if not norms:
        return True
    most = torch.finfo(torch.float32).max / policy.layout.world_size
    return float(torch.stack(norms).square().sum()) <= most  # not where it is NaN


def nonfinite_weights(policy: Policy) -> list[str]:
    """Names, as in a checkpoint, of weights that hold a value that is not finite. Collective; one
    pass over the weights."""
    return _nonfinite_weights(policy)[0]


def find_fault(policy: Policy, trial: Trial) -> Fault:
    """Where the last train_batch, of `trial`, went wrong. Collective. Leaves no gradients."""
    tensors, ranks = _nonfinite_weights(policy)
    if tensors:
        return Fault(FaultKind.WEIGHTS, tensors=tuple(tensors), ranks=ranks)
    passes = _nonfinite_passes(trial.inputs)
    if passes:
        rows = sorted({row for numbers in passes.values() for row in numbers})
        at, _, ranks = _locate(policy, trial.batches, lambda b: not set(rows).isdisjoint(b.rows))
        return Fault(FaultKind.PASSES, tuple(rows), at, (), tuple(passes.items()), ranks)
    wrong = [trial.batches[n] for n in policy.nonfinite_batches()]
    at, rows, ranks = _locate(policy, trial.batches, lambda b: any(b is w for w in wrong))
    if at:
        return Fault(FaultKind.LOSS, _narrow(policy, trial, rows, _loss_fails), at, ranks=ranks)
    return _gradient_fault(policy, trial)


def _gradient_fault(policy: Policy, trial: Trial) -> Fault:
    failing = [b for b in trial.batches if _gradient_fails(policy, trial, [b])]
    at, rows, ranks = _locate(policy, trial.batches, lambda b: any(b is f for f in failing))
    rows = _narrow(policy, trial, rows, _gradient_fails)
    policy.clear_gradients()
    return Fault(FaultKind.GRADIENT, rows, at, ranks=ranks)


_Fails = Callable[["Policy", Trial, Sequence[PackedBatch]], bool]
"""Whether some micro-batches, computed alone, give this rank a value that is not finite."""


def _narrow(policy: Policy, trial: Trial, rows: Sequence[int], fails: _Fails) -> tuple[int, ...]:
    """Those of the rows that fail by themselves; all of them if none does."""
    if len(rows) == 1:
        return tuple(rows)
    device, some = policy.platform.device(), rows[:_ROWS_ALONE]
    failing = [n for n in some if any_of([fails(policy, trial, trial.alone(n))], device)[0]]
    return tuple(failing or rows)


@torch.no_grad()
def _loss_fails(policy: Policy, trial: Trial, batches: Sequence[PackedBatch]) -> bool:
    policy.module.eval()
    step = partial(policy.train_step, objective=trial.objective, inputs=trial.inputs)
    outputs = policy.run_schedule(step, batches, list(policy.parts), forward_only=True)
    return not all(map(finite_output, outputs))


def _gradient_fails(policy: Policy, trial: Trial, batches: Sequence[PackedBatch]) -> bool:
    # An interleaved schedule wants a multiple of the stages.
    times = policy.packing_rule(1).count_multiple if len(batches) == 1 else 1
    policy.module.train()
    policy.clear_gradients()
    step = partial(policy.train_step, objective=trial.objective, inputs=trial.inputs)
    with _unreduced(policy):
        policy.run_schedule(step, [*batches] * times, list(policy.ddp), forward_only=False)
    return not finite_gradient(policy)


@contextlib.contextmanager
def _unreduced(policy: Policy) -> Iterator[None]:
    """Every rank keeps the gradient of its own micro-batches."""
    config: Any = policy.module.config
    kept, config.finalize_model_grads_func = config.finalize_model_grads_func, None
    try:
        yield
    finally:
        config.finalize_model_grads_func = kept


def finite_output(output: Mapping[str, Tensor]) -> bool:
    """Whether a micro-batch's loss and metrics are finite."""
    return all(math.isfinite(value.item()) for value in output.values())


def _nonfinite_passes(inputs: StepInputs) -> dict[str, tuple[int, ...]]:
    """By pass, the rows whose log-probs are not finite."""
    found = {"strength": inputs.strength}
    found |= {name.value: p.chosen + p.rejected for name, p in inputs.passes.items()}
    wrong = {name: (~v.isfinite()).nonzero()[:, 0].tolist() for name, v in found.items()}
    return {name: tuple(rows) for name, rows in sorted(wrong.items()) if rows}


def _locate(
    policy: Policy, batches: Sequence[PackedBatch], is_wrong: Callable[[PackedBatch], bool]
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], tuple[int, ...]]:
    """Micro-batches of all replicas that any rank finds wrong, their rows, and those ranks."""
    numbers = [n for n, batch in enumerate(batches) if batch.counted and is_wrong(batch)]
    rows = [row for n in numbers for row in batches[n].rows]
    mine = [policy.layout.data_rank, numbers, rows]
    parts = all_gather_json(mine, world_group(), policy.platform.device())
    at = {(replica, n) for replica, wrong, _ in parts for n in wrong}
    ranks = tuple(rank for rank, (_, wrong, _) in enumerate(parts) if wrong)
    return tuple(sorted(at)), tuple(sorted({row for *_, found in parts for row in found})), ranks


def _nonfinite_weights(policy: Policy) -> tuple[list[str], tuple[int, ...]]:
    """Names of weights over all ranks, and the ranks that hold them."""
    bad = _nonfinite_parameters(policy)
    if not any_of([bool(bad)], policy.platform.device())[0]:
        return [], ()
    parts = all_gather_json(_names(policy, bad), world_group(), policy.platform.device())
    ranks = tuple(rank for rank, names in enumerate(parts) if names)
    return sorted({name for names in parts for name in names}), ranks


@torch.no_grad()
def _nonfinite_parameters(policy: Policy) -> list[Tensor]:
    parameters = [p.detach() for p in policy.module.parameters() if p.numel()]
    # Sums of magnitudes, with one wait for the device. Those of finite values may overflow: what is
    # suspicious is looked at again.
    sums = torch._foreach_norm(parameters, 1)  # pyright: ignore[reportPrivateImportUsage]
    finite = torch.stack([total.float() for total in sums]).isfinite().tolist()
    suspicious = [p for p, ok in zip(parameters, finite, strict=True) if not ok]
    return [p for p in suspicious if not p.isfinite().all()]


def _names(policy: Policy, parameters: Sequence[Tensor]) -> list[str]:
    """Names of weights in a checkpoint, the same under every layout."""
    wanted = {p.data_ptr() for p in parameters}
    found: set[str] = set()

    def look(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                look(item)
        elif isinstance(value, ShardedTensorFactory | ShardedTensor):
            data = value.data
            found.update({value.key} if data is not None and data.data_ptr() in wanted else ())

    look(policy.sharded_state_dict())
    return sorted(found)
