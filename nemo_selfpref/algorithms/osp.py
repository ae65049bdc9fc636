"""Online self-preferring: soft preferences between the policy's own answers (OSP, section 3).

Each step samples K answers to a prompt, the frozen starting policy scores each against the blank
answer, best is paired with worst and so on inwards, the same judge gives each pair a strength p,
and the policy learns p by cross-entropy. Eq. 8 lacks its minus and eqs. 6 and 7 a parenthesis;
p is taken from the judge directly (eq. 12 is `target: difference`) and is not clipped at 1/2.
"""

from dataclasses import dataclass
from enum import Enum

from nemo_selfpref.algorithms.base import Algorithm, RunContext, check_positive, register
from nemo_selfpref.algorithms.judge import teach_judging
from nemo_selfpref.algorithms.judged import (
    JudgedConfig,
    JudgedPairs,
    Pairing,
    Sampling,
    asked_by_judged,
    check_judged,
    pairs_per_prompt,
    with_strength,
)
from nemo_selfpref.algorithms.reference import (
    ONE_STAGE,
    REFERENCE_FREE,
    check_reference,
    train_settings,
)
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import (
    DPOObjective,
    IPOObjective,
    SFTObjective,
    SPCEObjective,
)
from nemo_selfpref.types import WeightSet

SoftLoss = Enum("SoftLoss", ["spce", "dpo", "ipo", "sft"])


@dataclass
class OSPConfig(JudgedConfig):
    name: str = "osp"
    loss: SoftLoss = SoftLoss.spce
    """spce; dpo and ipo take the better answer as simply better; sft goes with pairing raft."""
    beta: float = 0.1


@register("osp")
class OSP(Algorithm):
    summary = "K answers a prompt, ranked and weighed by the frozen policy; soft cross-entropy"
    paper = "Zhai et al. 2024 (OSP)"
    config_class = OSPConfig

    def check(self, cfg: RunConfig) -> None:
        c, imitates = self.config, self.config.loss is SoftLoss.sft
        check_positive("algorithm.beta", c.beta)
        check_judged(c, soft=c.loss is SoftLoss.spce)
        if imitates != (c.pairing is Pairing.raft):
            raise ConfigError("algorithm.loss=sft and algorithm.pairing=raft go together only")
        check_reference(c, REFERENCE_FREE if imitates else ONE_STAGE)

    def asked_weights(self) -> frozenset[WeightSet]:
        return asked_by_judged(self.config, soft=self.config.loss is SoftLoss.spce)

    def run(self, run: RunContext) -> None:
        c, soft = self.config, self.config.loss is SoftLoss.spce
        losses = {"spce": SPCEObjective, "dpo": DPOObjective, "ipo": IPOObjective}
        objective = SFTObjective() if c.loss is SoftLoss.sft else losses[c.loss.name](c.beta)
        teach_judging(run, c.judge)
        settings = train_settings(c)
        if c.sampling is Sampling.offline:
            pairs = run.preferences()
            pairs = with_strength(run, c.judge, pairs, pairs) if soft else pairs
            run.train("policy", pairs, objective, settings)
            return
        rows = run.demonstrations() if c.pairing is Pairing.spin else run.prompt_rows()
        prompts = max(run.cfg.model.global_batch_size // pairs_per_prompt(c), 1)
        run.train_online("policy", rows, JudgedPairs(c, soft), objective, settings, prompts)
