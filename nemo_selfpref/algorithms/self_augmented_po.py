"""Self-augmented preference optimisation: online and off-policy (SAPO, section 3).

Every optimizer step an EMA of the policy regenerates a segment of each answer, the spliced answers
join a FIFO replay buffer as rejected ones, and the policy trains on a draw from it by DPO or ORPO.
Algorithm 1 feeds A and B to the EMA model; text, figure and code feed A alone, and so do we. Pairs
whose segment came out as it was are dropped. Elsewhere "SAPO" also names another method.
"""

from dataclasses import dataclass
from enum import Enum

from nemo_selfpref.algorithms.base import Algorithm, RunContext, check_positive, register
from nemo_selfpref.algorithms.reference import (
    ONE_STAGE,
    REFERENCE_FREE,
    ReferenceConfig,
    check_reference,
    train_settings,
)
from nemo_selfpref.algorithms.spliced import SplicedPairs
from nemo_selfpref.config.schema import RefMode, RunConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import DPOObjective, ORPOObjective
from nemo_selfpref.types import WeightSet

PairLoss = Enum("PairLoss", ["dpo", "orpo"])
Sampler = Enum("Sampler", ["ema", "policy"])


@dataclass
class SAPOConfig(ReferenceConfig):
    name: str = "self_augmented_po"
    loss: PairLoss = PairLoss.dpo
    beta: float = 0.1
    """Of loss dpo."""
    lam: float = 0.05
    """Weight of the odds-ratio term of loss orpo."""
    ref: RefMode = RefMode.ema
    sampler: Sampler = Sampler.ema
    """Who regenerates; policy is on-policy and trains on each step's own pairs, with no buffer."""
    segment: bool = True
    """Regenerate a segment; false regenerates the whole answer."""
    segment_length: int = 256
    replay_capacity: int | None = None
    """Pairs in the replay buffer; null is 2000."""


@register("self_augmented_po")
class SelfAugmentedPO(Algorithm):
    summary = "an EMA of the policy regenerates segments of good answers; DPO or ORPO from replay"
    paper = "Yin et al. 2024 (SAPO)"
    config_class = SAPOConfig

    def check(self, cfg: RunConfig) -> None:
        c, given = self.config, self.config.replay_capacity
        for name in ("beta", "lam", "segment_length"):
            check_positive(f"algorithm.{name}", getattr(c, name))
        refused = REFERENCE_FREE if c.loss is PairLoss.orpo else ONE_STAGE
        check_reference(c, refused, samples_ema=c.sampler is Sampler.ema)
        check_positive("algorithm.replay_capacity", 1 if given is None else given)
        if given is not None and c.sampler is Sampler.policy:
            raise ConfigError("algorithm.replay_capacity: sampler=policy has no replay buffer")
        longest = cfg.rollout.max_new_tokens
        if c.segment and c.segment_length > longest:
            raise ConfigError(
                f"algorithm.segment_length={c.segment_length}: rollout.max_new_tokens={longest} "
                "would cut segments short. Lower the first or raise the second."
            )

    def asked_weights(self) -> frozenset[WeightSet]:
        on_policy = self.config.sampler is Sampler.policy
        return frozenset({WeightSet.POLICY if on_policy else WeightSet.EMA})

    def run(self, run: RunContext) -> None:
        c, on_policy = self.config, self.config.sampler is Sampler.policy
        capacity = 2000 if c.replay_capacity is None else c.replay_capacity
        maker = SplicedPairs(
            WeightSet.POLICY if on_policy else WeightSet.EMA,
            c.segment_length if c.segment else None,
            None if on_policy else capacity,
        )
        objective = DPOObjective(c.beta) if c.loss is PairLoss.dpo else ORPOObjective(c.lam)
        settings = train_settings(c, samples_ema=not on_policy)
        run.train_online("policy", run.demonstrations(), maker, objective, settings)
