"""What is not finite in a step, and where it comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tiny import MakePolicy, in_precision, with_adapters
from torch import Tensor

from nemo_selfpref.config.model_schema import LoRAConfig, OptimConfig
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.data.batching import PackedBatch, collate, sequences_of
from nemo_selfpref.megatron.nonfinite import Fault, FaultKind, Trial
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.objectives.inputs import PassLogps, StepInputs
from nemo_selfpref.objectives.objective import (
    DPOObjective,
    Loss,
    Objective,
    PairLogps,
    Pass,
)
from nemo_selfpref.types import PreferencePair

ROWS = [
    PreferencePair("a", (5, 6, 7), (8, 9, 2), (10, 2)),
    PreferencePair("b", (30,), (31, 2), (32, 33, 34, 2)),
    PreferencePair("c", (40, 41, 42, 43), (44, 2), (45, 46, 2)),
]
STRENGTH = torch.tensor([0.9, 0.6, 0.75])
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"


@dataclass(frozen=True)
class Divided(Objective):
    """Divides by strength - 0.6: row b's loss is infinite."""

    passes: ClassVar[frozenset[Pass]] = frozenset({Pass.POLICY})

    def __call__(self, logps: Mapping[Pass, PairLogps], strength: Tensor) -> Loss:
        policy = logps[Pass.POLICY]
        return Loss(policy.chosen / (strength - 0.6), torch.ones_like(policy.chosen_len))


@dataclass(frozen=True)
class Rooted(Objective):
    """sqrt(x^2) with x = chosen (strength - 0.6): row b's loss is 0, its gradient 0 / 0."""

    passes: ClassVar[frozenset[Pass]] = frozenset({Pass.POLICY})

    def __call__(self, logps: Mapping[Pass, PairLogps], strength: Tensor) -> Loss:
        policy = logps[Pass.POLICY]
        root = (policy.chosen * (strength - 0.6)).square().sqrt()
        return Loss(root, torch.ones_like(policy.chosen_len))


def batch(*numbers: int) -> PackedBatch:
    return collate(sequences_of([ROWS[n] for n in numbers], True), numbers, paired=True)


def trial(
    objective: Objective,
    passes: Mapping[Pass, PassLogps] | None = None,
    cut: Sequence[Sequence[int]] = ((2,), (0, 1)),
) -> Trial:
    inputs = StepInputs(STRENGTH, passes or {})
    return Trial([batch(*numbers) for numbers in cut], objective, inputs, lambda n: [batch(n)])


def attempt(policy: Policy, of: Trial) -> tuple[bool, Fault]:
    """Whether the step is finite, and what is wrong with it."""
    metrics = policy.train_batch(of.batches, of.objective, of.inputs)
    return policy.finite_step(metrics), policy.find_fault(of)


def reference(*chosen: float) -> dict[Pass, PassLogps]:
    return {Pass.REFERENCE: PassLogps(torch.tensor(chosen), torch.tensor([-9.0, -20.0, -15.0]))}


GOOD = reference(-19.0, -12.0, -13.0)


def poison(policy: Policy, name: str = FC2, value: float = math.nan) -> None:
    weights = dict(policy.module.named_parameters())
    with torch.no_grad():
        weights[name].view(-1)[7] = value


def test_a_finite_step(policy: Policy) -> None:
    of = trial(DPOObjective(0.1), GOOD)
    metrics = policy.train_batch(of.batches, of.objective, of.inputs)
    assert policy.finite_step(metrics) and policy.nonfinite_batches() == []
    assert policy.nonfinite_weights() == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_is_named(policy: Policy, value: float) -> None:
    poison(policy, value=value)
    assert policy.nonfinite_weights() == [FC2]
    finite, fault = attempt(policy, trial(DPOObjective(0.1), GOOD))
    assert not finite
    assert fault == Fault(FaultKind.WEIGHTS, tensors=(FC2,), ranks=(0,))


def test_a_large_finite_weight_is_none_of_them(policy: Policy) -> None:
    poison(policy, value=3e38)
    assert policy.nonfinite_weights() == []


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_log_prob_of_the_reference(policy: Policy, value: float) -> None:
    """Also where the loss itself stays finite: -logsigmoid(inf) is 0, with a gradient of 0."""
    finite, fault = attempt(policy, trial(DPOObjective(0.1), reference(-19.0, value, -13.0)))
    assert not finite
    want = (("reference", (1,)),)
    assert fault == Fault(FaultKind.PASSES, (1,), ((0, 1),), passes=want, ranks=(0,))


def test_a_loss_is_traced_to_its_row(policy: Policy) -> None:
    finite, fault = attempt(policy, trial(Divided()))
    assert not finite and fault == Fault(FaultKind.LOSS, (1,), ((0, 1),), ranks=(0,))


def test_a_gradient_is_traced_to_its_row(policy: Policy) -> None:
    of = trial(Rooted())
    metrics = policy.train_batch(of.batches, of.objective, of.inputs)
    assert all(map(math.isfinite, metrics.values()))
    assert not policy.finite_step(metrics)
    fault = policy.find_fault(of)
    assert fault == Fault(FaultKind.GRADIENT, (1,), ((0, 1),), ranks=(0,))


