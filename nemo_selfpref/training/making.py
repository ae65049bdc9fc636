"""The making of an online step's pairs: at once, or ahead of the trainer in a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from nemo_selfpref.algorithms.base import PairMaker
from nemo_selfpref.errors import RolloutCancelled, TrainingError
from nemo_selfpref.training.rollout_check import Sampled
from nemo_selfpref.training.rollouts import EngineRollouts
from nemo_selfpref.training.store import completion_of, pair_of
from nemo_selfpref.types import (
    Demonstration,
    DropReport,
    PreferencePair,
)

_ATTEMPTS = 3
"""How often a step samples again when not one usable pair came out."""


@dataclass(frozen=True)
class Made:
    """What the rollouts of one step came to. `updates`: optimizer steps in the weights they were
    sampled with; `sampled`: some of the answers, to be checked."""

    pairs: list[PreferencePair]
    updates: int
    generated_tokens: int
    cached_tokens: int
    metrics: Mapping[str, float]
    reports: Mapping[str, DropReport]
    sampled: list[Sampled] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything but the pairs' messages, which stay with the data."""
        return {
            "pairs": [asdict(replace(p, messages=())) for p in self.pairs],
            "updates": self.updates,
            "generated_tokens": self.generated_tokens,
            "cached_tokens": self.cached_tokens,
            "metrics": dict(self.metrics),
            "reports": {title: asdict(report) for title, report in self.reports.items()},
            "dropped": {title: report.every for title, report in self.reports.items()},
            "sampled": [[list(prompt), asdict(c)] for prompt, c in self.sampled],
        }

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Made:
        reports = {title: DropReport(**r) for title, r in value["reports"].items()}
        for title, rows in value["dropped"].items():
            reports[title].every += [(reason, row) for reason, row in rows]
        return cls(
            pairs=[pair_of(row) for row in value["pairs"]],
            updates=value["updates"],
            generated_tokens=value["generated_tokens"],
            cached_tokens=value.get("cached_tokens", 0),
            metrics=value["metrics"],
            reports=reports,
            sampled=[(tuple(prompt), completion_of(row)) for prompt, row in value["sampled"]],
        )


class Making:
    """Makes the pairs of one step after another, in order.

    Args:
        rows_of: the prompts of a step.
        rollouts: asks the engine; used by whichever thread makes.
        scope: names the stage in every seed.
    """

    def __init__(
        self,
        maker: PairMaker,
        rows_of: Callable[[int], Sequence[Demonstration]],
        rollouts: EngineRollouts,
        scope: str,
    ) -> None:
        self.maker, self._rows_of, self._rollouts, self._scope = maker, rows_of, rollouts, scope

    def make(self, number: int, updates: int) -> Made:
        """The pairs of step `number` from weights after `updates` optimizer steps.

        Raises:
            TrainingError: not one usable pair, in several attempts.
        """
        rows = self._rows_of(number)
        reports: dict[str, DropReport] = {}
        tokens = cached = 0
        for attempt in range(_ATTEMPTS):
            asked = self._rollouts.within(self._scope, number, attempt)
            pairs = self.maker.pairs(number, asked, rows)
            tokens += asked.generated_tokens
            cached += asked.cached_tokens
            for title, report in asked.reports.items():
                reports.setdefault(title, DropReport()).add(report)
            if pairs:
                return Made(pairs, updates, tokens, cached, asked.metrics, reports, asked.sampled)
        dropped = "; ".join(f"{title}: {report.summary()}" for title, report in reports.items())
        raise TrainingError(
            f"step {number + 1}: {len(rows)} prompts gave no usable pair in {_ATTEMPTS} attempts "
            f"({dropped}). The policy may have collapsed; raise rollout.temperature, or lower the "
            "learning rate and resume."
        )


Kept = tuple[list[PreferencePair], dict[str, Any]]
"""A maker's state, as PairMaker.kept has it."""


@dataclass(frozen=True)
class UnderWay:
    """Steps whose pairs are made and not trained on yet, in order, as JSON.

    before: the maker's state before the first of them, from which they could be made anew; None
    where that is not known any more. after: its state after the last; None for as it is now.
    """

    made: list[dict[str, Any]]
    before: Kept | None = None
    after: Kept | None = None


class PairSource(Protocol):
    """Where an online stage gets the pairs of its steps from."""

    def take(self, number: int) -> Made:
        """The pairs of step `number`, before which as many updates were made. Collective."""
        ...

    def settle(self) -> None:
        """Wait until nothing is being made. Collective, however long it takes."""
        ...

    def under_way(self, done: int) -> UnderWay:
        """What a checkpoint after `done` steps must keep; once settled, on the first rank."""
        ...

    def restore(self, made: Sequence[Mapping[str, Any]]) -> None:
        """Take back the steps that under_way gave."""
        ...

    def close(self) -> None: ...


