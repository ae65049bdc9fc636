from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny import MakePolicy, in_precision

from nemo_selfpref.config.model_schema import (
    OptimConfig,
    OptimizerName,
    Scheduler,
    SchedulerConfig,
)
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.data.batching import collate
from nemo_selfpref.megatron.optim import PolicyOptimizer, learning_rate_factor, make_scheduler
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import SFTObjective

SEQUENCES = [((5, 6, 7), (8, 9, 2)), ((5, 6), (8, 11, 12, 2))]


def schedule(config: SchedulerConfig, steps: int, lr: float = 1.0) -> list[float]:
    return [learning_rate_factor(step, steps, config, lr) for step in range(steps)]


def test_constant_with_warmup() -> None:
    config = SchedulerConfig(Scheduler.constant, warmup_steps=4)
    assert schedule(config, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_to_a_floor() -> None:
    # 1 warm-up step, then 0.2 + 0.8 * (1 - done) with done = 0, 1/4, 2/4, 3/4.
    config = SchedulerConfig(Scheduler.LinearAnnealing, warmup_steps=1, min_lr=2e-6)
    assert schedule(config, 5, lr=1e-5) == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4])


def test_cosine_to_zero() -> None:
    # (1 + cos(pi done)) / 2 with done = 0, 1/4, 2/4, 3/4.
    half = math.sqrt(0.5)
    want = [1.0, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert schedule(SchedulerConfig(Scheduler.CosineAnnealing), 4) == pytest.approx(want)


def test_cosine_to_a_floor() -> None:
    # 0.1 + 0.9 / 2 half way.
    config = SchedulerConfig(Scheduler.CosineAnnealing, min_lr=0.1)
    assert schedule(config, 4)[2] == pytest.approx(0.55)


def test_inverse_square_root() -> None:
    # sqrt(4 / (step + 1)) after four warm-up steps: sqrt(4/5), sqrt(4/6), ..., sqrt(4/16) = 1/2.
    config = SchedulerConfig(Scheduler.InverseSquareRoot, warmup_steps=4)
    got = schedule(config, 16)
    assert got[:4] == [0.25, 0.5, 0.75, 1.0]
    assert got[4] == pytest.approx(math.sqrt(4 / 5))
    assert got[15] == 0.5
    floored = SchedulerConfig(Scheduler.InverseSquareRoot, warmup_steps=4, min_lr=0.6)
    assert schedule(floored, 16)[15] == 0.6


def test_warmup_ratio_is_a_share_of_the_steps() -> None:
    config = SchedulerConfig(Scheduler.constant, warmup_ratio=0.1)
    assert schedule(config, 20)[:3] == [0.5, 1.0, 1.0]
    assert schedule(config, 4) == [1.0] * 4  # round(0.4) = 0


@pytest.mark.parametrize("name", list(Scheduler))
def test_past_the_last_step_nothing_breaks(name: Scheduler) -> None:
    # Lightning asks for the rate of the step after the last one.
    config = SchedulerConfig(name, warmup_ratio=0.5, min_lr=0.25)
    assert 0.25 <= learning_rate_factor(8, 8, config, 1.0) <= 1.0
    assert 0.25 <= learning_rate_factor(9, 8, config, 1.0) <= 1.0


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    """Run one batch; the gradients it leaves."""
    batch = collate(SEQUENCES, [0, 1], paired=False)
    policy.train_batch([batch], SFTObjective(), StepInputs(torch.ones(2)))
    named = policy.module.named_parameters()
    return {name: p.main_grad.clone() for name, p in named}  # type: ignore[attr-defined]


def norm_of(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def test_gradient_norm_before_clipping(policy: Policy) -> None:
    optimizer = PolicyOptimizer(policy, OptimConfig(lr=1e-3), clip_grad=1.0)
    norm = norm_of(gradients(policy))
    optimizer.step()
    assert norm > 2.0
    assert optimizer.grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_clipping_scales_every_gradient_alike(policy: Policy, clip: float) -> None:
    # Adam's first moment after one step is (1 - 0.9) times the gradient it was given.
    optimizer = PolicyOptimizer(policy, OptimConfig(lr=1e-3), clip)
    before = gradients(policy)
    scale = min(1.0, clip / norm_of(before)) if clip else 1.0
    optimizer.step()
    state = optimizer.inner.chained_optimizers[0].optimizer.state  # type: ignore[attr-defined]
    by_parameter = {id(p): s["exp_avg"] for p, s in state.items()}
    for name, parameter in policy.module.named_parameters():
        moment = by_parameter[id(parameter)]
        torch.testing.assert_close(moment, 0.1 * scale * before[name], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_is_adamw(policy: Policy, decay: float) -> None:
    config = OptimConfig(lr=1e-2, weight_decay=decay, betas=[0.8, 0.95], eps=1e-6)
    optimizer = PolicyOptimizer(policy, config, clip_grad=0.0)
    before = {name: p.detach().clone() for name, p in policy.module.named_parameters()}
    grads = gradients(policy)
    optimizer.step()
    for name, parameter in policy.module.named_parameters():
        shrink = 0.0 if parameter.dim() == 1 else decay  # norms do not decay
        # In the first step m / (1 - b1) = g and v / (1 - b2) = g^2:
        # w (1 - lr decay) - lr g / (|g| + eps).
        want = before[name] * (1 - 1e-2 * shrink)
        want -= 1e-2 * grads[name] / (grads[name].abs() + 1e-6)
        torch.testing.assert_close(parameter.detach(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_is_rmsprop(policy: Policy, decay: float) -> None:
    config = OptimConfig(OptimizerName.rmsprop, lr=1e-2, weight_decay=decay, alpha=0.75, eps=1e-3)
    optimizer = PolicyOptimizer(policy, config, clip_grad=0.0)
    before = {name: p.detach().clone() for name, p in policy.module.named_parameters()}
    grads = gradients(policy)
    optimizer.step()
    for name, parameter in policy.module.named_parameters():
        # Norms do not decay; the others' decay is part of their gradient.
        g = grads[name] if parameter.dim() == 1 else grads[name] + decay * before[name]
        # v = (1 - 0.75) g^2, so w - lr g / (sqrt(v) + eps) = w - lr g / (|g| / 2 + eps).
        want = before[name] - 1e-2 * g / (g.abs() / 2 + 1e-3)
        torch.testing.assert_close(parameter.detach(), want, rtol=1e-5, atol=1e-6)


def main_weights(policy: Policy) -> dict[str, torch.Tensor]:
    """The float32 weights that the optimizer steps: the model's own, or those behind bf16."""
    named = policy.module.named_parameters()
    return {name: getattr(p, "main_param", p).detach() for name, p in named}


@pytest.mark.parametrize("precision", list(Precision))
def test_steps_equal_those_of_torchs_rmsprop(
    policy: Policy, precision: Precision, llama_folder: Path
) -> None:
    made = in_precision(policy, precision, llama_folder)
    config = OptimConfig(OptimizerName.rmsprop, lr=1e-3, weight_decay=0.1)
    optimizer = PolicyOptimizer(made, config, clip_grad=0.5)
    twins = {n: torch.nn.Parameter(w.clone()) for n, w in main_weights(made).items()}
    norms = [w for w in twins.values() if w.dim() == 1]
    others = [w for w in twins.values() if w.dim() > 1]
    groups = [{"params": norms}, {"params": others, "weight_decay": 0.1}]
    torchs = torch.optim.RMSprop(groups, lr=1e-3)  # alpha 0.99, eps 1e-8: torch's defaults, ours
    for _ in range(4):
        grads = {name: g.float() for name, g in gradients(made).items()}
        optimizer.step()
        assert optimizer.grad_norm == pytest.approx(norm_of(grads), rel=1e-5)
        assert optimizer.grad_norm > 0.5
        for name, twin in twins.items():
            # Megatron's clipping adds 1e-6 to the norm.
            twin.grad = grads[name] * (0.5 / (optimizer.grad_norm + 1e-6))
        torchs.step()
        for name, weight in main_weights(made).items():
            assert torch.equal(weight, twins[name]), name
        for name, parameter in made.module.named_parameters():
            assert torch.equal(parameter, main_weights(made)[name].to(parameter.dtype))


def test_rmsprop_has_the_groups_of_adamw(make_policy: MakePolicy, llama_folder: Path) -> None:
    def groups(name: OptimizerName) -> list[tuple[object, ...]]:
        config = OptimConfig(name, lr=1e-3, weight_decay=0.1)
        optimizer = PolicyOptimizer(make_policy(llama_folder), config, clip_grad=1.0)
        marks = ("wd_mult", "lr_mult", "is_expert_parallel", "lr", "weight_decay", "eps")
        return [
            (*(group[mark] for mark in marks), [p.shape for p in group["params"]])
            for group in optimizer.param_groups
        ]

    found = groups(OptimizerName.rmsprop)
    assert found == groups(OptimizerName.adamw)
    assert sorted(group[4] for group in found) == [0.0, 0.1]  # type: ignore[type-var]


def test_every_step_is_a_new_weight_version(policy: Policy) -> None:
    optimizer = PolicyOptimizer(policy, OptimConfig(lr=1e-3), 1.0)
    assert policy.weight_version == 0
    for expected in (1, 2):
        gradients(policy)
        optimizer.step()
        assert policy.weight_version == expected


def test_scheduler_sets_the_rate_of_every_step(make_policy: MakePolicy, llama_folder: Path) -> None:
    config = OptimConfig(lr=0.5, sched=SchedulerConfig(Scheduler.LinearAnnealing, warmup_steps=2))
    optimizer = PolicyOptimizer(make_policy(llama_folder), config, 1.0)
    scheduler = make_scheduler(optimizer, config, 4)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step()
    # 1/2, 2/2 while warming up, then 1 - 0/2, 1 - 1/2, of 0.5.
    assert [rate[0] for rate in rates] == pytest.approx([0.25, 0.5, 0.5, 0.25])
    assert all(len(set(rate)) == 1 for rate in rates)
