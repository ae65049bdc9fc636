from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from engines import PROMPTS, STOP, Catcher, Caught, engine
from tiny import MakePolicy, scale
from torch import Tensor

from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.data.batching import collate
from nemo_selfpref.errors import RolloutError
from nemo_selfpref.megatron.decode import KVDecoder
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import SFTObjective
from nemo_selfpref.rollout.embedded import EmbeddedEngine
from nemo_selfpref.rollout.sampling import seed_of
from nemo_selfpref.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    WeightSet,
)

PARAMS = SamplingParams(max_new_tokens=10, temperature=1.0, top_p=0.95)
REQUESTS = [GenerationRequest(name, ids, seed_of(1, name)) for name, ids in PROMPTS.items()]


def tokens_of(completions: list[Completion]) -> dict[str, tuple[int, ...]]:
    return {c.id: c.token_ids for c in completions}


def test_completions_come_in_the_order_of_the_requests(policy: Policy) -> None:
    assert [c.id for c in engine(policy).generate(REQUESTS, PARAMS)] == list("abcde")


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batch_size_does_not_matter(policy: Policy, batch_size: int) -> None:
    together = engine(policy).generate(REQUESTS, PARAMS)
    apart = engine(policy, batch_size).generate(REQUESTS, PARAMS)
    assert tokens_of(apart) == tokens_of(together)
    assert len({len(c.token_ids) for c in together}) > 1


def test_order_and_company_do_not_matter(policy: Policy) -> None:
    together = tokens_of(engine(policy).generate(REQUESTS, PARAMS))
    assert tokens_of(engine(policy).generate(REQUESTS[::-1], PARAMS)) == together
    alone = {}
    for request in REQUESTS:
        alone |= tokens_of(engine(policy).generate([request], PARAMS))
    assert alone == together


def test_replicas_share_the_work(policy: Policy) -> None:
    whole = tokens_of(engine(policy).generate(REQUESTS, PARAMS))
    parts = []
    for replica in range(2):
        shared = engine(policy)
        shared.replica, shared.num_replicas = replica, 2
        seen = shared._gather = Catcher()
        with pytest.raises(Caught):
            shared.generate(REQUESTS, PARAMS)
        parts.append({REQUESTS[int(i)].id: tuple(entry[0]) for i, entry in seen.value.items()})
    assert sorted([*parts[0], *parts[1]]) == list("abcde")
    assert parts[0] | parts[1] == whole


def test_the_seed_alone_decides(policy: Policy) -> None:
    # a and d have the same prompt and different seeds.
    found = tokens_of(engine(policy, stop=frozenset()).generate(REQUESTS, PARAMS))
    assert found["a"] != found["d"]
    twin = replace(REQUESTS[3], seed=REQUESTS[0].seed)
    assert engine(policy, stop=frozenset()).generate([twin], PARAMS)[0].token_ids == found["a"]


def test_greedy_needs_no_seed(policy: Policy) -> None:
    greedy = replace(PARAMS, temperature=0.0)
    found = tokens_of(engine(policy).generate(REQUESTS, greedy))
    assert found["a"] == found["d"]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_a_forward_pass(policy: Policy, temperature: float) -> None:
    found = engine(policy).generate(REQUESTS, replace(PARAMS, temperature=temperature))
    scored = policy.score([(PROMPTS[c.id], c.token_ids) for c in found])
    assert [len(c.logprobs) for c in found] == [len(c.token_ids) for c in found]
    assert [sum(c.logprobs) for c in found] == pytest.approx(scored.sums.tolist(), abs=1e-4)


def test_the_stop_token_is_part_of_the_answer(policy: Policy) -> None:
    found = engine(policy).generate(REQUESTS, PARAMS)
    reasons = {c.finish_reason for c in found}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    for completion in found:
        *body, last = completion.token_ids
        assert not STOP & set(body)
        if completion.finish_reason is FinishReason.STOP:
            assert last in STOP
        else:
            assert last not in STOP and len(completion.token_ids) == 10


@pytest.mark.parametrize("count", [1, 3])
def test_max_new_tokens(policy: Policy, count: int) -> None:
    params = replace(PARAMS, max_new_tokens=count)
    found = engine(policy, stop=frozenset()).generate(REQUESTS, params)
    assert [len(c.token_ids) for c in found] == [count] * 5
    assert {c.finish_reason for c in found} == {FinishReason.LENGTH}


def test_a_request_may_have_a_lower_limit(policy: Policy) -> None:
    limits = {"a": 3, "b": None, "c": 1, "d": 99, "e": 7}
    requests = [replace(r, max_new_tokens=limits[r.id]) for r in REQUESTS]
    whole = tokens_of(engine(policy, stop=frozenset()).generate(REQUESTS, PARAMS))
    found = engine(policy, 2, stop=frozenset()).generate(requests, PARAMS)
    # 10 is the limit of all.
    assert [len(c.token_ids) for c in found] == [3, 10, 1, 10, 7]
    assert all(c.token_ids == whole[c.id][: len(c.token_ids)] for c in found)
    assert [len(c.logprobs) for c in found] == [3, 10, 1, 10, 7]
    assert {c.finish_reason for c in found} == {FinishReason.LENGTH}


def test_a_lower_limit_makes_room_for_a_longer_prompt(policy: Policy) -> None:
    long = GenerationRequest("x", (5,) * 60, max_new_tokens=4)
    (found,) = engine(policy, stop=frozenset()).generate([long], PARAMS)
    assert len(found.token_ids) == 4
    message = r"prompt x has 60 tokens; with rollout\.max_new_tokens=5 that passes .* 64\."
    with pytest.raises(RolloutError, match=message):
        engine(policy).generate([replace(long, max_new_tokens=5)], PARAMS)