class AtOnce:
    """Pairs made when they are taken, by every rank together."""

    def __init__(self, making: Making) -> None:
        self.making = making

    def take(self, number: int) -> Made:
        return self.making.make(number, number)

    def settle(self) -> None:
        pass

    def under_way(self, done: int) -> UnderWay:
        return UnderWay([])

    def restore(self, made: Sequence[Mapping[str, Any]]) -> None:
        assert not made, "steps made ahead are of another engine"

    def close(self) -> None:
        pass


class RolloutAccess(Protocol):
    """What a run gives a stage whose pairs its first rank makes (training/service.py)."""

    def hand_over(self) -> Callable[[], None]:
        """Take what the weights are now; the returned call, made later on the first rank and in
        another thread, gives them to the engines. Collective."""
        ...

    def rest(self) -> None:
        """Nothing is asked until the next call that hand_over gives."""
        ...

    def share(self, future: Future[Any] | None) -> Any:
        """The JSON value that the first rank's future comes to, or its error, on every rank; the
        others give None. Collective, however long it takes."""
        ...


@dataclass
class _Begun:
    """A step being made, or made."""

    number: int
    future: Future[dict[str, Any]]
    before: list[Kept] = field(default_factory=list)
    """The maker's state when its making began."""


class Ahead:
    """Pairs made in a thread of the first rank while the trainer is at work on earlier steps.

    Step m is made from the weights after max(0, m - S) updates, S being the staleness: which
    weights a step's pairs come from is a matter of its number, not of time, so a run gives the
    same pairs however fast its engines are. At most S steps are under way, and each is made by
    one thread in turn, so memory is bounded and no batch of answers spans two versions.

    Args:
        main: whether this is the first rank; the others only take part.
        stop: set when the stage ends; what is being asked is cancelled then.
    """

    def __init__(
        self,
        making: Making,
        access: RolloutAccess,
        staleness: int,
        num_steps: int,
        main: bool,
        stop: threading.Event,
    ) -> None:
        self.making, self.access, self.staleness = making, access, staleness
        self.num_steps, self.main, self._stop = num_steps, main, stop
        self._begun: deque[_Begun] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts") if main else None
        self._started_to: int | None = None
        self._failure: Exception | None = None

    def take(self, number: int) -> Made:
        """See PairSource.take.

        Raises:
            RolloutError, TrainingError: on every rank, what the making raised.
        """
        self._start_next(number)
        future = None
        if self.main:
            # Kept until the step after it is taken: a step that fails may be saved before it.
            while self._begun[0].number < number:
                self._begun.popleft()
            assert self._begun[0].number == number, f"step {number} was not begun"
            future = self._begun[0].future
        return Made.of_json(self.access.share(future))

    def _start_next(self, number: int) -> None:
        """Begin what may be made from the weights as they are: up to step `number` + S."""
        first = number if self._started_to is None else self._started_to
        last = min(number + self.staleness + 1, self.num_steps)
        if first >= last:
            return
        give = self.access.hand_over()
        self._started_to = last
        for m in range(first, last) if self.main else ():
            self._begin(m, number, give)

    def _begin(self, number: int, updates: int, give: Callable[[], None]) -> None:
        before: list[Kept] = []

        def work() -> dict[str, Any]:
            if self._stop.is_set():
                raise RolloutCancelled("the stage ended before its pairs were made")
            if self._failure is not None:
                # The maker must not go on to later steps without the one that failed.
                raise self._failure
            try:
                pairs, state = self.making.maker.kept()
                before.append((list(pairs), deepcopy(dict(state))))
                give()
                return self.making.make(number, updates).to_json()
            except Exception as error:
                self._failure = error
                raise
            finally:
                self.access.rest()

        assert self._pool is not None
        self._begun.append(_Begun(number, self._pool.submit(work), before))

    def settle(self) -> None:
        """See PairSource.settle."""
        # One thread takes them in turn: when this is done, so is all before it.
        self.access.share(self._pool.submit(lambda: None) if self._pool is not None else None)

    def under_way(self, done: int) -> UnderWay:
        """See PairSource.under_way. A step that failed is left out, with those behind it: they are
        made anew. The others' pairs come from weights that are no more."""
        left = [begun for begun in self._begun if begun.number >= done]
        before = next(iter(left[0].before), None) if left else None
        made: list[dict[str, Any]] = []
        for begun in left:
            if begun.future.exception() is not None:
                return UnderWay(made, before, next(iter(begun.before), None))
            made.append({"number": begun.number, **begun.future.result()})
        return UnderWay(made, before)

    def restore(self, made: Sequence[Mapping[str, Any]]) -> None:
        """See PairSource.restore."""
        for entry in made:
            self._started_to = entry["number"] + 1
            if self.main:
                done: Future[dict[str, Any]] = Future()
                done.set_result({k: v for k, v in entry.items() if k != "number"})
                self._begun.append(_Begun(entry["number"], done))

    def close(self) -> None:
        """End the thread; what it waits for is cancelled. It may be loading weights, which no one
        waits for here: that ends with the servers."""
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