def test_a_gradient_that_comes_once_is_of_no_row(policy: Policy) -> None:
    """A hook that puts NaN into one gradient, once: nothing computed again has it."""
    weight = policy.module.get_parameter("decoder.layers.0.mlp.linear_fc2.weight")
    handle = weight.register_hook(lambda gradient: torch.full_like(gradient, math.nan))
    of = trial(SFTLike())
    metrics = policy.train_batch(of.batches, of.objective, of.inputs)
    handle.remove()
    assert not policy.finite_step(metrics)
    assert policy.find_fault(of) == Fault(FaultKind.GRADIENT)


@dataclass(frozen=True)
class SFTLike(Objective):
    """Minus the log-prob of the chosen answer."""

    passes: ClassVar[frozenset[Pass]] = frozenset({Pass.POLICY})

    def __call__(self, logps: Mapping[Pass, PairLogps], strength: Tensor) -> Loss:
        policy = logps[Pass.POLICY]
        return Loss(-policy.chosen, torch.ones_like(policy.chosen_len))


def test_a_norm_that_overflows(policy: Policy) -> None:
    """(1e20)^2 is more than float32 holds, though 1e20 is not: Megatron would clip to zero."""
    of = trial(SFTLike())
    metrics = policy.train_batch(of.batches, of.objective, of.inputs)
    assert policy.finite_step(metrics)
    next(policy.module.parameters()).main_grad.view(-1)[0] = 1e20  # type: ignore[attr-defined]
    assert not policy.finite_step(metrics)


@pytest.mark.parametrize("distributed", [False, True])
def test_in_bfloat16(policy: Policy, llama_folder: Path, distributed: bool) -> None:
    made = in_precision(policy, Precision.bf16, llama_folder, use_distributed_optimizer=distributed)
    optimizer = PolicyOptimizer(made, OptimConfig(lr=1e-3), 1.0)
    of = trial(SFTLike())
    metrics = made.train_batch(of.batches, of.objective, of.inputs)
    assert made.finite_step(metrics)
    optimizer.step()  # the gradients alias the buffers from here
    finite, fault = attempt(made, trial(Rooted()))
    assert not finite and fault.rows == (1,) and fault.kind is FaultKind.GRADIENT
    poison(made, value=math.inf)
    finite, fault = attempt(made, of)
    assert not finite and fault == Fault(FaultKind.WEIGHTS, tensors=(FC2,), ranks=(0,))


def test_with_adapters(llama_folder: Path) -> None:
    made = with_adapters(llama_folder, LoRAConfig(rank=4, alpha=8.0))
    finite, fault = attempt(made, trial(Rooted()))
    assert not finite and fault.rows == (1,) and fault.kind is FaultKind.GRADIENT
    poison(made)  # a frozen weight: no gradient would tell of it
    _, fault = attempt(made, trial(SFTLike()))
    assert fault == Fault(FaultKind.WEIGHTS, tensors=(FC2,), ranks=(0,))


def test_tied_embeddings_are_one_tensor(make_policy: MakePolicy, tied_folder: Path) -> None:
    made = make_policy(tied_folder)
    poison(made, "embedding.word_embeddings.weight")
    assert made.nonfinite_weights() == ["embedding.word_embeddings.weight"]


def test_many_rows_are_not_all_computed_alone(policy: Policy) -> None:
    """Of a large micro-batch the first 32 rows are tried one by one."""
    rows = [PreferencePair(str(n), (5, 6), (7, 2), (8, 2)) for n in range(40)]
    asked: list[int] = []

    def alone(row: int) -> list[PackedBatch]:
        asked.append(row)
        return [collate(sequences_of([rows[row]], True), [row], paired=True)]

    whole = collate(sequences_of(rows, True), range(40), paired=True)
    strength = torch.full((40,), 0.9)
    strength[[3, 35]] = 0.6
    of = Trial([whole], Divided(), StepInputs(strength), alone)
    _, fault = attempt(policy, of)
    assert asked == list(range(32)) and fault.rows == (3,)


def test_tracing_leaves_no_trace(policy: Policy) -> None:
    """The next step is the one that would have been made without it."""
    want = policy.train_batch([batch(0, 2)], SFTLike(), StepInputs(STRENGTH))
    before = [p.main_grad.clone() for p in policy.module.parameters()]  # type: ignore[attr-defined]
    attempt(policy, trial(Rooted()))
    assert policy.train_batch([batch(0, 2)], SFTLike(), StepInputs(STRENGTH)) == want
    after = [p.main_grad for p in policy.module.parameters()]  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_an_optimizer_standing_still(policy: Policy) -> None:
    optimizer = PolicyOptimizer(policy, OptimConfig(lr=1e-1), 1.0)
    of = trial(SFTLike())
    policy.train_batch(of.batches, of.objective, of.inputs)
    before = [p.detach().clone() for p in policy.module.parameters()]
    chained = optimizer.inner.chained_optimizers  # type: ignore[attr-defined]
    with optimizer.standing_still():
        optimizer.step()
    assert policy.weight_version == 0 and not any(w.optimizer.state for w in chained)
    assert all(torch.equal(p, b) for p, b in zip(policy.module.parameters(), before, strict=True))
    optimizer.step()
    assert policy.weight_version == 1