def test_a_stop_token_in_the_last_place_is_a_stop(policy: Policy) -> None:
    whole = engine(policy, stop=frozenset()).generate(REQUESTS[:1], PARAMS)[0].token_ids
    place = next(i for i, token in enumerate(whole) if token not in whole[:i] and i > 1)
    params = replace(PARAMS, max_new_tokens=place + 1)
    stop = frozenset({whole[place]})
    (found,) = engine(policy, stop=stop).generate(REQUESTS[:1], params)
    assert found.finish_reason is FinishReason.STOP and found.token_ids == whole[: place + 1]


def test_completions_name_the_weights_that_made_them(policy: Policy) -> None:
    before = engine(policy).generate(REQUESTS[:1], PARAMS)[0]
    optimizer = PolicyOptimizer(policy, OptimConfig(lr=1e-2), 1.0)
    batch = collate([((5, 6), (7, 2))], [0], paired=False)
    policy.train_batch([batch], SFTObjective(), StepInputs(torch.ones(1)))
    optimizer.step()
    after = engine(policy).generate(REQUESTS[:1], PARAMS)[0]
    assert (before.weight_version, after.weight_version) == (0, 1)
    assert before.weight_set is after.weight_set is WeightSet.POLICY
    assert before.logprobs != after.logprobs


def test_an_empty_prompt_is_refused(policy: Policy) -> None:
    with pytest.raises(RolloutError, match="prompt x is empty: expected at least one token"):
        engine(policy).generate([GenerationRequest("x", ())], PARAMS)


def test_a_prompt_too_long_is_refused(policy: Policy) -> None:
    fits = GenerationRequest("x", (5,) * 54)
    assert engine(policy).generate([fits], PARAMS)[0].id == "x"
    long = GenerationRequest("x", (5,) * 55)
    message = r"prompt x has 55 tokens; with rollout\.max_new_tokens=10 that passes .* 64\."
    with pytest.raises(RolloutError, match=message):
        engine(policy).generate([long], PARAMS)


def test_weights_the_engine_does_not_hold_are_refused(policy: Policy) -> None:
    with pytest.raises(RolloutError, match="no frozen weights are held here; there are policy"):
        engine(policy).generate(REQUESTS, PARAMS, WeightSet.FROZEN)


@pytest.mark.parametrize("folder", ["llama_folder", "tied_folder"])
def test_a_weight_set_generates_what_a_policy_of_these_weights_does(
    request: pytest.FixtureRequest, make_policy: MakePolicy, folder: str
) -> None:
    path = request.getfixturevalue(folder)
    policy = make_policy(path)
    weights = WeightSets(policy)
    weights.take(WeightSet.FROZEN, WeightSet.POLICY)
    weights.take(WeightSet.EMA, WeightSet.POLICY)
    scale(policy, 2.0)
    weights.average(alpha=0.5)
    for name, factor, version in ((WeightSet.FROZEN, 1.0, 0), (WeightSet.EMA, 1.5, 1)):
        twin = make_policy(path)
        scale(twin, factor)
        want = engine(twin).generate(REQUESTS, PARAMS)
        found = engine(policy, weights=weights).generate(REQUESTS, PARAMS, name)
        assert tokens_of(found) == tokens_of(want)
        assert {(c.weight_set, c.weight_version) for c in found} == {(name, version)}
        for ours, theirs in zip(found, want, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
    own = engine(policy, weights=weights).generate(REQUESTS, PARAMS)
    assert tokens_of(own) != tokens_of(found)
    assert {(c.weight_set, c.weight_version) for c in own} == {(WeightSet.POLICY, 1)}


def test_no_requests(policy: Policy) -> None:
    assert engine(policy).generate([], PARAMS) == []


def test_progress_counts_answers_and_tokens(policy: Policy) -> None:
    seen: list[tuple[int, int]] = []
    found = engine(policy, 2).generate(
        REQUESTS, PARAMS, on_done=lambda answers, tokens: seen.append((answers, tokens))
    )
    assert [answers for answers, _ in seen] == [2, 2, 1]
    assert sum(tokens for _, tokens in seen) == sum(len(c.token_ids) for c in found)


class WatchedDecoder(KVDecoder):
    """Notes how many sequences every step decodes, and every compaction."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.widths: list[int] = []
        self.kept: list[int] = []

    def advance(self, tokens: Tensor) -> Tensor | None:
        self.widths.append(tokens.numel())
        return super().advance(tokens)

    def keep(self, rows: Tensor) -> None:
        self.kept.append(rows.numel())
        super().keep(rows)


def test_finished_sequences_leave_the_batch(policy: Policy) -> None:
    decoder = WatchedDecoder(policy)
    requests = [GenerationRequest(str(i), (5, 6, 7), seed_of(i)) for i in range(12)]
    running = EmbeddedEngine(decoder, stop_ids=STOP, max_length=64, batch_size=64)
    found = tokens_of(running.generate(requests, PARAMS))
    alone = {}
    for request in requests:
        alone |= tokens_of(engine(policy).generate([request], PARAMS))
    assert found == alone
    assert decoder.kept and decoder.widths[0] > decoder.widths[-1] >= 1
    # A batch shrinks once 60 % or less of it is still running.
    widths = [12, *decoder.kept]
    assert all(after <= 0.6 * before for before, after in pairwise(widths))


def test_the_engine_leaves_no_gradients(policy: Policy) -> None:
    engine(policy).generate(REQUESTS[:2], PARAMS)
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in policy.module.parameters())
