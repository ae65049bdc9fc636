"""Supervised fine-tuning: imitate the answers of the data set."""

from dataclasses import dataclass

from nemo_selfpref.algorithms.base import Algorithm, RunContext, register
from nemo_selfpref.algorithms.reference import REFERENCE_FREE, check_ref
from nemo_selfpref.config.schema import AlgorithmConfig, RefMode, RunConfig
from nemo_selfpref.objectives.objective import SFTObjective


@dataclass
class SFTConfig(AlgorithmConfig):
    name: str = "sft"
    ref: RefMode = RefMode.none


@register("sft")
class SFT(Algorithm):
    """-log pi(y|x), averaged over the response tokens of the global batch."""

    summary = "supervised fine-tuning on the answers of the data set"
    paper = "-"
    config_class = SFTConfig

    def check(self, cfg: RunConfig) -> None:
        check_ref(self.config.ref, REFERENCE_FREE)

    def run(self, run: RunContext) -> None:
        run.train("policy", run.demonstrations(), SFTObjective())
