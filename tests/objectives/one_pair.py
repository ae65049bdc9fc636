"""What the tests of the objectives share: every objective, evaluated on one pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import settings
from torch import Tensor
from vectors import REFINED

from nemo_selfpref.objectives.objective import (
    DPOObjective,
    IPOObjective,
    Loss,
    NLLScope,
    Objective,
    ORPOObjective,
    PairLogps,
    Pass,
    SPCEObjective,
    SrDPOObjective,
    SrIPOObjective,
)

Four = tuple[float, float, float, float]
"""Policy chosen, policy rejected, reference chosen, reference rejected."""

USUAL: Four = (-42.5, -50.25, -45.0, -48.0)
"""Log-ratios 2.5 and -2.25, h = 4.75."""


repeatable = settings(derandomize=True, deadline=None)


def with_reference(beta: float) -> list[Objective]:
    return [
        DPOObjective(beta),
        IPOObjective(beta),
        SPCEObjective(beta),
        SrDPOObjective(beta, 0.5),
        SrIPOObjective(beta, 0.5),
        SrIPOObjective(beta, 0.5, delta_beta=False),
    ]


EVERY_PAIRED = [
    *with_reference(0.1),
    DPOObjective(0.1, 0.2),
    IPOObjective(0.1, length_normalized=True),
    SrIPOObjective(0.1, 0.5, length_normalized=True),
    ORPOObjective(0.1),
    ORPOObjective(0.1, NLLScope.response),
]


@dataclass(frozen=True)
class Evaluated:
    """A loss of one pair; gradients by the policy's chosen and rejected log-probs, and by the
    four log-probs of the refined passes."""

    result: Loss
    chosen: float
    rejected: float
    refined: list[float]

    @property
    def value(self) -> float:
        return self.result.loss.item()

    @property
    def metrics(self) -> dict[str, float]:
        return {name: value.item() for name, value in self.result.metrics.items()}


def pair_logps(chosen: Tensor, rejected: Tensor, lengths: tuple[int, int]) -> PairLogps:
    """Pairs whose prompt is three tokens long and costs -6."""
    count = chosen.shape[0]
    return PairLogps(
        chosen=chosen,
        chosen_len=torch.full((count,), lengths[0]),
        rejected=rejected,
        rejected_len=torch.full((count,), lengths[1]),
        full_chosen=chosen - 6.0,
        full_chosen_len=torch.full((count,), lengths[0] + 3),
    )


def evaluate(
    objective: Objective,
    values: Four,
    lengths: tuple[int, int] = (10, 12),
    dtype: torch.dtype = torch.float64,
    *,
    strength: float = 1.0,
    refined: Four = REFINED,
) -> Evaluated:
    """`objective` given the passes that it asks for, and no other."""
    plain = [torch.tensor([v], dtype=dtype, requires_grad=True) for v in values]
    augmented = [torch.tensor([v], dtype=dtype, requires_grad=True) for v in refined]
    passes = {
        Pass.POLICY: pair_logps(plain[0], plain[1], lengths),
        Pass.REFERENCE: pair_logps(plain[2], plain[3], lengths),
        Pass.REFINED: pair_logps(augmented[0], augmented[1], lengths),
        Pass.REFINED_REFERENCE: pair_logps(augmented[2], augmented[3], lengths),
    }
    result = objective(
        {name: passes[name] for name in objective.passes}, torch.tensor([strength], dtype=dtype)
    )
    inputs = [*plain[:2], *augmented]
    grads = torch.autograd.grad(result.loss.sum(), inputs, allow_unused=True)
    chosen, rejected, *rest = [0.0 if grad is None else grad.item() for grad in grads]
    return Evaluated(result, chosen, rejected, rest)
