"""Reward-ranked fine-tuning: imitate the best of one's own answers (RAFT, section 3).

The paper ranks by a reward model; here the frozen starting policy judges, by the probability that
an answer beats the blank one. Each iteration samples from the policy of the one before.
"""

from dataclasses import dataclass, field

from nemo_selfpref.algorithms.base import Algorithm, RunContext, check_positive, register
from nemo_selfpref.algorithms.candidates import (
    check_samples,
    imitated,
    sample_candidates,
    score_candidates,
)
from nemo_selfpref.algorithms.judge import JudgeConfig, teach_judging
from nemo_selfpref.algorithms.reference import REFERENCE_FREE, check_ref
from nemo_selfpref.config.schema import AlgorithmConfig, RefMode, RunConfig
from nemo_selfpref.objectives.objective import SFTObjective
from nemo_selfpref.types import WeightSet


@dataclass
class RAFTConfig(AlgorithmConfig):
    name: str = "raft"
    iterations: int = 1
    num_samples: int = 8
    drop_truncated: bool = True
    """Do not imitate answers that ran into rollout.max_new_tokens."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    ref: RefMode = RefMode.none


@register("raft")
class RAFT(Algorithm):
    summary = "supervised fine-tuning on the best of its own answers, by its own judgement"
    paper = "Dong et al. 2023"
    config_class = RAFTConfig

    def check(self, cfg: RunConfig) -> None:
        check_positive("algorithm.iterations", self.config.iterations)
        check_samples(self.config.num_samples)
        self.config.judge.check()
        check_ref(self.config.ref, REFERENCE_FREE)

    def asked_weights(self) -> frozenset[WeightSet]:
        return frozenset({WeightSet.POLICY, WeightSet.FROZEN})

    def run(self, run: RunContext) -> None:
        c, rows = self.config, run.prompt_rows()
        teach_judging(run, c.judge)
        for t in range(c.iterations):
            groups = sample_candidates(run, rows, c.num_samples, name=f"answers-{t}")
            scored = score_candidates(run, c.judge, groups, WeightSet.FROZEN, f"scores-{t}")
            best = [(g, g.scores.index(max(g.scores))) for g in scored]
            name = "policy" if t == c.iterations - 1 else f"policy-{t}"
            run.train(name, imitated(run, best, c.drop_truncated), SFTObjective())
