"""Self-generated preference optimisation: one model is policy and improver (SGPO, section 3).

Step 1 teaches the starting policy to improve its own drafts, from an external model's targets.
Step 2 pairs each answer of that policy with its own improvement, which sees the reference answer,
and trains DPO on the plain prompt. The reference is never in the improver's training prompt: it
would learn to copy (section 3.1).
"""

from dataclasses import dataclass, field
from functools import partial

from nemo_selfpref.algorithms.base import (
    Algorithm,
    RunContext,
    TrainSettings,
    check_positive,
    register,
)
from nemo_selfpref.algorithms.improver import (
    ImproverConfig,
    improver_rows,
    refinement_prompts,
    target_requests,
)
from nemo_selfpref.config.schema import AlgorithmConfig, RunConfig
from nemo_selfpref.objectives.objective import DPOObjective, SFTObjective
from nemo_selfpref.pairing.builders import PairLimits, improved_over_draft
from nemo_selfpref.rollout.targets import TargetsConfig, check_targets, make_teacher


@dataclass
class SGPOConfig(AlgorithmConfig):
    name: str = "sgpo"
    beta: float = 0.01
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    improver: ImproverConfig = field(default_factory=ImproverConfig)
    target_prompt: str = "sgpo_target"
    improve_prompt: str = "sgpo_improve"
    refine_prompt: str = "sgpo_refine"
    drop_truncated_chosen: bool = True
    """Leave out pairs whose improved answer ran into rollout.max_new_tokens."""


@register("sgpo")
class SGPO(Algorithm):
    summary = "one model drafts and improves its own answers; DPO on improved over draft"
    paper = "SGPO (self-generated preference optimisation based on self-improver)"
    config_class = SGPOConfig

    def check(self, cfg: RunConfig) -> None:
        check_positive("algorithm.beta", self.config.beta)
        check_targets(self.config.targets)
        self.config.improver.check(cfg)

    def run(self, run: RunContext) -> None:
        cfg, demos = self.config, run.demonstrations()
        learners = demos[: cfg.improver.num_prompts]

        drafts = run.sample("draft", [(d.id, d.prompt_ids) for d in learners])
        questions = target_requests(run, learners, drafts, cfg.target_prompt)
        answers = run.ask("targets", partial(make_teacher, cfg.targets), questions)
        rows = improver_rows(run, learners, drafts, answers, cfg.improve_prompt)
        settings = TrainSettings(
            cfg.improver.max_epochs, cfg.improver.global_batch_size, cfg.improver.optim
        )
        run.train("improver", rows, SFTObjective(), settings)

        replies = run.sample("answer", [(d.id, d.prompt_ids) for d in demos])
        prompts = refinement_prompts(run, demos, replies, cfg.refine_prompt)
        improved = run.sample("improve", prompts)
        limits = PairLimits(run.cfg.data.max_length, cfg.drop_truncated_chosen)
        pairs, report = improved_over_draft(demos, replies, improved, limits)
        run.note("pairs", report)
        run.train("policy", pairs, DPOObjective(cfg.beta))
