"""Self-refining DPO on the pairs of a data set (Sr-DPO, section 3.3).

The margin of the same answers under a prompt that asks for a better one joins the loss as a target
that carries no gradient. The paper reports lower margins with refinement; the sign of its eq. 13,
kept here, predicts higher ones, and a pilot found them.
"""

from dataclasses import dataclass

from nemo_selfpref.algorithms.base import Algorithm, RunContext, register
from nemo_selfpref.algorithms.reference import train_settings
from nemo_selfpref.algorithms.refinement import (
    RefinementConfig,
    augmented_pairs,
    check_refinement,
)
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.objectives.objective import SrDPOObjective


@dataclass
class SrDPOConfig(RefinementConfig):
    name: str = "sr_dpo"


@register("sr_dpo")
class SrDPO(Algorithm):
    """-logsigmoid(beta h - lambda sg[Delta]), Delta = beta h(p (+) x) (eq. 13)."""

    summary = "DPO refined by the model's own margin under a prompt that asks for more"
    paper = "Yu et al. 2024 (Sr-DPO)"
    config_class = SrDPOConfig

    def check(self, cfg: RunConfig) -> None:
        check_refinement(self.config)

    def run(self, run: RunContext) -> None:
        c = self.config
        pairs = augmented_pairs(run, c.augment_prompt)
        run.train("policy", pairs, SrDPOObjective(c.beta, c.lam), train_settings(c))
