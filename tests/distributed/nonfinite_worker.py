"""Runs under torchrun (or alone): puts numbers that are not finite into steps of one layout after
another and writes what is found, for test_finite_layouts.py.

    nonfinite_worker.py MODEL OUT LAYOUT [LAYOUT ...]     layouts as for worker.py
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from worker import MICRO_BATCH, ROWS, config, make_policy, make_rows

from nemo_selfpref.checkpoint.hf_weights import HuggingFaceSource
from nemo_selfpref.checkpoint.sharded import TensorSource
from nemo_selfpref.checkpoint.training_state import fill_policy
from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.config.schema import Accelerator
from nemo_selfpref.data.batching import PackedBatch
from nemo_selfpref.data.packing import micro_batches
from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.nonfinite import Trial
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.platform import select_platform
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.objectives.inputs import PassLogps, StepInputs
from nemo_selfpref.objectives.objective import DPOObjective, Loss, Objective, PairLogps, Pass

ROW = 8
"""The row whose numbers are made not finite; its strength is 1 - 8 / 20."""
WEIGHT = "decoder.layers.3.mlp.linear_fc2.weight"


@dataclass(frozen=True)
class Plain(Objective):
    """Minus the log-prob of the chosen answer."""

    passes: ClassVar[frozenset[Pass]] = frozenset({Pass.POLICY})

    def __call__(self, logps: Mapping[Pass, PairLogps], strength: Tensor) -> Loss:
        chosen = logps[Pass.POLICY].chosen
        return Loss(self.of(chosen, strength), torch.ones_like(logps[Pass.POLICY].chosen_len))

    def of(self, chosen: Tensor, strength: Tensor) -> Tensor:
        return -chosen


@dataclass(frozen=True)
class Divided(Plain):
    """The row's loss is infinite."""

    def of(self, chosen: Tensor, strength: Tensor) -> Tensor:
        return chosen / (strength - 0.6)


@dataclass(frozen=True)
class Rooted(Plain):
    """The row's loss is 0, its gradient 0 / 0."""

    def of(self, chosen: Tensor, strength: Tensor) -> Tensor:
        return (chosen * (strength - 0.6)).square().sqrt()


@dataclass(frozen=True)
class Poisoned:
    """A source of weights with one NaN, in the first place of WEIGHT."""

    base: TensorSource

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        part = self.base.read(key, offset, shape).clone()
        if key == WEIGHT and not any(offset):
            part.view(-1)[0] = math.nan
        return part


def cut(policy: Policy, numbers: list[int], alone: bool = False) -> list[PackedBatch]:
    return micro_batches(
        make_rows(),
        numbers,
        replica=0 if alone else policy.layout.data_rank,
        num_replicas=1 if alone else policy.layout.data_size,
        rule=policy.packing_rule(MICRO_BATCH),
        paired=True,
    )


def trial(policy: Policy, objective: Objective, inputs: StepInputs) -> Trial:
    def alone(row: int) -> list[PackedBatch]:
        return cut(policy, [row], alone=True)

    return Trial(cut(policy, list(range(ROWS))), objective, inputs, alone)


def attempt(policy: Policy, of: Trial) -> dict[str, Any]:
    """What every rank finds, which must be the same."""
    metrics = policy.train_batch(of.batches, of.objective, of.inputs)
    finite = policy.finite_step(metrics)
    found = asdict(policy.find_fault(of))
    mine = json.loads(json.dumps({"finite": finite, **found}))
    everyone = parallel.all_gather_json(mine, parallel.world_group(), policy.platform.device())
    assert all(other == mine for other in everyone), everyone
    return mine


def exercise(policy: Policy, model: str) -> dict[str, Any]:
    strength = torch.tensor([row.strength for row in make_rows()])
    inputs = StepInputs(strength)
    of = partial(trial, policy, inputs=inputs)
    optimizer = PolicyOptimizer(policy, OptimConfig(lr=1e-4), 1.0)
    good = of(Plain())
    finite = policy.finite_step(policy.train_batch(good.batches, good.objective, good.inputs))
    optimizer.step()
    scores = torch.linspace(-20, -10, ROWS)
    passes = {Pass.REFERENCE: PassLogps(scores.clone(), scores)}
    passes[Pass.REFERENCE].chosen[ROW] = math.inf
    found = {
        "good": finite,
        "passes": attempt(policy, trial(policy, DPOObjective(0.1), replace(inputs, passes=passes))),
        "loss": attempt(policy, of(Divided())),
        "gradient": attempt(policy, of(Rooted())),
        "clean": policy.nonfinite_weights(),
    }
    fill_policy(policy, Poisoned(HuggingFaceSource(Path(model), policy.arch)))
    return {**found, "weights": attempt(policy, good)}


def main() -> None:
    model, out, *layouts = sys.argv[1:]
    parallel.join(select_platform(Accelerator.auto))
    for text in layouts:
        policy = make_policy(config(text), model)
        found = exercise(policy, model)
        if policy.layout.is_main:
            (Path(out) / f"{text}.json").write_text(json.dumps(found))
        parallel.leave_layout()
    parallel.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
