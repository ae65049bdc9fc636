"""Rejection sampling optimisation: pairs as if drawn from the optimal policy (RSO, section 3).

Answers of the starting policy are accepted with probability exp((r - r_max) / reward_beta), and
the accepted ones make ranked pairs. The paper's reward comes from a trained pairwise model; here r
is the log-odds that the answer beats the blank one, as the frozen starting policy judges.
"""

from dataclasses import dataclass, field

from nemo_selfpref.algorithms.base import Algorithm, RunContext, check_positive, register
from nemo_selfpref.algorithms.candidates import (
    check_reward_beta,
    check_samples,
    pairs_of,
    rejection_sampled,
    sample_candidates,
    score_candidates,
)
from nemo_selfpref.algorithms.judge import JudgeConfig, teach_judging
from nemo_selfpref.algorithms.reference import (
    ONE_STAGE,
    ReferenceConfig,
    check_reference,
    train_settings,
)
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.objectives.objective import DPOObjective
from nemo_selfpref.pairing.ranking import ranked_pairs
from nemo_selfpref.rollout.sampling import seed_of
from nemo_selfpref.types import WeightSet


@dataclass
class RSOConfig(ReferenceConfig):
    name: str = "rso"
    beta: float = 0.05
    num_samples: int = 8
    num_accepted: int = 4
    reward_beta: float = 0.5
    """Temperature of the acceptance; 0 takes the best."""
    drop_truncated_chosen: bool = True
    """Leave out pairs whose better answer ran into rollout.max_new_tokens."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@register("rso")
class RSO(Algorithm):
    summary = "DPO on ranked pairs of its own answers, thinned out by rejection sampling"
    paper = "Liu et al. 2023"
    config_class = RSOConfig

    def check(self, cfg: RunConfig) -> None:
        c = self.config
        check_positive("algorithm.beta", c.beta)
        check_samples(c.num_accepted, name="num_accepted")
        check_samples(c.num_samples, fewest=c.num_accepted)
        check_reward_beta(c.reward_beta)
        c.judge.check()
        check_reference(c, ONE_STAGE)

    def asked_weights(self) -> frozenset[WeightSet]:
        return frozenset({WeightSet.POLICY, WeightSet.FROZEN})

    def run(self, run: RunContext) -> None:
        c, rows = self.config, run.prompt_rows()
        teach_judging(run, c.judge)
        groups = sample_candidates(run, rows, c.num_samples)
        scored = score_candidates(run, c.judge, groups, WeightSet.FROZEN)
        picked = []
        for group in scored:
            seed = seed_of(run.cfg.seed, "accept", group.row.id)
            accepted = rejection_sampled(group, c.num_accepted, c.reward_beta, seed)
            picked += [(accepted, pair) for pair in ranked_pairs(accepted.scores)]
        pairs = pairs_of(run, picked, drop_truncated_chosen=c.drop_truncated_chosen)
        run.train("policy", pairs, DPOObjective(c.beta), train_settings(c))
