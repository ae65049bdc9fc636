from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from nemo_selfpref.algorithms.base import PairMaker, Rollouts
from nemo_selfpref.config.schema import RolloutConfig, RunConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import RolloutError, TrainingError
from nemo_selfpref.training.making import Ahead, AtOnce, Made, Making
from nemo_selfpref.training.rollouts import EngineRollouts
from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    FinishReason,
    PreferencePair,
    WeightSet,
)

CONFIG = RunConfig(name="test", rollout=RolloutConfig(max_new_tokens=4, check_samples=1))
STEPS = 7


class Engine:
    """Answers with the version of the weights that it was given last; can be held up."""

    def __init__(self) -> None:
        self.version, self.go = -1, threading.Event()
        self.go.set()
        self.asked: list[int] = []

    def generate(self, requests: Any, params: Any, weight_set: Any, *_: Any) -> list[Completion]:
        assert self.go.wait(10)
        self.asked.append(self.version)
        return [
            Completion(
                r.id, (self.version, 2), (-0.5, -1.0), FinishReason.STOP, weight_set, self.version
            )
            for r in requests
        ]

    def label_scores(self, *_: Any) -> Any:
        raise AssertionError


class Run:
    """The weights are the number of updates; giving them to the engine is setting its version."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.updates, self.rests = engine, 0, 0

    def hand_over(self) -> Callable[[], None]:
        taken = self.updates

        def give() -> None:
            self.engine.version = taken

        return give

    def rest(self) -> None:
        self.rests += 1

    def share(self, future: Future[Any] | None) -> Any:
        assert future is not None
        return future.result(10)


class OverVersion(PairMaker):
    """One pair a row, its rejected answer the engine's; fails at the steps it is told to."""

    def __init__(self, fails: Sequence[int] = (), dropped: int = 0) -> None:
        self.made: list[int] = []
        self.fails, self.dropped = fails, dropped

    def pairs(
        self, step: int, rollouts: Rollouts, rows: Sequence[Demonstration]
    ) -> list[PreferencePair]:
        found = rollouts.sample("answer", [(r.id, r.prompt_ids) for r in rows])
        if step in self.fails:
            raise RolloutError(f"no engine at step {step}")
        self.made.append(step)
        report = DropReport(kept=len(rows))
        if len(self.made) <= self.dropped:
            report = DropReport(0, {"identical": len(rows)})
        rollouts.note("pairs", report)
        rollouts.log({"made": float(step)})
        if not report.kept:
            return []
        return [
            PreferencePair(
                f"{r.id}@{step}", r.prompt_ids, (9, 2), c.token_ids, 0.75, {"step": step}
            )
            for r, c in zip(rows, found, strict=True)
        ]

    def kept(self) -> tuple[Sequence[PreferencePair], Mapping[str, Any]]:
        return (), {"made": list(self.made)}


def rows_of(step: int) -> list[Demonstration]:
    return [Demonstration(f"row-{step}", (), (5, 6 + step), (9, 2), "x", "f:1")]


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.go.set()


def making(engine: Engine, tokenizer: ChatTokenizer, maker: PairMaker) -> Making:
    rollouts = EngineRollouts(CONFIG, tokenizer, engine, lambda _: None, max_length=64)
    return Making(maker, rows_of, rollouts, "stage")


def ahead(
    engine: Engine, tokenizer: ChatTokenizer, staleness: int, maker: PairMaker | None = None
) -> tuple[Ahead, Run]:
    run = Run(engine)
    made = making(engine, tokenizer, maker or OverVersion())
    return Ahead(made, run, staleness, STEPS, True, threading.Event()), run


def versions(source: Ahead, run: Run, first: int = 0, last: int = STEPS) -> list[int]:
    """The version each step's answers come from, training going on between them."""
    found = []
    for number in range(first, last):
        made = source.take(number)
        assert [p.id for p in made.pairs] == [f"row-{number}@{number}"]
        assert made.pairs[0].rejected_ids[0] == made.updates
        found.append(made.updates)
        run.updates += 1
    return found


@pytest.mark.parametrize(
    ("staleness", "expected"),
    [(0, [0, 1, 2, 3, 4, 5, 6]), (1, [0, 0, 1, 2, 3, 4, 5]), (3, [0, 0, 0, 0, 1, 2, 3])],
)
def test_which_weights_a_step_is_made_from(
    engine: Engine, tokenizer: ChatTokenizer, staleness: int, expected: list[int]
) -> None:
    source, run = ahead(engine, tokenizer, staleness)
    assert versions(source, run) == expected == engine.asked  # max(0, step - staleness)
    assert run.rests == STEPS
    source.close()


