"""Direct preference optimisation on the pairs of a data set."""

from dataclasses import dataclass

from nemo_selfpref.algorithms.base import Algorithm, RunContext, check_positive, register
from nemo_selfpref.algorithms.reference import (
    ONE_STAGE,
    ReferenceConfig,
    check_reference,
    train_settings,
)
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import DPOObjective


@dataclass
class DPOConfig(ReferenceConfig):
    name: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    """Probability that a label is wrong (cDPO); 0 is plain DPO, and it must stay below 0.5."""


@register("dpo")
class DPO(Algorithm):
    """-logsigmoid(beta h), h against the reference (Rafailov et al. 2023, eq. 7)."""

    summary = "direct preference optimisation on given pairs; label_smoothing gives cDPO"
    paper = "Rafailov et al. 2023"
    config_class = DPOConfig

    def check(self, cfg: RunConfig) -> None:
        check_positive("algorithm.beta", self.config.beta)
        check_reference(self.config, ONE_STAGE)
        if not 0 <= self.config.label_smoothing < 0.5:
            raise ConfigError(
                f"algorithm.label_smoothing={self.config.label_smoothing}: expected 0 <= e < 0.5 "
                "(at 0.5 the labels carry nothing)"
            )

    def run(self, run: RunContext) -> None:
        objective = DPOObjective(self.config.beta, self.config.label_smoothing)
        run.train("policy", run.preferences(), objective, train_settings(self.config))
