"""Several answers to each prompt, and how good the judge finds each: shared by the methods that
choose among samples of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemo_selfpref.algorithms.base import Rollouts, check_positive
from nemo_selfpref.algorithms.judge import Judge, JudgeConfig, Question
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.pairing.builders import PairLimits, make_pair, pair_fault
from nemo_selfpref.pairing.ranking import rejection_sample
from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    FinishReason,
    PreferencePair,
    WeightSet,
)


@dataclass(frozen=True)
class Candidates:
    """Answers to one prompt; `scores` are P(answer beats the blank answer), empty if not asked;
    `judge` names the weights that gave them."""

    row: Demonstration
    answers: tuple[Completion, ...]
    scores: tuple[float, ...] = ()
    judge: WeightSet | None = None

    def facts(self, best: int, worst: int) -> dict[str, Any]:
        """The scores of two of the answers, for a pair's provenance."""
        if not self.scores:
            return {}
        scores = {"scores": [self.scores[best], self.scores[worst]]}
        return scores if self.judge is None else {**scores, "scored_by": self.judge.value}


def check_samples(num: int, fewest: int = 2, name: str = "num_samples") -> None:
    check_positive(f"algorithm.{name}", num)
    if num < fewest:
        raise ConfigError(f"algorithm.{name}={num}: expected at least {fewest} answers a prompt")


def check_reward_beta(reward_beta: float) -> None:
    if reward_beta < 0:
        raise ConfigError(f"algorithm.reward_beta={reward_beta}: expected 0 or more")


def sampled_by(rollouts: Rollouts, **facts: Any) -> dict[str, Any]:
    """Which engine answers, and further facts, for a pair's provenance. Which weights did is told
    with each answer."""
    return {"engine": rollouts.cfg.rollout.engine.value, **facts}


def sample_candidates(
    rollouts: Rollouts,
    rows: Sequence[Demonstration],
    num_samples: int,
    weights: WeightSet = WeightSet.POLICY,
    name: str = "answers",
) -> list[Candidates]:
    """`num_samples` answers to each prompt, with ids ROW/0, ROW/1, ..."""
    prompts = [(f"{row.id}/{k}", row.prompt_ids) for row in rows for k in range(num_samples)]
    found = rollouts.sample(name, prompts, weights=weights)
    groups = [found[i : i + num_samples] for i in range(0, len(found), num_samples)]
    return [Candidates(row, tuple(group)) for row, group in zip(rows, groups, strict=True)]


def score_candidates(
    rollouts: Rollouts,
    config: JudgeConfig,
    candidates: Sequence[Candidates],
    weights: WeightSet,
    name: str = "scores",
) -> list[Candidates]:
    """Each answer against the blank one. A prompt with an answer too long to judge is left out
    and counted."""
    texts = [[rollouts.tokenizer.decode(a.token_ids) for a in c.answers] for c in candidates]
    questions = [
        Question(c.row, text, "")
        for c, group in zip(candidates, texts, strict=True)
        for text in group
    ]
    found = iter(Judge(rollouts, config).strengths(name, questions, weights, "judge/blank"))
    report, scored = DropReport(), []
    for group in candidates:
        scores = [next(found) for _ in group.answers]
        known = tuple(s for s in scores if s is not None)
        if len(known) < len(scores):
            report.drop("judge_prompt_too_long", group.row.source)
            continue
        scored.append(Candidates(group.row, group.answers, known, weights))
    report.kept = len(scored)
    rollouts.note("judged prompts", report)
    return scored


def pairs_of(
    rollouts: Rollouts,
    picked: Sequence[tuple[Candidates, tuple[int, int] | None]],
    suffix: str = "",
    drop_truncated_chosen: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> list[PreferencePair]:
    """Pairs of the answers numbered (chosen, rejected) in each group; those no use to a loss are
    left out and counted, and so is a group with None, whose scores tell nothing apart. `facts`
    join every pair's provenance."""
    known = {**sampled_by(rollouts), **(facts or {})}
    limits = PairLimits(rollouts.cfg.data.max_length, drop_truncated_chosen)
    report, pairs = DropReport(), []
    for group, numbers in picked:
        if numbers is None:
            report.drop("equal_scores", group.row.source)
            continue
        best, worst = numbers
        chosen, rejected = group.answers[best], group.answers[worst]
        fault = pair_fault(group.row.prompt_ids, rejected, chosen, limits)
        if fault is not None:
            report.drop(fault, group.row.source)
            continue
        name = f"{group.row.id}/{best}-{worst}{suffix}"
        own = {**known, **group.facts(best, worst)}
        pairs.append(make_pair(name, group.row, chosen, rejected, own))
    report.kept = len(pairs)
    rollouts.note("pairs", report)
    return pairs


def rejection_sampled(group: Candidates, num: int, reward_beta: float, seed: int) -> Candidates:
    """Those of a prompt's answers that rejection sampling accepts, the best of them first (RSO,
    algorithm 1); the reward is the log-odds of beating the blank answer."""
    rewards = [_log_odds(score) for score in group.scores]
    kept = sorted(rejection_sample(rewards, num, reward_beta, seed), key=lambda i: -rewards[i])
    answers = tuple(group.answers[i] for i in kept)
    scores = tuple(group.scores[i] for i in kept)
    return Candidates(group.row, answers, scores, group.judge)


def _log_odds(p: float) -> float:
    # A judge that is sure gives 0 or 1 in float32; the reward must stay finite.
    p = min(max(p, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))


def imitated(
    rollouts: Rollouts, picked: Sequence[tuple[Candidates, int]], drop_truncated: bool
) -> list[Demonstration]:
    """Demonstrations of the picked answer of each group."""
    report, rows = DropReport(), []
    for group, best in picked:
        answer = group.answers[best]
        if drop_truncated and answer.finish_reason is FinishReason.LENGTH:
            report.drop("truncated", group.row.source)
            continue
        if answer.finish_reason is FinishReason.STOP and len(answer.token_ids) == 1:
            report.drop("empty_response", group.row.source)
            continue
        if len(group.row.prompt_ids) + len(answer.token_ids) > rollouts.cfg.data.max_length:
            report.drop("too_long", group.row.source)
            continue
        text = rollouts.tokenizer.decode(answer.token_ids)
        rows.append(replace(group.row, response_ids=answer.token_ids, response=text))
    report.kept = len(rows)
    rollouts.note("best answers", report)
    return rows
