"""What the trainer asks of a loss: the passes it needs, and unreduced losses with metrics.

The trainer sums `loss` and divides by the global sum of `weight` (pairs, or tokens for SFT), so
the gradient does not depend on how a batch is cut into micro-batches or replicas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from nemo_selfpref.objectives import losses


class Pass(StrEnum):
    """A forward pass whose log-probs a loss uses."""

    POLICY = "policy"
    REFERENCE = "reference"


@dataclass(frozen=True)
class PairLogps:
    """Log-prob sums of one pass, already reduced over tensor parallelism, float32.

    chosen, rejected: [B] sums over response tokens, end-of-turn included, prompt excluded.
    chosen_len, rejected_len: int64 [B] response lengths. full_chosen, full_chosen_len: the same
    for prompt and response together. For demonstrations the rejected side is empty, shape [0].
    """

    chosen: Tensor
    chosen_len: Tensor
    rejected: Tensor
    rejected_len: Tensor
    full_chosen: Tensor
    full_chosen_len: Tensor


@dataclass(frozen=True)
class Loss:
    """Unreduced result: loss float32 [B], weight int64 [B], metrics of float32 [B] each."""

    loss: Tensor
    weight: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """A loss with its settings."""

    passes: ClassVar[frozenset[Pass]]
    paired: ClassVar[bool] = True
    """Whether it needs a rejected answer."""

    @abstractmethod
    def __call__(self, logps: Mapping[Pass, PairLogps]) -> Loss:
        """Unreduced loss and metrics of one micro-batch."""


def _ones(like: Tensor) -> Tensor:
    return torch.ones(like.shape, dtype=torch.int64, device=like.device)


def _pair_metrics(policy: PairLogps) -> dict[str, Tensor]:
    return {
        "logps/chosen": policy.chosen.detach(),
        "logps/rejected": policy.rejected.detach(),
        "lengths/chosen": policy.chosen_len.float(),
        "lengths/rejected": policy.rejected_len.float(),
    }


def _reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
    }


@dataclass(frozen=True)
class SFTObjective(Objective):
    """Negative log-likelihood of the response, per response token."""

    passes: ClassVar[frozenset[Pass]] = frozenset({Pass.POLICY})
    paired: ClassVar[bool] = False

    def __call__(self, logps: Mapping[Pass, PairLogps]) -> Loss:
        policy = logps[Pass.POLICY]
        return Loss(
            -policy.chosen, policy.chosen_len, {"lengths/chosen": policy.chosen_len.float()}
        )


@dataclass(frozen=True)
class DPOObjective(Objective):
    """DPO; with label_smoothing > 0, conservative DPO."""

    beta: float
    label_smoothing: float = 0.0
    passes: ClassVar[frozenset[Pass]] = frozenset({Pass.POLICY, Pass.REFERENCE})

    def __call__(self, logps: Mapping[Pass, PairLogps]) -> Loss:
        policy, ref = logps[Pass.POLICY], logps[Pass.REFERENCE]
        h = losses.log_ratio_difference(policy.chosen, policy.rejected, ref.chosen, ref.rejected)
        rewards = _reward_metrics(
            self.beta * (policy.chosen - ref.chosen), self.beta * (policy.rejected - ref.rejected)
        )
        return Loss(
            losses.dpo_loss(h, self.beta, self.label_smoothing),
            _ones(h),
            rewards | _pair_metrics(policy),
        )


@dataclass(frozen=True)
class IPOObjective(Objective):
    """IPO on log-prob sums, or on per-token means with length_normalized."""

    beta: float
    length_normalized: bool = False
    passes: ClassVar[frozenset[Pass]] = frozenset({Pass.POLICY, Pass.REFERENCE})

    def __call__(self, logps: Mapping[Pass, PairLogps]) -> Loss:
        policy, ref = logps[Pass.POLICY], logps[Pass.REFERENCE]
        chosen = losses.widen(policy.chosen) - losses.widen(ref.chosen)
        rejected = losses.widen(policy.rejected) - losses.widen(ref.rejected)
        if self.length_normalized:
            chosen, rejected = chosen / policy.chosen_len, rejected / policy.rejected_len
        h = chosen - rejected
        rewards = _reward_metrics(self.beta * chosen, self.beta * rejected)
        return Loss(losses.ipo_loss(h, self.beta), _ones(h), rewards | _pair_metrics(policy))


class NLLScope(Enum):
    """Which tokens of the chosen sequence ORPO's likelihood term covers."""

    full = "full"
    response = "response"


@dataclass(frozen=True)
class ORPOObjective(Objective):
    """ORPO: likelihood of the chosen answer plus lambda times the odds-ratio term."""

    lam: float
    nll_scope: NLLScope = NLLScope.full
    passes: ClassVar[frozenset[Pass]] = frozenset({Pass.POLICY})

    def __call__(self, logps: Mapping[Pass, PairLogps]) -> Loss:
        policy = logps[Pass.POLICY]
        mean_chosen = losses.widen(policy.chosen) / policy.chosen_len
        mean_rejected = losses.widen(policy.rejected) / policy.rejected_len
        nll = -mean_chosen
        if self.nll_scope is NLLScope.full:
            nll = -policy.full_chosen / policy.full_chosen_len
        log_odds = losses.log_odds_difference(mean_chosen, mean_rejected)
        rewards = _reward_metrics(self.lam * mean_chosen, self.lam * mean_rejected)
        extra = {"nll_loss": nll.detach(), "log_odds_chosen": log_odds.detach()}
        return Loss(
            losses.orpo_loss(nll, log_odds, self.lam),
            _ones(log_odds),
            rewards | _pair_metrics(policy) | extra,
        )
