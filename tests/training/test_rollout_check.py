from __future__ import annotations

import math

import pytest
import torch
from tiny import scale

from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import RolloutError
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.scoring import response_token_logprobs
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.training.rollout_check import RolloutCheck, compare, spread
from nemo_selfpref.training.session import embedded_engine
from nemo_selfpref.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    WeightSet,
)

PROMPTS = [(5, 6, 7), (30, 31), (40,), (9, 8, 7, 6, 5)]


def answer(*logprobs: float) -> Completion:
    ids = tuple(range(5, 5 + len(logprobs)))
    return Completion("a", ids, logprobs, FinishReason.LENGTH, WeightSet.POLICY, 3)


def sampled(policy: Policy, tokenizer: ChatTokenizer) -> list[tuple[tuple[int, ...], Completion]]:
    engine = embedded_engine(policy, tokenizer.stop_ids, batch_size=2)
    requests = [GenerationRequest(str(i), p, seed=i) for i, p in enumerate(PROMPTS)]
    found = engine.generate(requests, SamplingParams(9))
    return list(zip(PROMPTS, found, strict=True))


@pytest.mark.parametrize(
    ("count", "wanted", "expected"),
    [(10, 3, [0, 3, 6]), (3, 8, [0, 1, 2]), (4, 0, []), (0, 8, []), (8, 8, list(range(8)))],
)
def test_spread(count: int, wanted: int, expected: list[int]) -> None:
    assert spread(count, wanted) == expected


def test_compare_by_hand() -> None:
    pairs = [(answer(-1.0, -2.0), [-1.5, -2.0]), (answer(-1.0), [-0.75])]
    found = compare(pairs)
    assert found["rollout/logprob_diff_mean"] == pytest.approx((0.5 + 0.0 + 0.25) / 3)
    assert found["rollout/logprob_diff_max"] == pytest.approx(0.5)
    a, b = math.exp(-0.5), math.exp(0.25)  # trainer over engine, of each answer
    assert found["rollout/ess"] == pytest.approx((a + b) ** 2 / (2 * (a * a + b * b)))


def test_equal_distributions_have_the_full_sample_size() -> None:
    pairs = [(answer(-1.0, -2.0), [-1.0, -2.0]), (answer(-1.0), [-1.0])]
    assert compare(pairs) == {
        "rollout/logprob_diff_mean": 0.0,
        "rollout/logprob_diff_max": 0.0,
        "rollout/ess": 1.0,
    }


def test_one_answer_with_all_the_weight() -> None:
    pairs = [(answer(-900.0), [-1.0]), (answer(-1.0), [-900.0])]
    assert compare(pairs)["rollout/ess"] == pytest.approx(0.5)  # of two answers one counts


def test_a_log_prob_that_is_no_number_is_named() -> None:
    with pytest.raises(RolloutError, match=r"answer a .* not finite; its weights are policy 3"):
        compare([(answer(-1.0, math.nan), [-1.0, -1.0])])


def test_the_trainers_own_log_probs(policy: Policy, tokenizer: ChatTokenizer) -> None:
    answers = sampled(policy, tokenizer)
    own = response_token_logprobs(policy, [(p, c.token_ids) for p, c in answers])
    for (_, completion), found in zip(answers, own, strict=True):
        assert found == pytest.approx(completion.logprobs, abs=1e-4)
    sums = policy.score([(p, c.token_ids) for p, c in answers]).sums
    assert torch.tensor([sum(f) for f in own]) == pytest.approx(sums.float(), abs=1e-3)


def test_weights_that_moved_raise_the_alarm(policy: Policy, tokenizer: ChatTokenizer) -> None:
    said: list[str] = []
    ready: list[WeightSet] = []
    weights = WeightSets(policy)
    check = RolloutCheck(weights, ready.append, 0.01, said.append)
    answers = sampled(policy, tokenizer)
    assert check.metrics(answers)["rollout/logprob_diff_max"] < 1e-4
    assert not said and ready == [WeightSet.POLICY]
    weights.take(WeightSet.FROZEN, WeightSet.POLICY)
    scale(policy)
    assert check.metrics(answers)["rollout/logprob_diff_mean"] > 0.01
    assert len(said) == 1 and "may hold other weights" in said[0]
    of_frozen = [(p, Completion(**{**vars(c), "weight_set": WeightSet.FROZEN})) for p, c in answers]
    assert check.metrics(of_frozen)["rollout/logprob_diff_max"] < 1e-4
    assert len(said) == 1 and check.metrics([]) == {}
