"""EmbeddedEngine.label_scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import PROMPTS, Catcher, Caught, engine
from tiny import scale

from nemo_selfpref.errors import RolloutError
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.types import LabelScores, WeightSet

LABELS = (7, 2, 311)


@torch.no_grad()
def huggingface_label_scores(folder: Path) -> list[LabelScores]:
    """Of every prompt by transformers, one at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    scores = []
    for ids in PROMPTS.values():
        logprobs = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        labels = tuple(float(logprobs[label]) for label in LABELS)
        scores.append(LabelScores(labels, float(logprobs.max())))
    return scores


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_label_scores_equal_transformers(
    policy: Policy, llama_folder: Path, batch_size: int
) -> None:
    want = huggingface_label_scores(llama_folder)
    found = engine(policy, batch_size).label_scores(list(PROMPTS.values()), LABELS)
    assert len(found) == 5
    for ours, theirs in zip(found, want, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
        assert ours.best == pytest.approx(theirs.best, abs=1e-4)


def test_the_best_is_a_label_where_one_is_likeliest(policy: Policy) -> None:
    every = engine(policy).label_scores([PROMPTS["a"]], tuple(range(500)))[0]
    assert every.best == max(every.logprobs)
    likeliest = every.logprobs.index(every.best)
    (found,) = engine(policy).label_scores([PROMPTS["a"]], (likeliest, 7))
    assert found.logprobs[0] == found.best > found.logprobs[1]


def test_label_scores_of_a_weight_set(policy: Policy) -> None:
    weights = WeightSets(policy)
    weights.take(WeightSet.FROZEN, WeightSet.POLICY)
    judge = engine(policy, weights=weights)
    prompts = list(PROMPTS.values())
    before = judge.label_scores(prompts, LABELS)
    scale(policy, 1.5)
    assert judge.label_scores(prompts, LABELS, WeightSet.FROZEN) == before
    assert judge.label_scores(prompts, LABELS) != before
    with pytest.raises(RolloutError, match="no ema weights are held here"):
        judge.label_scores(prompts, LABELS, WeightSet.EMA)


def test_replicas_share_the_labels(policy: Policy) -> None:
    prompts = list(PROMPTS.values())
    whole = engine(policy).label_scores(prompts, LABELS)
    found: dict[int, list[float]] = {}
    for replica in range(2):
        shared = engine(policy)
        shared.replica, shared.num_replicas = replica, 2
        seen = shared._gather = Catcher()
        with pytest.raises(Caught):
            shared.label_scores(prompts, LABELS)
        found |= {int(i): row for i, row in seen.value.items()}
    assert sorted(found) == [0, 1, 2, 3, 4]
    for i, score in enumerate(whole):
        assert found[i] == pytest.approx([*score.logprobs, score.best], abs=1e-5)


def test_prompts_of_labels_are_checked(policy: Policy) -> None:
    assert engine(policy).label_scores([], LABELS) == []
    assert len(engine(policy).label_scores([(5,) * 64], LABELS)) == 1
    with pytest.raises(RolloutError, match="prompt 1 is empty"):
        engine(policy).label_scores([(5,), ()], LABELS)
    with pytest.raises(RolloutError, match="prompt 0 has 65 tokens"):
        engine(policy).label_scores([(5,) * 65], LABELS)


def test_progress_counts_judgements(policy: Policy) -> None:
    seen: list[tuple[int, int]] = []
    engine(policy, 2).label_scores(
        list(PROMPTS.values()), LABELS, on_done=lambda *done: seen.append(done)
    )
    assert seen == [(2, 0), (2, 0), (1, 0)]
