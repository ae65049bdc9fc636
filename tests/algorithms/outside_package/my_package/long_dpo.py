"""DPO on pairs whose chosen answer is long."""

from dataclasses import dataclass

from nemo_selfpref.algorithms.base import Algorithm, RunContext, check_positive, register
from nemo_selfpref.algorithms.reference import (
    ONE_STAGE,
    ReferenceConfig,
    check_reference,
    train_settings,
)
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.objectives.objective import DPOObjective
from nemo_selfpref.types import DropReport


@dataclass
class LongDPOConfig(ReferenceConfig):
    name: str = "long_dpo"
    beta: float = 0.1
    min_tokens: int = 20


@register("long_dpo")
class LongDPO(Algorithm):
    summary = "DPO on pairs whose chosen answer is long"
    paper = "-"
    config_class = LongDPOConfig

    def check(self, cfg: RunConfig) -> None:
        check_positive("algorithm.beta", self.config.beta)
        check_reference(self.config, ONE_STAGE)

    def run(self, run: RunContext) -> None:
        report, pairs = DropReport(), []
        for pair in run.preferences():
            if len(pair.chosen_ids) < self.config.min_tokens:
                report.drop("short_chosen", str(pair.provenance["source"]))
                continue
            pairs.append(pair)
        report.kept = len(pairs)
        run.note("long pairs", report)
        run.train("policy", pairs, DPOObjective(self.config.beta), train_settings(self.config))
