"""Pairs of the policy's own answers with a judged strength, made anew in every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from nemo_selfpref.algorithms.base import PairMaker, Rollouts
from nemo_selfpref.algorithms.candidates import (
    Candidates,
    check_reward_beta,
    check_samples,
    pairs_of,
    rejection_sampled,
    sample_candidates,
    sampled_by,
    score_candidates,
)
from nemo_selfpref.algorithms.judge import Judge, JudgeConfig, Question
from nemo_selfpref.algorithms.reference import ReferenceConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.pairing.builders import PairLimits, target_over_sample
from nemo_selfpref.pairing.ranking import (
    best_and_worst,
    random_pairs,
    ranked_pairs,
    target_from_difference,
)
from nemo_selfpref.rollout.sampling import seed_of
from nemo_selfpref.types import Demonstration, DropReport, PreferencePair, WeightSet

Pairing = Enum("Pairing", ["ranked", "random", "raft", "spin"])
Sampling = Enum("Sampling", ["on_policy", "sft", "rso", "offline"])
Target = Enum("Target", ["judge", "difference"])


@dataclass
class JudgedConfig(ReferenceConfig):
    num_samples: int = 7
    pairing: Pairing = Pairing.ranked
    """ranked: best with worst, second with second to last, ...; random; raft: the best alone, for
    loss sft; spin: the data's answer over each sample."""
    sampling: Sampling = Sampling.on_policy
    """on_policy; sft: from the frozen weights; rso: those, thinned out by rejection sampling to
    half; offline: the pairs of the data set."""
    target: Target = Target.judge
    """The strength trained on: the judge's own for the pair, or sigmoid of the difference of the
    two answers' scores against the blank one (eq. 12)."""
    reward_beta: float = 0.5
    """Temperature of rejection sampling (sampling rso)."""
    drop_truncated_chosen: bool = False
    """Leave out pairs whose better answer ran into rollout.max_new_tokens. Off: the strength says
    how much better it is, cut off or not."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)


def check_judged(config: JudgedConfig, soft: bool) -> None:
    """Raise ConfigError for settings that contradict each other; soft: the loss uses strengths."""
    check_samples(config.num_samples, fewest=4 if config.sampling is Sampling.rso else 2)
    check_reward_beta(config.reward_beta)
    config.judge.check()
    if not soft and (config.pairing is Pairing.random or config.target is Target.difference):
        raise ConfigError(
            "algorithm.pairing=random and algorithm.target=difference say how much an answer is "
            "better only through the strength, which this loss does not read. Use loss=spce."
        )
    by_pairing = config.pairing in (Pairing.ranked, Pairing.random)
    if config.target is Target.difference and not by_pairing:
        raise ConfigError(
            f"algorithm.target=difference scores two samples, pairing={config.pairing.name} has "
            "one a pair. Use pairing ranked or random, or target=judge."
        )
    if config.sampling is Sampling.offline and (
        config.pairing is not Pairing.ranked or config.target is not Target.judge
    ):
        raise ConfigError(
            "algorithm.sampling=offline takes the data's pairs as they are; leave pairing=ranked "
            "and target=judge"
        )


def pairs_per_prompt(config: JudgedConfig) -> int:
    """How many pairs a prompt makes at most."""
    samples = config.num_samples // 2 if config.sampling is Sampling.rso else config.num_samples
    each = {Pairing.raft: 1, Pairing.spin: samples}
    return each.get(config.pairing, samples // 2)


def asked_by_judged(config: JudgedConfig, soft: bool) -> frozenset[WeightSet]:
    """Which weights answer and judge."""
    judged = frozenset({WeightSet.FROZEN} if soft else set())
    if config.sampling is Sampling.offline:
        return judged
    scored = config.pairing in (Pairing.ranked, Pairing.raft)
    answerer = WeightSet.POLICY if config.sampling is Sampling.on_policy else WeightSet.FROZEN
    return judged | {answerer, *([WeightSet.FROZEN] if scored else [])}


class JudgedPairs(PairMaker):
    """OSP's pairs (section 3.2, algorithm 1). The judge is the frozen policy.

    soft: whether the loss uses the strength; without, no pair is judged.
    """

    def __init__(self, config: JudgedConfig, soft: bool) -> None:
        self.config, self.soft = config, soft

    def pairs(
        self, step: int, rollouts: Rollouts, rows: Sequence[Demonstration]
    ) -> list[PreferencePair]:
        c = self.config
        on_policy = c.sampling is Sampling.on_policy
        weights = WeightSet.POLICY if on_policy else WeightSet.FROZEN
        groups = sample_candidates(rollouts, rows, c.num_samples, weights)
        if self._scored:
            groups = score_candidates(rollouts, c.judge, groups, WeightSet.FROZEN)
        if c.sampling is Sampling.rso:
            groups = [self._thinned(step, rollouts, group) for group in groups]
        if c.pairing is Pairing.spin:
            pairs = _over_samples(rollouts, groups, step)
        else:
            picked = [(g, pair) for g in groups for pair in self._numbers(step, rollouts, g)]
            kept, facts = c.drop_truncated_chosen, {"step": step}
            pairs = pairs_of(rollouts, picked, f"@{step}", kept, facts)
        if not self.soft:
            return pairs
        if c.target is Target.difference:
            return [_by_difference(pair) for pair in pairs]
        return with_strength(rollouts, c.judge, rows, pairs)

    @property
    def _scored(self) -> bool:
        c = self.config
        by_score = c.pairing in (Pairing.ranked, Pairing.raft)
        return by_score or c.sampling is Sampling.rso or c.target is Target.difference

    def _thinned(self, step: int, rollouts: Rollouts, group: Candidates) -> Candidates:
        seed = seed_of(rollouts.cfg.seed, "accept", step, group.row.id)
        return rejection_sampled(group, len(group.answers) // 2, self.config.reward_beta, seed)

    def _numbers(
        self, step: int, rollouts: Rollouts, group: Candidates
    ) -> Sequence[tuple[int, int] | None]:
        """(chosen, rejected) numbers of one prompt's answers; None for answers all alike."""
        if self.config.pairing is Pairing.random:
            seed = seed_of(rollouts.cfg.seed, "pairing", step, group.row.id)
            return random_pairs(len(group.answers), seed)
        if self.config.pairing is Pairing.raft:
            return [best_and_worst(group.scores)]
        return ranked_pairs(group.scores)


