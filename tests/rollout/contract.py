"""What every RolloutEngine must do, as one suite: a test module of an engine inherits it.

Importable in the trainer's environment and in that of the engines. The truth comes from
transformers, which is in both.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_selfpref.errors import RolloutCancelled, RolloutError, RolloutTimeout
from nemo_selfpref.rollout.engine import RolloutEngine, Until
from nemo_selfpref.rollout.sampling import seed_of
from nemo_selfpref.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenIds,
    WeightSet,
)

VOCAB, MAX_LENGTH, STOP_IDS = 500, 512, (2, 0)
PROMPTS: tuple[TokenIds, ...] = (
    (5, 6),
    (7,),
    (9, 10, 11, 12, 13, 14, 15, 16),
    tuple(range(20, 60)),
    (5, 6, 7),
)
GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)
HOT = SamplingParams(max_new_tokens=16, temperature=1.2)
CLOSE = 1e-4
"""Log-probs of two implementations in float32 are this close."""


class Reference:
    """The same weights in transformers, every weight times `scale`."""

    def __init__(self, folder: Path, scale: float = 1.0) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(scale)

    @torch.no_grad()
    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """Log-probs [len(ids), vocabulary] of what follows each token."""
        return self.model(torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)

    def next(self, ids: Sequence[int]) -> Tensor:
        return self.logprobs(ids)[-1]

    def of_answer(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        at = self.logprobs([*prompt, *answer])[len(prompt) - 1 : -1]
        return at.gather(1, torch.tensor(list(answer))[:, None])[:, 0].tolist()

    def greedy(self, prompt: Sequence[int], limit: int = GREEDY.max_new_tokens) -> TokenIds:
        answer: list[int] = []
        while len(answer) < limit and not (answer and answer[-1] in STOP_IDS):
            answer.append(int(self.next([*prompt, *answer]).argmax()))
        return tuple(answer)


@dataclass(frozen=True)
class Subject:
    """An engine under test, on the weights of `reference`."""

    engine: RolloutEngine
    reference: Reference
    version: int
    running: Callable[[], int] = lambda: 0
    """Requests at work in it."""


def requests_of(
    prompts: Sequence[TokenIds] = PROMPTS, *, seed: str = "contract"
) -> list[GenerationRequest]:
    return [GenerationRequest(f"r{i}", p, seed_of(seed, i)) for i, p in enumerate(prompts)]


def tokens_of(completions: Sequence[Completion]) -> list[TokenIds]:
    return [c.token_ids for c in completions]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def greedy_json(engine: RolloutEngine) -> str:
    """Greedy answers, for the comparison of one engine with another."""
    found = engine.generate(requests_of(), replace(GREEDY, max_new_tokens=40))
    return json.dumps([[c.token_ids, c.logprobs] for c in found])


def tempered(logprobs: Tensor, params: SamplingParams, slack: float = 0.0) -> Tensor:
    """Probabilities [vocabulary] that SamplingParams make of log-probs: temperature, then top-k,
    then the smallest set with top-p of the mass. `slack` widens the last cut, for rounding."""
    scaled = logprobs.double() / params.temperature
    if params.top_k:
        scaled[scaled < scaled.topk(params.top_k).values[-1]] = -math.inf
    probs, order = scaled.softmax(-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs >= params.top_p + slack] = 0.0
    return torch.zeros_like(probs).scatter(0, order, probs / probs.sum())


def long_requests(count: int = 512) -> list[GenerationRequest]:
    """Far more work than a test waits for; greedy, few of the answers meet a stop token."""
    return [GenerationRequest(str(i), (3 + i % 400, 7, 11)) for i in range(count)]


LONG = SamplingParams(max_new_tokens=400, temperature=0.0)


class Contract:
    """Inherit it as a class TestX with a fixture `subject`."""

    # -- order, ids, tags -------------------------------------------------------------------------

    def test_answers_come_in_the_order_of_the_requests(self, subject: Subject) -> None:
        asked = requests_of()
        found = subject.engine.generate(asked, HOT)
        assert [c.id for c in found] == [r.id for r in asked]
        turned = subject.engine.generate(asked[::-1], HOT)
        assert turned == found[::-1]

    def test_ids_may_repeat(self, subject: Subject) -> None:
        asked = [replace(r, id="same") for r in requests_of()]
        found = subject.engine.generate(asked, HOT)
        assert [c.id for c in found] == ["same"] * len(PROMPTS)
        assert tokens_of(found) == tokens_of(subject.engine.generate(requests_of(), HOT))

    def test_answers_name_the_weights_that_made_them(self, subject: Subject) -> None:
        found = subject.engine.generate(requests_of(), HOT)
        assert {(c.weight_set, c.weight_version) for c in found} == {
            (WeightSet.POLICY, subject.version)
        }

    def test_nothing_asked_nothing_answered(self, subject: Subject) -> None:
        assert subject.engine.generate([], HOT) == []
        assert subject.engine.label_scores([], (10, 11)) == []

    def test_progress_counts_all_answers_and_tokens(self, subject: Subject) -> None:
        seen: list[tuple[int, int]] = []
        found = subject.engine.generate(
            requests_of(PROMPTS * 20), HOT, on_done=lambda *done: seen.append(done)
        )
        assert sum(answers for answers, _ in seen) == len(found) == 100
        assert sum(tokens for _, tokens in seen) == sum(len(c.token_ids) for c in found)
        seen.clear()
        subject.engine.label_scores(PROMPTS, (10, 11), on_done=lambda *done: seen.append(done))
        assert sum(answers for answers, _ in seen) == len(PROMPTS)

    # -- sampling ---------------------------------------------------------------------------------

    def test_the_seed_alone_decides(self, subject: Subject) -> None:
        asked = [GenerationRequest(str(i), PROMPTS[0], seed) for i, seed in enumerate(range(8))]
        together = tokens_of(subject.engine.generate(asked, HOT))
        assert len(set(together)) == 8
        alone = [subject.engine.generate([r], HOT)[0].token_ids for r in asked]
        assert alone == together
        company = requests_of(PROMPTS * 8, seed="company")
        mixed = [*company[:20], *asked, *company[20:]]
        assert tokens_of(subject.engine.generate(mixed, HOT)[20:28]) == together

    def test_temperature_zero_is_the_argmax_chain(self, subject: Subject) -> None:
        found = subject.engine.generate(requests_of(), GREEDY)
        assert tokens_of(found) == [subject.reference.greedy(p) for p in PROMPTS]
        other = subject.engine.generate(requests_of(seed="another"), GREEDY)
        assert tokens_of(other) == tokens_of(found)

    @pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}, {"top_k": 1, "top_p": 0.5}])
    def test_the_narrowest_cut_is_greedy(self, subject: Subject, cut: dict[str, Any]) -> None:
        narrow = replace(GREEDY, temperature=1.0, **cut)
        found = subject.engine.generate(requests_of(), narrow)
        assert tokens_of(found) == [subject.reference.greedy(p) for p in PROMPTS]

    @pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.3}, {"top_k": 20, "top_p": 0.6}])
    def test_a_cut_bounds_the_support(self, subject: Subject, cut: dict[str, Any]) -> None:
        params = replace(HOT, max_new_tokens=8, **cut)
        found = subject.engine.generate(requests_of(PROMPTS * 4), params)
        ranks = set()
        for prompt, answer in zip(PROMPTS * 4, found, strict=True):
            whole = [*prompt, *answer.token_ids]
            at = subject.reference.logprobs(whole)[len(prompt) - 1 : -1]
            for token, logprobs in zip(answer.token_ids, at, strict=True):
                assert tempered(logprobs, params, slack=1e-4)[token] > 0
                ranks.add(int((logprobs > logprobs[token]).sum()))
        assert len(ranks) > 3

    @pytest.mark.parametrize(
        "setting",
        [
            {"temperature": 0.4},
            {"temperature": 1.0},
            {"temperature": 0.8, "top_k": 6},
            {"temperature": 0.6, "top_p": 0.7},
        ],
        ids=str,
    )
    def test_tokens_are_as_frequent_as_they_are_likely(
        self, subject: Subject, setting: dict[str, Any]
    ) -> None:
        count, prompt = 1200, PROMPTS[2]
        params = SamplingParams(max_new_tokens=1, **setting)
        asked = [GenerationRequest(str(i), prompt, seed_of("draw", i)) for i in range(count)]
        seen = Counter(c.token_ids[0] for c in subject.engine.generate(asked, params))
        expected = tempered(subject.reference.next(prompt), params) * count
        often = [t for t in range(VOCAB) if expected[t] >= 8]
        cells = [(seen[t], float(expected[t])) for t in often]
        rest = count - sum(e for _, e in cells)
        if rest > 1e-6:
            cells.append((count - sum(s for s, _ in cells), rest))
        assert len(cells) >= 4
        chi = sum((got - want) ** 2 / want for got, want in cells)
        degrees = len(cells) - 1  # mean and half the variance of chi-square
        assert chi < degrees + 5 * math.sqrt(2 * degrees)

    # -- log-probs --------------------------------------------------------------------------------

    @pytest.mark.parametrize("setting", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 9}])
    def test_logprobs_are_untempered_one_a_token(
        self, subject: Subject, setting: dict[str, Any]
    ) -> None:
        found = subject.engine.generate(requests_of(), SamplingParams(12, **setting))
        for prompt, answer in zip(PROMPTS, found, strict=True):
            assert len(answer.logprobs) == len(answer.token_ids)
            want = subject.reference.of_answer(prompt, answer.token_ids)
            assert answer.logprobs == pytest.approx(want, abs=CLOSE)

    def test_label_scores(self, subject: Subject) -> None:
        best = int(subject.reference.next(PROMPTS[1]).argmax())
        labels = (10, best, 499)
        found = subject.engine.label_scores(PROMPTS * 4, labels)
        assert len(found) == 20
        for prompt, scores in zip(PROMPTS * 4, found, strict=True):
            want = subject.reference.next(prompt)
            assert scores.logprobs == pytest.approx(want[list(labels)].tolist(), abs=CLOSE)
            assert scores.best == pytest.approx(float(want.max()), abs=CLOSE)
        assert found[1].best == found[1].logprobs[1]

    def test_a_label_may_come_twice(self, subject: Subject) -> None:
        (once,) = subject.engine.label_scores(PROMPTS[:1], (11, 10))
        (twice,) = subject.engine.label_scores(PROMPTS[:1], (10, 11, 10))
        a, b = once.logprobs
        assert twice.logprobs == pytest.approx((b, a, b), abs=CLOSE)

    # -- the end of an answer ---------------------------------------------------------------------

    def test_the_engines_stop_tokens_end_an_answer(self, subject: Subject) -> None:
        params = SamplingParams(max_new_tokens=60, temperature=1.5)
        found = subject.engine.generate(requests_of(PROMPTS * 10, seed="stop"), params)
        for answer in found:
            *body, last = answer.token_ids
            assert not set(STOP_IDS) & set(body)
            stopped = answer.finish_reason is FinishReason.STOP
            assert stopped == (last in STOP_IDS) and (stopped or len(answer.token_ids) == 60)
        ended = [
            (p, c) for p, c in zip(PROMPTS * 10, found, strict=True) if c.token_ids[-1] in STOP_IDS
        ]
        assert 0 < len(ended) < len(found)
        prompt, answer = ended[0]
        want = subject.reference.of_answer(prompt, answer.token_ids)
        assert answer.logprobs == pytest.approx(want, abs=CLOSE)

    def test_further_stop_tokens_do_too(self, subject: Subject) -> None:
        whole = subject.reference.greedy(PROMPTS[2])
        place = next(i for i, token in enumerate(whole) if token not in whole[:i] and i > 1)
        params = replace(GREEDY, stop_token_ids=(whole[place],))
        for limit in (GREEDY.max_new_tokens, place + 1):  # in the last place it is a stop, too
            (found,) = subject.engine.generate(
                requests_of(PROMPTS[2:3]), replace(params, max_new_tokens=limit)
            )
            assert found.token_ids == whole[: place + 1]
            assert found.finish_reason is FinishReason.STOP
            assert len(found.logprobs) == place + 1

    def test_the_limit_ends_an_answer(self, subject: Subject) -> None:
        for limit in (1, 5):
            found = subject.engine.generate(requests_of(), replace(GREEDY, max_new_tokens=limit))
            assert [len(c.token_ids) for c in found] == [limit] * len(PROMPTS)
            assert {c.finish_reason for c in found} == {FinishReason.LENGTH}

    def test_a_request_may_lower_its_own_limit(self, subject: Subject) -> None:
        own = (3, None, 1, 99, 7)
        asked = [replace(r, max_new_tokens=n) for r, n in zip(requests_of(), own, strict=True)]
        whole = subject.engine.generate(requests_of(), HOT)
        found = subject.engine.generate(asked, HOT)
        for part, all_, limit in zip(found, whole, own, strict=True):
            length = min(len(all_.token_ids), limit or HOT.max_new_tokens)
            assert part.token_ids == all_.token_ids[:length]
            assert len(part.logprobs) == length

    def test_a_continued_answer_is_the_same_answer(self, subject: Subject) -> None:
        for prompt in PROMPTS:
            whole = subject.reference.greedy(prompt)
            asked = GenerationRequest("on", prompt + whole[:5], max_new_tokens=len(whole) - 5)
            (found,) = subject.engine.generate([asked], GREEDY)
            assert found.token_ids == whole[5:]

    def test_the_longest_prompts(self, subject: Subject) -> None:
        prompt = tuple(3 + i % 490 for i in range(MAX_LENGTH - 1))
        found = subject.engine.generate(
            [
                GenerationRequest("one", prompt, max_new_tokens=1),
                GenerationRequest("ten", prompt[:-9], max_new_tokens=10),
            ],
            GREEDY,
        )
        assert found[0].token_ids == subject.reference.greedy(prompt, 1)
        assert found[1].token_ids == subject.reference.greedy(prompt[:-9], 10)

    # -- refusals ---------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("prompt", "weights", "message"),
        [
            ((), WeightSet.POLICY, "is empty: expected at least one token"),
            (
                (5,) * (MAX_LENGTH - 11),
                WeightSet.POLICY,
                "prompt .* has 501 tokens; with .*12.* 512",
            ),
            ((5,), WeightSet.LAGGED, "no lagged weights are held here"),
        ],
        ids=["empty", "long", "set"],
    )
    def test_what_cannot_be_answered_is_refused_before_any_work(
        self, subject: Subject, prompt: TokenIds, weights: WeightSet, message: str
    ) -> None:
        seen: list[tuple[int, int]] = []
        asked = [*requests_of(), GenerationRequest("bad", prompt)]
        with pytest.raises(RolloutError, match=message):
            subject.engine.generate(asked, GREEDY, weights, lambda *done: seen.append(done))
        assert seen == []
        if len(prompt) < 2:
            with pytest.raises(RolloutError, match=message):
                subject.engine.label_scores([(5, 6), prompt], (10, 11), weights)

    # -- giving up --------------------------------------------------------------------------------

    def still_serves(self, subject: Subject) -> None:
        wait_for(lambda: subject.running() == 0, "the engine is idle")
        found = subject.engine.generate(requests_of(), GREEDY)
        assert tokens_of(found) == [subject.reference.greedy(p) for p in PROMPTS]

    def test_a_deadline(self, subject: Subject) -> None:
        seen: list[int] = []
        with pytest.raises(RolloutTimeout):
            subject.engine.generate(
                long_requests(),
                LONG,
                on_done=lambda answers, _: seen.append(answers),
                until=Until.within(0.5),
            )
        assert sum(seen) < 512
        self.still_serves(subject)

    def test_a_cancellation_while_no_answer_comes(self, subject: Subject) -> None:
        cancelled, seen = threading.Event(), []
        timer = threading.Timer(0.5, cancelled.set)
        timer.start()
        with pytest.raises(RolloutCancelled):
            subject.engine.generate(
                long_requests(),
                LONG,
                on_done=lambda answers, _: seen.append(answers),
                until=Until(cancelled=cancelled.is_set),
            )
        assert cancelled.is_set() and sum(seen) < 512
        self.still_serves(subject)

    @pytest.mark.parametrize(
        ("until", "error"),
        [
            (lambda: Until.within(0.0), RolloutTimeout),
            (lambda: Until(cancelled=lambda: True), RolloutCancelled),
        ],
        ids=["late", "unwanted"],
    )
    def test_what_is_over_is_not_begun(
        self, subject: Subject, until: Callable[[], Until], error: type[RolloutError]
    ) -> None:
        with pytest.raises(error):
            subject.engine.generate(requests_of(), GREEDY, until=until())
        with pytest.raises(error):
            subject.engine.label_scores(PROMPTS, (10, 11), until=until())
        self.still_serves(subject)
