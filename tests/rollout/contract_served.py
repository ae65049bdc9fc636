"""What an engine that serves many callers must do beside the contract of every engine."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
from contract import (
    CLOSE,
    GREEDY,
    HOT,
    LONG,
    MAX_LENGTH,
    PROMPTS,
    VOCAB,
    Contract,
    Subject,
    greedy_json,
    long_requests,
    requests_of,
    tokens_of,
    wait_for,
)

from nemo_selfpref.errors import RolloutCancelled, RolloutError
from nemo_selfpref.rollout.engine import RolloutEngine, Until
from nemo_selfpref.types import GenerationRequest, SamplingParams

ONE = GenerationRequest("one", (5, 6, 7), 1)


@dataclass(frozen=True)
class ServedSubject(Subject):
    embedded_greedy: str = "[]"
    """What greedy_json says of the embedded engine on the same weights."""


def _labels(*labels: int) -> Callable[[RolloutEngine], object]:
    return lambda engine: engine.label_scores([(5, 6)], labels)


def _asked(
    request: GenerationRequest = ONE, params: SamplingParams = HOT
) -> Callable[[RolloutEngine], object]:
    return lambda engine: engine.generate([request], params)


REFUSED = {
    "a label that is no token": (_labels(10, VOCAB), "the label 500 is no token"),
    "no label": (_labels(), "labels"),
    "too many labels": (_labels(*range(200)), "200 labels were asked for; the engine weighs 128"),
    "more labels than tokens": (_labels(*range(1000)), "1000 labels were asked for"),
    "a negative label": (_labels(-1), "labels.0"),
    "a limit beyond all memory": (_asked(params=replace(HOT, max_new_tokens=10**12)), "passes"),
    "no token to come": (_asked(params=replace(HOT, max_new_tokens=0)), "max_new_tokens"),
    "a negative temperature": (_asked(params=replace(HOT, temperature=-0.1)), "temperature"),
    "a temperature of nan": (_asked(params=replace(HOT, temperature=float("nan"))), "temperature"),
    "a temperature beyond vLLM's": (
        _asked(params=replace(HOT, temperature=2.5)),
        "2.5; the engine",
    ),
    "an empty top-p": (_asked(params=replace(HOT, top_p=0.0)), "top_p"),
    "a negative top-k": (_asked(params=replace(HOT, top_k=-1)), "top_k"),
    "a seed too large": (_asked(replace(ONE, seed=2**63)), "seed"),
    "a negative seed": (_asked(replace(ONE, seed=-1)), "seed"),
    "a token beyond the vocabulary": (_asked(replace(ONE, prompt_ids=(VOCAB,))), "token 500"),
    "a token beyond an int": (_asked(replace(ONE, prompt_ids=(2**40,))), "prompt_ids"),
}


class ServedContract(Contract):
    """Inherit it as a class TestX with a fixture `subject` that gives a ServedSubject."""

    def test_greedy_answers_are_those_of_the_embedded_engine(self, subject: ServedSubject) -> None:
        ours = json.loads(greedy_json(subject.engine))
        theirs = json.loads(subject.embedded_greedy)
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
        for (tokens, found), (_, want) in zip(ours, theirs, strict=True):
            assert len(tokens) > 1 and found == pytest.approx(want, abs=CLOSE)

    def test_a_prompt_is_read_once(self, subject: ServedSubject) -> None:
        prompt = tuple(3 + i * 7 % 490 for i in range(300))
        first, again = (
            subject.engine.generate([GenerationRequest("x", prompt)], GREEDY)[0] for _ in range(2)
        )
        assert first.cached_tokens == 0 and 128 <= again.cached_tokens < 300
        assert again.token_ids == first.token_ids
        longer = GenerationRequest("y", prompt + first.token_ids[:4], max_new_tokens=4)
        (continued,) = subject.engine.generate([longer], GREEDY)
        assert continued.token_ids == first.token_ids[4:8] and continued.cached_tokens >= 128

    def test_more_requests_than_places(self, subject: ServedSubject) -> None:
        asked = requests_of(PROMPTS * 100)
        params = replace(HOT, max_new_tokens=3)
        found = tokens_of(subject.engine.generate(asked, params))
        assert len(found) == 500
        assert found[495:] == tokens_of(subject.engine.generate(asked[495:], params))

    def test_more_prompt_tokens_than_a_step_reads(self, subject: ServedSubject) -> None:
        """A prompt that vLLM reads in two parts must not cost its seeded draw, or the engine."""
        random_ = random.Random(5)
        prompts = [tuple(random_.choices(range(3, 400), k=150)) for _ in range(60)]
        asked = [GenerationRequest(str(i), p, seed=i) for i, p in enumerate(prompts)]
        params = SamplingParams(3)
        found = tokens_of(subject.engine.generate(asked, params))
        assert found[55:] == tokens_of(subject.engine.generate(asked[55:], params))

    def test_callers_at_once_get_their_own_answers(self, subject: ServedSubject) -> None:
        engine = subject.engine
        params = [replace(HOT, top_k=k) for k in (0, 3, 40)]
        labels = [(10, 11), (7, 8, 9, 10, 11), tuple(range(100))]
        apart = [engine.generate(requests_of(), p) for p in params]
        scored = [engine.label_scores(PROMPTS, given) for given in labels]
        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(engine.generate, requests_of(), p) for p in params * 2]
            scores = [pool.submit(engine.label_scores, PROMPTS, given) for given in labels * 2]
            for future, want in zip(answers, apart * 2, strict=True):
                assert tokens_of(future.result(60)) == tokens_of(want)
                for ours, theirs in zip(future.result(), want, strict=True):
                    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=CLOSE)
            for future, want in zip(scores, scored * 2, strict=True):
                for ours, theirs in zip(future.result(60), want, strict=True):
                    assert ours.logprobs == pytest.approx(theirs.logprobs, abs=CLOSE)
                    assert ours.best == pytest.approx(theirs.best, abs=CLOSE)

    @pytest.mark.parametrize(("ask", "message"), REFUSED.values(), ids=REFUSED)
    def test_the_engine_survives_what_it_refuses(
        self, subject: ServedSubject, ask: Callable[[RolloutEngine], object], message: str
    ) -> None:
        with pytest.raises(RolloutError, match=message):
            ask(subject.engine)
        assert len(subject.engine.generate([ONE], HOT)) == 1

    def test_extremes_that_have_an_answer(self, subject: ServedSubject) -> None:
        engine = subject.engine
        (plain,) = engine.generate([ONE], HOT)
        for params in (
            replace(HOT, top_k=VOCAB),
            replace(HOT, top_k=10**9),
            replace(HOT, stop_token_ids=(VOCAB, 2**31 - 1)),
        ):
            assert engine.generate([ONE], params)[0].token_ids == plain.token_ids
        twins = [replace(ONE, seed=seed) for seed in (2**63 - 1, 2**63 - 2)]
        first, second = tokens_of(engine.generate(twins, HOT))
        assert first != second
        (score,) = engine.label_scores([(5,) * (MAX_LENGTH - 1)], tuple(range(128)))
        assert len(score.logprobs) == 128

    def test_one_caller_gives_up_and_another_does_not(self, subject: ServedSubject) -> None:
        engine = subject.engine
        gone, failed = threading.Event(), []

        def ask() -> None:
            try:
                engine.generate(long_requests(), LONG, until=Until(cancelled=gone.is_set))
            except RolloutCancelled as error:
                failed.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: subject.running() > 0, "the long call runs")
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(engine.generate, requests_of(), GREEDY)
            gone.set()
            thread.join(60)
            assert tokens_of(other.result(60)) == [subject.reference.greedy(p) for p in PROMPTS]
        assert len(failed) == 1
        self.still_serves(subject)
