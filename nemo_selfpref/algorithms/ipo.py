"""Identity preference optimisation on the pairs of a data set."""

from dataclasses import dataclass

from nemo_selfpref.algorithms.base import Algorithm, RunContext, check_positive, register
from nemo_selfpref.algorithms.reference import (
    ONE_STAGE,
    ReferenceConfig,
    check_reference,
    train_settings,
)
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.objectives.objective import IPOObjective


@dataclass
class IPOConfig(ReferenceConfig):
    name: str = "ipo"
    beta: float = 0.1
    length_normalized: bool = False
    """Divide each log-ratio by its answer's length; the paper sums."""


@register("ipo")
class IPO(Algorithm):
    """(h - 1/(2 beta))^2, h against the reference (Azar et al. 2023, eq. 17)."""

    summary = "identity preference optimisation on given pairs"
    paper = "Azar et al. 2023"
    config_class = IPOConfig

    def check(self, cfg: RunConfig) -> None:
        check_positive("algorithm.beta", self.config.beta)
        check_reference(self.config, ONE_STAGE)

    def run(self, run: RunContext) -> None:
        objective = IPOObjective(self.config.beta, self.config.length_normalized)
        run.train("policy", run.preferences(), objective, train_settings(self.config))
