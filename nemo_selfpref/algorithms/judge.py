"""The model as a judge: which of two answers is better, from the probabilities of two labels.

The verdict is read off the next-token distribution at a fixed place, never out of generated text,
so no answer can phrase itself into a verdict; and every pair is asked in both orders (OSP, B.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nemo_selfpref.algorithms.base import (
    Rollouts,
    RunContext,
    TrainSettings,
    check_positive,
    instruction_text,
)
from nemo_selfpref.config.checks import check_optim
from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError, RolloutError
from nemo_selfpref.objectives.objective import SFTObjective
from nemo_selfpref.pairing.ranking import Average, strength_of_orders
from nemo_selfpref.types import (
    Demonstration,
    DropReport,
    LabelScores,
    PreferencePair,
    TokenIds,
    WeightSet,
)

JUDGE_SLOTS = frozenset({"instruction", "response_a", "response_b"})
TIE = 0.01
"""Strengths this close to 1/2 count as ties."""


@dataclass
class AugmentationConfig:
    """Teaching the model to judge before it does: SFT on judge prompts made of preference pairs,
    every other pair with its answers swapped (OSP, section 3.2)."""

    num_pairs: int = 0
    """How many pairs to teach with; 0 does without."""
    path: list[str] | None = None
    """Files of preference pairs; null takes data.train_path."""
    max_epochs: int = 1
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))


@dataclass
class JudgeConfig:
    prompt: str = "judge_helpful"
    """A template of conf/prompts, or the path of one."""
    opening: str = "RESPONSE"
    """What the judge's answer begins with; the label A or B follows."""
    average: Average = Average.probability
    """How the two orders are joined: as probabilities or as logits."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def check(self) -> None:
        """Raise ConfigError for settings out of range."""
        if self.augmentation.num_pairs < 0:
            raise ConfigError("algorithm.judge.augmentation.num_pairs: expected 0 (off) or more")
        check_positive("algorithm.judge.augmentation.max_epochs", self.augmentation.max_epochs)
        check_optim("algorithm.judge.augmentation.optim", self.augmentation.optim)
        if not self.opening.strip():
            raise ConfigError(
                "algorithm.judge.opening is empty: expected the word before the label, as RESPONSE"
            )


class Question(NamedTuple):
    """Which is the better answer to the row's instruction?"""

    row: Demonstration | PreferencePair
    first: str
    second: str


class Labels(NamedTuple):
    """The beginning of a verdict, up to its label, and the two label tokens."""

    opening: TokenIds
    a: int
    b: int


def find_labels(tokenizer: ChatTokenizer, opening: str) -> Labels:
    """The labels as this tokenizer writes them behind the opening: "A" or " A", whichever it is.

    Raises:
        ConfigError: the two verdicts do not differ in one token and no more.
    """
    asked = [{"role": "user", "content": "?"}]
    a, b = (tokenizer.encode_response(asked, f"{opening} {label}") for label in "AB")
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if same is None or a[same + 1 :] != b[same + 1 :]:
        raise ConfigError(
            f"algorithm.judge.opening={opening!r}: no one token tells A from B behind it"
        )
    return Labels(a[:same], a[same], b[same])


class Verdict(NamedTuple):
    """P(first beats second): both orders joined, and as read off each (the first answer is A, then
    B)."""

    strength: float
    orders: tuple[float, float]


