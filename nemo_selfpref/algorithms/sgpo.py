"""Self-generated preference optimisation: one model is policy and improver (SGPO, section 3).

Step 1 teaches the starting policy to improve its own drafts, from an external model's targets.
Step 2 pairs each answer of that policy with its own improvement, which sees the reference answer,
and trains DPO on the plain prompt. The reference is never in the improver's training prompt: it
would learn to copy (section 3.1). The variants of section 4 switch off one choice or two.
"""

from functools import partial
from typing import Any

from nemo_selfpref.algorithms.base import Algorithm, RunContext, check_positive, register
from nemo_selfpref.algorithms.candidates import sampled_by
from nemo_selfpref.algorithms.improver import Filtered, refinement_prompts, teach_improving
from nemo_selfpref.algorithms.reference import ITERATED, check_reference, train_settings
from nemo_selfpref.algorithms.sgpo_variants import VARIANTS, Choices, SGPOConfig, check_variant
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.objectives.objective import DPOObjective
from nemo_selfpref.pairing.builders import PairLimits, improved_over_draft, target_over_sample
from nemo_selfpref.rollout.targets import check_targets, make_teacher
from nemo_selfpref.types import Demonstration, PreferencePair, WeightSet


@register("sgpo")
class SGPO(Algorithm):
    summary = "one model drafts and improves its own answers; DPO on improved over draft"
    paper = "SGPO: self-generated preference optimisation based on self-improver"
    config_class = SGPOConfig

    def check(self, cfg: RunConfig) -> None:
        check_positive("algorithm.beta", self.config.beta)
        check_targets(self.config.targets)
        self.config.improver.check(cfg)
        check_variant(self.config.variant, self.config.extra_step2)
        check_reference(self.config, ITERATED)

    def asked_weights(self) -> frozenset[WeightSet]:
        separate = VARIANTS[self.config.variant].separate
        return frozenset({WeightSet.POLICY, *([WeightSet.FROZEN] if separate else [])})

    def run(self, run: RunContext) -> None:
        c, choices, demos = self.config, VARIANTS[self.config.variant], run.demonstrations()
        prompt = c.improve_prompt or choices.improve_prompt
        teacher = partial(make_teacher, c.targets)
        filtered = teach_improving(
            run, demos, c.improver, teacher, c.target_prompt, prompt, choices.kinds
        )
        for n in range(1 + c.extra_step2):
            suffix = f"-{n + 1}" if n else ""
            pairs = self._pairs(run, demos, choices, suffix, filtered)
            if choices.separate:
                run.reset_policy()
            run.train(f"policy{suffix}", pairs, DPOObjective(c.beta), train_settings(c))

    def _pairs(
        self,
        run: RunContext,
        demos: list[Demonstration],
        choices: Choices,
        suffix: str,
        filtered: Filtered,
    ) -> list[PreferencePair]:
        known = sampled_by(run)

        def facts(row: Demonstration) -> dict[str, Any]:
            return {**known, **filtered.facts(row)}

        answerer = WeightSet.FROZEN if choices.separate else WeightSet.POLICY
        plain = [(d.id, d.prompt_ids) for d in demos]
        replies = run.sample(f"answer{suffix}", plain, weights=answerer)
        limits = PairLimits(run.cfg.data.max_length, self.config.drop_truncated_chosen)
        if choices.improved_chosen:
            template = self.config.refine_prompt or choices.refine_prompt
            prompts = refinement_prompts(run, demos, replies, template)
            improved = run.sample(f"improve{suffix}", prompts)
            pairs, report = improved_over_draft(demos, replies, improved, limits, facts)
        else:
            pairs, report = target_over_sample(demos, replies, limits, facts=facts)
        run.note(f"pairs{suffix}", report)
        return pairs
