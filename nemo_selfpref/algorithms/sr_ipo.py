"""Self-refining IPO on the pairs of a data set (Sr-IPO, section 3.3).

Delta keeps its beta, as eq. 12 and algorithm 2 print it; `delta_beta: false` drops it, which is
what Proposition 3.4 derives, and with lambda = 1 would leave nothing to train.
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
from nemo_selfpref.objectives.objective import SrIPOObjective


@dataclass
class SrIPOConfig(RefinementConfig):
    name: str = "sr_ipo"
    delta_beta: bool = True
    length_normalized: bool = False
    """Divide each log-ratio, Delta's too, by its answer's length."""


@register("sr_ipo")
class SrIPO(Algorithm):
    """(h - lambda sg[Delta] - 1/(2 beta))^2, Delta = beta h(p (+) x) (eqs. 12 and 15)."""

    summary = "IPO refined by the model's own margin under a prompt that asks for more"
    paper = "Yu et al. 2024 (Sr-IPO)"
    config_class = SrIPOConfig

    def check(self, cfg: RunConfig) -> None:
        check_refinement(self.config)
        self._objective()

    def _objective(self) -> SrIPOObjective:
        c = self.config
        return SrIPOObjective(c.beta, c.lam, c.delta_beta, c.length_normalized)

    def run(self, run: RunContext) -> None:
        pairs = augmented_pairs(run, self.config.augment_prompt)
        run.train("policy", pairs, self._objective(), train_settings(self.config))