class Judge:
    """Asks for verdicts through `rollouts` and logs how far they can be trusted."""

    def __init__(self, rollouts: Rollouts, config: JudgeConfig) -> None:
        self.rollouts, self.config = rollouts, config
        self.template = rollouts.template(config.prompt, JUDGE_SLOTS)
        self.labels = find_labels(rollouts.tokenizer, config.opening)

    def prompt(self, row: Demonstration | PreferencePair, a: str, b: str) -> TokenIds:
        """A judge prompt that ends where the label comes."""
        return self.question(row, a, b) + self.labels.opening

    def question(self, row: Demonstration | PreferencePair, a: str, b: str) -> TokenIds:
        """The same up to where the judge's own turn begins."""
        text = self.template.render(instruction=instruction_text(row), response_a=a, response_b=b)
        return self.rollouts.encode_user(row, text)

    def strengths(
        self,
        name: str,
        questions: Sequence[Question],
        weights: WeightSet,
        metrics: str = "judge",
    ) -> list[float | None]:
        """The strength of each of `verdicts`."""
        found = self.verdicts(name, questions, weights, metrics)
        return [None if verdict is None else verdict.strength for verdict in found]

    def verdicts(
        self,
        name: str,
        questions: Sequence[Question],
        weights: WeightSet,
        metrics: str = "judge",
    ) -> list[Verdict | None]:
        """P(first beats second) of each question, over both orders; None where a prompt is too
        long for the model. How far the verdicts can be trusted is logged under `metrics`."""
        prompts = [(self.prompt(*q), self.prompt(q.row, q.second, q.first)) for q in questions]
        asked = [all(self.rollouts.fits(p, 0) for p in both) for both in prompts]
        flat = [p for both, ok in zip(prompts, asked, strict=True) if ok for p in both]
        labels = (self.labels.a, self.labels.b)
        scores = self.rollouts.label_scores(name, flat, labels, weights=weights)
        verdicts = list(zip(scores[::2], scores[1::2], strict=True))
        found = [self._verdict(*verdict) for verdict in verdicts]
        if verdicts:
            shares = reliability(verdicts, [verdict.strength for verdict in found])
            self.rollouts.log({f"{metrics}/{share}": value for share, value in shares.items()})
        answers = iter(found)
        return [next(answers) if ok else None for ok in asked]

    def _verdict(self, forward: LabelScores, backward: LabelScores) -> Verdict:
        values = (*forward.logprobs, *backward.logprobs)
        if not all(math.isfinite(v) for v in values):
            raise RolloutError(f"the judge's label log-probs are {values}: expected finite numbers")
        a, b = forward.logprobs, backward.logprobs
        strength = strength_of_orders((a[0], a[1]), (b[0], b[1]), self.config.average)
        return Verdict(strength, (_share_of_a(forward), 1.0 - _share_of_a(backward)))


def reliability(
    verdicts: Sequence[tuple[LabelScores, LabelScores]], strengths: Sequence[float]
) -> Mapping[str, float]:
    """Shares over the questions: how much A is favoured whichever answer it is, orders that
    contradict each other, ties, and passes whose likeliest next token is neither label."""
    shares = [[_share_of_a(s) for s in both] for both in verdicts]
    passes = [s for both in verdicts for s in both]
    count = len(verdicts)
    return {
        "position_bias": sum(sum(both) / 2 - 0.5 for both in shares) / count,
        "disagreement": sum((x > 0.5) == (y > 0.5) for x, y in shares) / count,
        "ties": sum(abs(s - 0.5) < TIE for s in strengths) / count,
        "parse_failures": sum(max(s.logprobs) < s.best for s in passes) / len(passes),
    }


def _share_of_a(scores: LabelScores) -> float:
    a, b = scores.logprobs
    return 1.0 / (1.0 + math.exp(min(b - a, 700.0)))


def teach_judging(run: RunContext, config: JudgeConfig) -> None:
    """Judge augmentation, where it is switched on; the frozen weights are then those after it."""
    settings = config.augmentation
    if settings.num_pairs == 0:
        return
    judge, report, rows = Judge(run, config), DropReport(), []
    for pair in run.preferences(settings.path):
        if len(rows) == settings.num_pairs:
            break
        row = _lesson(run, judge, pair, better_first=len(rows) % 2 == 0)
        if len(row.prompt_ids) + len(row.response_ids) > run.cfg.data.max_length:
            report.drop("too_long", row.source)
            continue
        rows.append(row)
    report.kept = len(rows)
    run.note("judge lessons", report)
    train = TrainSettings(max_epochs=settings.max_epochs, optim=settings.optim)
    run.train("judge", rows, SFTObjective(), train)
    run.freeze()


def _lesson(
    run: RunContext, judge: Judge, pair: PreferencePair, better_first: bool
) -> Demonstration:
    texts = [run.tokenizer.decode(ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
    a, b = texts if better_first else reversed(texts)
    verdict = f"{judge.config.opening} {'A' if better_first else 'B'}"
    prompt = judge.question(pair, a, b)
    answer = run.tokenizer.encode_response([{"role": "user", "content": "?"}], verdict)
    source = str(pair.provenance.get("source", pair.id))
    return Demonstration(f"{pair.id}/judge", pair.messages, prompt, answer, verdict, source)
