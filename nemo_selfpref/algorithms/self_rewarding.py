"""Self-rewarding language model: DPO on the best over the worst of its own answers (Yuan et al.).

Iteration t samples several answers to each prompt and the same weights judge them. The paper asks
its judge for a mark out of five; here an answer's mark is the probability that it beats the blank
answer, read in two orders, as OSP does for a fair comparison (its section 4.2).
"""

from dataclasses import dataclass, field

from nemo_selfpref.algorithms.base import Algorithm, RunContext, check_positive, register
from nemo_selfpref.algorithms.candidates import (
    check_samples,
    pairs_of,
    sample_candidates,
    score_candidates,
)
from nemo_selfpref.algorithms.judge import JudgeConfig, teach_judging
from nemo_selfpref.algorithms.reference import (
    ITERATED,
    ReferenceConfig,
    check_reference,
    train_settings,
)
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.objectives.objective import DPOObjective
from nemo_selfpref.pairing.ranking import best_and_worst
from nemo_selfpref.types import WeightSet


@dataclass
class SelfRewardingConfig(ReferenceConfig):
    name: str = "self_rewarding"
    iterations: int = 2
    beta: float = 0.1
    num_samples: int = 4
    drop_truncated_chosen: bool = True
    """Leave out pairs whose better answer ran into rollout.max_new_tokens."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@register("self_rewarding")
class SelfRewarding(Algorithm):
    summary = "the best over the worst of its own answers by its own judgement, iterated"
    paper = "Yuan et al. 2024"
    config_class = SelfRewardingConfig

    def check(self, cfg: RunConfig) -> None:
        check_positive("algorithm.iterations", self.config.iterations)
        check_positive("algorithm.beta", self.config.beta)
        check_samples(self.config.num_samples)
        self.config.judge.check()
        check_reference(self.config, ITERATED)

    def asked_weights(self) -> frozenset[WeightSet]:
        return frozenset({WeightSet.POLICY})

    def run(self, run: RunContext) -> None:
        c, rows = self.config, run.prompt_rows()
        teach_judging(run, c.judge)
        for t in range(c.iterations):
            groups = sample_candidates(run, rows, c.num_samples, name=f"answers-{t}")
            scored = score_candidates(run, c.judge, groups, WeightSet.POLICY, f"scores-{t}")
            picked = [(group, best_and_worst(group.scores)) for group in scored]
            facts = {"iteration": t}
            pairs = pairs_of(run, picked, f"@{t}", c.drop_truncated_chosen, facts)
            name = "policy" if t == c.iterations - 1 else f"policy-{t}"
            run.train(name, pairs, DPOObjective(c.beta), train_settings(c))
