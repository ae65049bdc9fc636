"""Odds-ratio preference optimisation on the pairs of a data set, without a reference."""

from dataclasses import dataclass

from nemo_selfpref.algorithms.base import Algorithm, RunContext, register
from nemo_selfpref.algorithms.reference import REFERENCE_FREE, check_ref
from nemo_selfpref.config.schema import AlgorithmConfig, RefMode, RunConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import NLLScope, ORPOObjective


@dataclass
class ORPOConfig(AlgorithmConfig):
    name: str = "orpo"
    ref: RefMode = RefMode.none
    lam: float = 0.1
    """Weight lambda of the odds-ratio term."""
    nll: NLLScope = NLLScope.full
    """Tokens of the likelihood term: prompt and response, or the response only."""


@register("orpo")
class ORPO(Algorithm):
    """NLL(y+) - lambda logsigmoid(log odds ratio) (Hong et al. 2024, eq. 6). No reference model is
    built or kept."""

    summary = "odds-ratio preference optimisation on given pairs, reference-free"
    paper = "Hong et al. 2024"
    config_class = ORPOConfig

    def check(self, cfg: RunConfig) -> None:
        check_ref(self.config.ref, REFERENCE_FREE)
        if self.config.lam < 0:
            raise ConfigError(f"algorithm.lam={self.config.lam}: expected 0 or more, such as 0.1")

    def run(self, run: RunContext) -> None:
        objective = ORPOObjective(self.config.lam, self.config.nll)
        run.train("policy", run.preferences(), objective)
