"""SPIN without iterations: the data's answer over a sample of this very step."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_selfpref.algorithms.base import Algorithm, PairMaker, Rollouts, RunContext, register
from nemo_selfpref.algorithms.reference import (
    ONE_STAGE,
    ReferenceConfig,
    check_reference,
    train_settings,
)
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.objectives.objective import DPOObjective
from nemo_selfpref.pairing.builders import PairLimits, target_over_sample
from nemo_selfpref.types import Demonstration, PreferencePair


class FreshPairs(PairMaker):
    """Asks the policy as it is in each step."""

    def pairs(
        self, step: int, rollouts: Rollouts, rows: Sequence[Demonstration]
    ) -> list[PreferencePair]:
        samples = rollouts.sample("answer", [(row.id, row.prompt_ids) for row in rows])
        limits = PairLimits(rollouts.cfg.data.max_length)
        pairs, report = target_over_sample(rows, samples, limits, f"@{step}")
        rollouts.note("pairs", report)
        return pairs


@dataclass
class FreshSPINConfig(ReferenceConfig):
    name: str = "fresh_spin"
    beta: float = 0.1


@register("fresh_spin")
class FreshSPIN(Algorithm):
    summary = "the data's answer over the policy's own, sampled in the step that trains on it"
    paper = "-"
    config_class = FreshSPINConfig

    def check(self, cfg: RunConfig) -> None:
        check_reference(self.config, ONE_STAGE)

    def run(self, run: RunContext) -> None:
        objective, settings = DPOObjective(self.config.beta), train_settings(self.config)
        run.train_online("policy", run.demonstrations(), FreshPairs(), objective, settings)
