"""Copies beside a distributed optimizer, and copies in the CPU's memory. One process: the parts are
whole weights then, but every step of cutting, sharing and joining is taken; two are in
tests/distributed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import in_precision
from torch import Tensor

from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.data.batching import collate
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import SFTObjective
from nemo_selfpref.types import WeightSet

ROWS = [((5, 6, 7), (8, 9, 2)), ((5, 6), (8, 11, 12, 2))]


def average_over_steps(made: Policy) -> tuple[WeightSets, list[Tensor], list[float]]:
    """Two steps of training with an EMA; the weights as trained and the scores under the EMA."""
    optimizer = PolicyOptimizer(made, OptimConfig(lr=1e-2), clip_grad=1.0)
    weights = WeightSets(made)
    weights.take(WeightSet.EMA, WeightSet.POLICY)
    for _ in range(2):
        batch = collate(ROWS, [0, 1], paired=False)
        made.train_batch([batch], SFTObjective(), StepInputs(torch.ones(2)))
        optimizer.step()
        weights.average(0.9)
    with weights.using(WeightSet.EMA):
        scored = made.score(ROWS).sums.tolist()
    return weights, [p.detach().clone() for p in made.module.parameters()], scored


@pytest.mark.parametrize("setting", ["use_distributed_optimizer", "copies_on_cpu"])
@pytest.mark.parametrize("precision", list(Precision))
def test_an_average_is_the_same(
    policy: Policy, precision: Precision, setting: str, llama_folder: Path
) -> None:
    plain = average_over_steps(in_precision(policy, precision, llama_folder))
    other = average_over_steps(in_precision(policy, precision, llama_folder, **{setting: True}))
    assert plain[2] == other[2]
    for ours, theirs in zip(plain[1], other[1], strict=True):
        assert torch.equal(ours, theirs)
    states = [weights.sharded_state_dict(WeightSet.EMA) for weights, *_ in (plain, other)]
    for key, _ in policy.module.named_parameters():
        first, second = (state[key].data for state in states)
        assert first.dtype == second.dtype == torch.float32 and torch.equal(first, second), key


@pytest.mark.parametrize("precision", list(Precision))
def test_the_average_starts_from_and_follows_float32_main_weights(
    policy: Policy, precision: Precision, llama_folder: Path
) -> None:
    made = in_precision(policy, precision, llama_folder, use_distributed_optimizer=True)
    optimizer = PolicyOptimizer(made, OptimConfig(lr=1e-2), clip_grad=1.0)
    weights = WeightSets(made)
    weights.take(WeightSet.EMA, WeightSet.POLICY)
    made.train_batch(
        [collate(ROWS, [0, 1], paired=False)], SFTObjective(), StepInputs(torch.ones(2))
    )
    optimizer.step()
    weights.average(0.0)  # the EMA becomes the main weights
    parameters = list(made.module.parameters())
    ema = weights._main.whole(parameters, weights._copies[WeightSet.EMA])
    for value, parameter in zip(ema, parameters, strict=True):
        # Rounded to the network's precision they are its weights; before that, not always.
        assert torch.equal(value.to(parameter.dtype), parameter)
    exact = all(torch.equal(v, p.float()) for v, p in zip(ema, parameters, strict=True))
    assert exact is (precision is Precision.fp32)


def test_a_lagged_copy_of_a_split_average(policy: Policy, llama_folder: Path) -> None:
    made = in_precision(policy, Precision.fp32, llama_folder, use_distributed_optimizer=True)
    weights = average_over_steps(made)[0]
    before = [p.detach().clone() for p in made.module.parameters()]
    weights.take(WeightSet.LAGGED, WeightSet.EMA)
    with weights.using(WeightSet.EMA):
        ema = made.score(ROWS).sums.tolist()
    with weights.using(WeightSet.LAGGED):
        assert made.score(ROWS).sums.tolist() == ema
    assert all(torch.equal(a, b) for a, b in zip(before, made.module.parameters(), strict=True))