def test_the_next_step_is_made_while_the_trainer_works(
    engine: Engine, tokenizer: ChatTokenizer
) -> None:
    source, run = ahead(engine, tokenizer, 1)
    source.take(0)
    deadline = time.monotonic() + 10
    while len(engine.asked) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.asked == [0, 0]  # step 1 without anyone having asked for it, and no further
    run.updates += 1
    assert source.take(1).updates == 0
    source.close()


def test_what_is_under_way_is_kept_and_taken_back(engine: Engine, tokenizer: ChatTokenizer) -> None:
    source, run = ahead(engine, tokenizer, 2)
    first = versions(source, run, 0, 3)
    run.updates = 3
    source.settle()
    kept = source.under_way(3)
    assert [entry["number"] for entry in kept.made] == [3, 4] and first == [0, 0, 0]
    assert kept.before == ([], {"made": [0, 1, 2]}) and kept.after is None
    source.close()
    again, run = ahead(engine, tokenizer, 2)
    run.updates = 3
    again.restore(kept.made)
    engine.asked.clear()
    assert versions(again, run, 3) == [1, 2, 3, 4]
    assert engine.asked == [3, 4]  # only the steps that were not made yet
    again.close()


def test_a_step_that_failed_is_made_anew_after_a_resume(
    engine: Engine, tokenizer: ChatTokenizer
) -> None:
    source, run = ahead(engine, tokenizer, 2, OverVersion(fails=[3]))
    assert versions(source, run, 0, 2) == [0, 0]
    source.settle()
    kept = source.under_way(2)
    assert [entry["number"] for entry in kept.made] == [2]
    assert kept.after == ([], {"made": [0, 1, 2]})  # step 3 failed, step 4 was not begun
    assert versions(source, run, 2, 3) == [0]
    with pytest.raises(RolloutError, match="no engine at step 3"):
        source.take(3)
    source.close()
    again, run = ahead(engine, tokenizer, 2)
    run.updates = 3
    again.restore([])
    assert versions(again, run, 3) == [3, 3, 3, 4]
    again.close()


def test_a_run_that_ends_does_not_wait_for_what_is_under_way(
    engine: Engine, tokenizer: ChatTokenizer
) -> None:
    source, run = ahead(engine, tokenizer, 2)
    source.take(0)
    engine.go.clear()
    run.updates = 1
    threading.Timer(0.3, engine.go.set).start()
    source.close()  # the step being made ends; the ones behind it never begin
    assert len(engine.asked) <= 3


def test_a_step_that_was_taken_and_not_trained_on_is_kept(
    engine: Engine, tokenizer: ChatTokenizer
) -> None:
    source, run = ahead(engine, tokenizer, 1)
    versions(source, run, 0, 2)
    source.take(2)  # and then training fails: two updates are done
    source.settle()
    assert [entry["number"] for entry in source.under_way(2).made] == [2, 3]
    assert [entry["number"] for entry in source.under_way(3).made] == [3]
    source.close()


def test_what_was_restored_can_be_kept_again(engine: Engine, tokenizer: ChatTokenizer) -> None:
    source, run = ahead(engine, tokenizer, 2)
    versions(source, run, 0, 2)
    source.settle()
    kept = source.under_way(2)
    source.close()
    again, run = ahead(engine, tokenizer, 2)
    run.updates = 2
    again.restore(kept.made)
    again.take(2)
    again.settle()
    found = again.under_way(2)
    assert [entry["number"] for entry in found.made] == [2, 3, 4]
    assert found.before is None  # of step 2 nobody knows any more what the maker was before it
    assert again.under_way(4).before is not None
    again.close()


def test_attempts_and_their_counts(engine: Engine, tokenizer: ChatTokenizer) -> None:
    made = AtOnce(making(engine, tokenizer, OverVersion(dropped=2))).take(4)
    assert made.reports["pairs"] == DropReport(1, {"identical": 2})
    assert made.generated_tokens == 6 and made.metrics == {"made": 4.0}
    with pytest.raises(TrainingError, match="step 5: 1 prompts gave no usable pair in 3 attempts"):
        AtOnce(making(engine, tokenizer, OverVersion(dropped=3))).take(4)


def test_made_through_json() -> None:
    pair = PreferencePair("a", (1,), (2,), (3,), 0.5, {"x": [1, 2]}, (4, 5))
    answer = Completion("b", (7, 2), (-0.25, -1.5), FinishReason.LENGTH, WeightSet.EMA, 3, 1)
    made = Made(
        [pair], 3, 2, 1, {"m": 1.0}, {"r": DropReport(1, {"x": 2}, {"x": "f"})}, [((1,), answer)]
    )
    assert Made.of_json(made.to_json()) == made
