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

from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives import losses


class Pass(StrEnum):
    """A forward pass whose log-probs a loss uses. Only POLICY carries a graph."""

    POLICY = "policy"
    REFERENCE = "reference"
    REFINED = "refined"
    """The policy on the prompt-augmented prompt: the same answers, another query."""
    REFINED_REFERENCE = "refined_reference"


_WITH_REFERENCE = frozenset({Pass.POLICY, Pass.REFERENCE})
_WITH_REFINEMENT = _WITH_REFERENCE | {Pass.REFINED, Pass.REFINED_REFERENCE}


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
    def __call__(self, logps: Mapping[Pass, PairLogps], strength: Tensor) -> Loss:
        """Unreduced loss and metrics of one micro-batch.

        Args:
            logps: log-probs of every pass in `passes`.
            strength: float32 [B] P(chosen beats rejected); ones for dataset pairs and for
                demonstrations. Losses of hard preferences do not look at it.
        """


@dataclass(frozen=True)
class AnswerScores:
    """A number for each answer of each pair: chosen, rejected float [B]."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected

    def times(self, factor: float) -> AnswerScores:
        return AnswerScores(factor * self.chosen, factor * self.rejected)


def _log_ratios(
    policy: PairLogps, reference: PairLogps, length_normalized: bool = False
) -> AnswerScores:
    """Log-ratios to the reference; their margin is h. Per response token if length_normalized."""
    chosen = losses.log_ratio(policy.chosen, reference.chosen)
    rejected = losses.log_ratio(policy.rejected, reference.rejected)
    if length_normalized:
        return AnswerScores(chosen / policy.chosen_len, rejected / policy.rejected_len)
    return AnswerScores(chosen, rejected)


def _pair_loss(
    loss: Tensor,
    policy: PairLogps,
    rewards: AnswerScores,
    extra: Mapping[str, Tensor] | None = None,
) -> Loss:
    """Loss [B] of one weight a pair, with the metrics every paired loss has (TRL's names)."""
    metrics = {
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/margins": rewards.margin,
        "rewards/accuracies": (rewards.chosen > rewards.rejected).float(),
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
        "lengths/chosen": policy.chosen_len.float(),
        "lengths/rejected": policy.rejected_len.float(),
        **(extra or {}),
    }
    weight = torch.ones(loss.shape, dtype=torch.int64, device=loss.device)
    return Loss(loss, weight, {name: value.detach() for name, value in metrics.items()})


@dataclass(frozen=True)
class SFTObjective(Objective):
    """Negative log-likelihood of the response, per response token."""

    passes: ClassVar[frozenset[Pass]] = frozenset({Pass.POLICY})
    paired: ClassVar[bool] = False

    def __call__(self, logps: Mapping[Pass, PairLogps], strength: Tensor) -> Loss:
        policy = logps[Pass.POLICY]
        return Loss(
            -policy.chosen, policy.chosen_len, {"lengths/chosen": policy.chosen_len.float()}
        )


@dataclass(frozen=True)
class DPOObjective(Objective):
    """DPO; with label_smoothing > 0, conservative DPO."""

    beta: float
    label_smoothing: float = 0.0
    passes: ClassVar[frozenset[Pass]] = _WITH_REFERENCE

    def __call__(self, logps: Mapping[Pass, PairLogps], strength: Tensor) -> Loss:
        policy = logps[Pass.POLICY]
        ratios = _log_ratios(policy, logps[Pass.REFERENCE])
        loss = losses.dpo_loss(ratios.margin, self.beta, self.label_smoothing)
        return _pair_loss(loss, policy, ratios.times(self.beta))


@dataclass(frozen=True)
class IPOObjective(Objective):
    """IPO on log-prob sums, or on per-token means with length_normalized."""

    beta: float
    length_normalized: bool = False
    passes: ClassVar[frozenset[Pass]] = _WITH_REFERENCE

    def __call__(self, logps: Mapping[Pass, PairLogps], strength: Tensor) -> Loss:
        policy = logps[Pass.POLICY]
        ratios = _log_ratios(policy, logps[Pass.REFERENCE], self.length_normalized)
        loss = losses.ipo_loss(ratios.margin, self.beta)
        return _pair_loss(loss, policy, ratios.times(self.beta))


@dataclass(frozen=True)
class SPCEObjective(Objective):
    """OSP's soft-preference cross-entropy: the strength of each pair is its target."""

    beta: float
    passes: ClassVar[frozenset[Pass]] = _WITH_REFERENCE

    def __call__(self, logps: Mapping[Pass, PairLogps], strength: Tensor) -> Loss:
        policy = logps[Pass.POLICY]
        ratios = _log_ratios(policy, logps[Pass.REFERENCE])
        rewards = ratios.times(self.beta)
        loss = losses.spce_loss(ratios.margin, strength, self.beta)
        extra = {"strength": strength, "strength/predicted": torch.sigmoid(rewards.margin)}
        return _pair_loss(loss, policy, rewards, extra)


def _refinement_metrics(h: Tensor, augmented: Tensor) -> dict[str, Tensor]:
    """Of h [B] under the plain and under the augmented prompt, neither scaled by beta."""
    return {
        "marginal": h,
        "augmented/marginal": augmented,
        "augmented/accuracies": (augmented > 0).float(),
    }


@dataclass(frozen=True)
class SrDPOObjective(Objective):
    """Sr-DPO: DPO whose margin has to exceed lambda times the refined margin."""

    beta: float
    lam: float
    passes: ClassVar[frozenset[Pass]] = _WITH_REFINEMENT

    def __call__(self, logps: Mapping[Pass, PairLogps], strength: Tensor) -> Loss:
        policy = logps[Pass.POLICY]
        ratios = _log_ratios(policy, logps[Pass.REFERENCE])
        h = ratios.margin
        augmented = _log_ratios(logps[Pass.REFINED], logps[Pass.REFINED_REFERENCE]).margin
        loss = losses.sr_dpo_loss(h, self.beta * augmented, self.beta, self.lam)
        extra = _refinement_metrics(h, augmented)
        return _pair_loss(loss, policy, ratios.times(self.beta), extra)


@dataclass(frozen=True)
class SrIPOObjective(Objective):
    """Sr-IPO: IPO whose target is raised by lambda times the refined margin. delta_beta keeps the
    beta of that margin (eq. 12); length_normalized makes both margins of per-token means."""

    beta: float
    lam: float
    delta_beta: bool = True
    length_normalized: bool = False
    passes: ClassVar[frozenset[Pass]] = _WITH_REFINEMENT

    def __post_init__(self) -> None:
        if self.lam * (self.beta if self.delta_beta else 1.0) == 1.0:
            raise ConfigError(
                f"Sr-IPO is singular: got lam = {self.lam} with delta_beta = "
                f"{str(self.delta_beta).lower()} and beta = {self.beta}, expected lam times the "
                "factor of Delta other than 1. Where the prompt changes nothing, h(p+x) = h(x), "
                "the loss is the constant 1/(4 beta^2) and h grows for ever. Set delta_beta = "
                "true, the paper's eq. 12, or a lam such as 0.3."
            )

    def __call__(self, logps: Mapping[Pass, PairLogps], strength: Tensor) -> Loss:
        policy = logps[Pass.POLICY]
        ratios = _log_ratios(policy, logps[Pass.REFERENCE], self.length_normalized)
        h = ratios.margin
        augmented = _log_ratios(
            logps[Pass.REFINED], logps[Pass.REFINED_REFERENCE], self.length_normalized
        ).margin
        delta = self.beta * augmented if self.delta_beta else augmented
        loss = losses.sr_ipo_loss(h, delta, self.beta, self.lam)
        extra = _refinement_metrics(h, augmented)
        return _pair_loss(loss, policy, ratios.times(self.beta), extra)


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

    def __call__(self, logps: Mapping[Pass, PairLogps], strength: Tensor) -> Loss:
        policy = logps[Pass.POLICY]
        means = AnswerScores(
            losses.widen(policy.chosen) / policy.chosen_len,
            losses.widen(policy.rejected) / policy.rejected_len,
        )
        nll = -means.chosen
        if self.nll_scope is NLLScope.full:
            nll = -losses.widen(policy.full_chosen) / policy.full_chosen_len
        log_odds = losses.log_odds_difference(means.chosen, means.rejected)
        extra = {"nll_loss": nll, "log_odds_chosen": log_odds}
        loss = losses.orpo_loss(nll, log_odds, self.lam)
        return _pair_loss(loss, policy, means.times(self.lam), extra)