def _over_samples(
    rollouts: Rollouts, groups: Sequence[Candidates], step: int
) -> list[PreferencePair]:
    rows = [group.row for group in groups for _ in group.answers]
    answers = [answer for group in groups for answer in group.answers]
    limits = PairLimits(rollouts.cfg.data.max_length)
    known = sampled_by(rollouts, step=step)
    pairs, report = target_over_sample(rows, answers, limits, f"@{step}", lambda _: known)
    rollouts.note("pairs", report)
    return pairs


def _by_difference(pair: PreferencePair) -> PreferencePair:
    return replace(pair, strength=target_from_difference(*pair.provenance["scores"]))


def with_strength(
    rollouts: Rollouts,
    config: JudgeConfig,
    rows: Sequence[Demonstration | PreferencePair],
    pairs: Sequence[PreferencePair],
) -> list[PreferencePair]:
    """The pairs with the judge's P(chosen beats rejected), which may lie below 1/2, and in their
    provenance that of each order; a pair too long to judge is left out and counted."""
    row_of = {row.prompt_ids: row for row in rows}
    decode = rollouts.tokenizer.decode
    questions = [
        Question(row_of[p.prompt_ids], decode(p.chosen_ids), decode(p.rejected_ids)) for p in pairs
    ]
    found = Judge(rollouts, config).verdicts("strengths", questions, WeightSet.FROZEN)
    report, judged = DropReport(), []
    for pair, verdict in zip(pairs, found, strict=True):
        if verdict is None:
            report.drop("judge_prompt_too_long", str(pair.provenance.get("source", pair.id)))
            continue
        orders, by = list(verdict.orders), WeightSet.FROZEN.value
        facts = sampled_by(rollouts, orders=orders, weight_set=by)
        provenance = {**pair.provenance, "judge": facts}
        judged.append(replace(pair, strength=verdict.strength, provenance=provenance))
    report.kept = len(judged)
    rollouts.note("judged pairs", report)
    return judged
