"""Answers and scores whose log-probs are not numbers never get into training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from nemo_selfpref.config.schema import RolloutConfig, RunConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import RolloutError
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.rollout.engine import FOREVER, RolloutEngine, Until
from nemo_selfpref.training.rollouts import EngineRollouts
from nemo_selfpref.training.session import embedded_engine
from nemo_selfpref.types import (
    Completion,
    GenerationRequest,
    LabelScores,
    SamplingParams,
    TokenIds,
    WeightSet,
)

PROMPTS = [("a", (5, 6)), ("b", (30, 31, 32))]
CFG = RunConfig(name="test", rollout=RolloutConfig(max_new_tokens=4, batch_size=2))


def rollouts(engine: RolloutEngine, tokenizer: ChatTokenizer) -> EngineRollouts:
    return EngineRollouts(CFG, tokenizer, engine, lambda name: None, max_length=20)


@pytest.fixture
def asked(policy: Policy, tokenizer: ChatTokenizer) -> EngineRollouts:
    """The embedded engine on the policy's own weights."""
    engine = embedded_engine(policy, tokenizer.stop_ids, 2, WeightSets(policy))
    return rollouts(engine, tokenizer)


@torch.no_grad()
def poison(policy: Policy, token: int) -> None:
    """The states after this token are NaN, and so are all log-probs given them."""
    policy.module.get_parameter("embedding.word_embeddings.weight")[token] = math.nan


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_refused_by_name(
    policy: Policy, asked: EngineRollouts, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CFG.rollout, "temperature", temperature)
    assert len(asked.sample("draft", PROMPTS)) == 2
    poison(policy, 31)
    policy.weight_version = 7
    with pytest.raises(RolloutError) as found:
        asked.sample("draft", PROMPTS)
    assert "draft: the answer to b came with a log-prob that is not finite" in str(found.value)
    assert "rollout.engine=embedded, weights policy version 7" in str(found.value)
    assert len(asked.sample("draft", PROMPTS[:1])) == 1


def test_scores_are_refused_by_number(policy: Policy, asked: EngineRollouts) -> None:
    prompts = [prompt for _, prompt in PROMPTS]
    assert len(asked.label_scores("judge", prompts, (8, 9))) == 2
    poison(policy, 31)
    with pytest.raises(RolloutError, match=r"judge: the labels of question 1 have log-probs \(nan"):
        asked.label_scores("judge", prompts, (8, 9))


class Scores:
    """An engine that gives what it was made with."""

    def __init__(self, found: LabelScores) -> None:
        self.found = found

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: Callable[[int, int], None] | None = None,
        until: Until = FOREVER,
    ) -> list[Completion]:
        raise RolloutError("it weighs labels only")

    def label_scores(
        self,
        prompts: Sequence[TokenIds],
        labels: TokenIds,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: Callable[[int, int], None] | None = None,
        until: Until = FOREVER,
    ) -> list[LabelScores]:
        return [self.found] * len(prompts)


def ask(tokenizer: ChatTokenizer, *logprobs: float, best: float = -0.1) -> list[LabelScores]:
    engine = rollouts(Scores(LabelScores(logprobs, best)), tokenizer)
    return engine.label_scores("judge", [(5,)], (8, 9), weights=WeightSet.FROZEN)


def test_a_label_that_cannot_come_is_the_methods_affair(tokenizer: ChatTokenizer) -> None:
    (scores,) = ask(tokenizer, -math.inf, -1.0)
    assert scores.logprobs == (-math.inf, -1.0)
    assert ask(tokenizer, 1e-6, -1.0, best=1e-6)  # rounding


@pytest.mark.parametrize(
    ("logprobs", "best"),
    [((math.nan, -1.0), -0.1), ((math.inf, -1.0), -0.1), ((-1.0, 0.5), -0.1), ((-1.0,), math.nan)],
)
def test_what_is_no_log_prob_is_refused(
    tokenizer: ChatTokenizer, logprobs: tuple[float, ...], best: float
) -> None:
    with pytest.raises(RolloutError, match="weights frozen: expected numbers up to 0"):
        ask(tokenizer, *logprobs, best=best)
