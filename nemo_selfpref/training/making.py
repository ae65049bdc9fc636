"""The making of an online step's pairs: at once, or ahead of the trainer in a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from nemo_selfpref.algorithms.base import PairMaker
from nemo_selfpref.errors import RolloutCancelled, TrainingError
from nemo_selfpref.training.rollout_check import Sampled
from nemo_selfpref.training.rollouts import EngineRollouts
from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    FinishReason,
    PreferencePair,
    WeightSet,
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
    metrics: Mapping[str, float]
    reports: Mapping[str, DropReport]
    sampled: list[Sampled] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything but the pairs' messages, which stay with the data."""
        return {
            "pairs": [asdict(replace(p, messages=())) for p in self.pairs],
            "updates": self.updates,
            "generated_tokens": self.generated_tokens,
            "metrics": dict(self.metrics),
            "reports": {title: asdict(report) for title, report in self.reports.items()},
            "sampled": [[list(prompt), asdict(c)] for prompt, c in self.sampled],
        }

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Made:
        return cls(
            pairs=[_pair(row) for row in value["pairs"]],
            updates=value["updates"],
            generated_tokens=value["generated_tokens"],
            metrics=value["metrics"],
            reports={title: DropReport(**r) for title, r in value["reports"].items()},
            sampled=[(tuple(prompt), completion_of_json(row)) for prompt, row in value["sampled"]],
        )


def _pair(row: Mapping[str, Any]) -> PreferencePair:
    ids = ("prompt_ids", "chosen_ids", "rejected_ids", "augmented_prompt_ids")
    tokens = {name: None if row[name] is None else tuple(row[name]) for name in ids}
    return PreferencePair(**{**row, **tokens, "messages": ()})


def completion_of_json(row: Mapping[str, Any]) -> Completion:
    """A completion out of what asdict made of it, through JSON."""
    return Completion(
        **{
            **row,
            "token_ids": tuple(row["token_ids"]),
            "logprobs": tuple(row["logprobs"]),
            "finish_reason": FinishReason(row["finish_reason"]),
            "weight_set": WeightSet(row["weight_set"]),
        }
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
        tokens = 0
        for attempt in range(_ATTEMPTS):
            asked = self._rollouts.within(self._scope, number, attempt)
            pairs = self.maker.pairs(number, asked, rows)
            tokens += asked.generated_tokens
            for title, report in asked.reports.items():
                reports.setdefault(title, DropReport()).add(report)
            if pairs:
                return Made(pairs, updates, tokens, asked.metrics, reports, asked.sampled)
        dropped = "; ".join(f"{title}: {report.summary()}" for title, report in reports.items())
        raise TrainingError(
            f"step {number + 1}: {len(rows)} prompts gave no usable pair in {_ATTEMPTS} attempts "
            f"({dropped}). The policy may have collapsed; raise rollout.temperature, or lower the "
            "learning rate and resume."
        )


class PairSource(Protocol):
    """Where an online stage gets the pairs of its steps from."""

    def take(self, number: int) -> Made:
        """The pairs of step `number`, before which as many updates were made. Collective."""
        ...

    def remake(self, number: int) -> Made:
        """The pairs of a step that was taken, from the weights as they are. Collective."""
        ...

    def under_way(self) -> list[dict[str, Any]]:
        """What is made and not taken yet, as JSON; waits for what is being made."""
        ...

    def restore(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Take back what under_way gave."""
        ...

    def close(self) -> None: ...


class AtOnce:
    """Pairs made when they are taken, by every rank together."""

    def __init__(self, making: Making) -> None:
        self.making = making

    def take(self, number: int) -> Made:
        return self.making.make(number, number)

    def remake(self, number: int) -> Made:
        return self.making.make(number, number)

    def under_way(self) -> list[dict[str, Any]]:
        return []

    def restore(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Steps made ahead before are made anew, from weights that are newer."""

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


class Ahead:
    """Pairs made in a thread of the first rank while the trainer is at work on earlier steps.

    Step m is made from the weights after max(0, m - S) updates, S being the staleness: which
    weights a step's pairs come from is a matter of its number, not of time, so a run gives the
    same pairs however fast its engines are. At most S steps are under way, and each is made by
    one thread in turn, so memory is bounded and no batch of answers spans two versions.
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
        self._pending: deque[tuple[int, Future[dict[str, Any]]]] = deque()
        self._pool: ThreadPoolExecutor | None = None
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
            place, future = self._pending[0]
            assert place == number, f"step {place} was made for step {number}"
        made = Made.of_json(self.access.share(future))
        if self.main:  # only now: what failed is made anew after a resume
            self._pending.popleft()
        return made

    def _start_next(self, number: int) -> None:
        """Begin what may be made from the weights as they are: up to step `number` + S."""
        first = number if self._started_to is None else self._started_to
        last = min(number + self.staleness + 1, self.num_steps)
        if first >= last:
            return
        give = self.access.hand_over()
        self._started_to = last
        if not self.main:
            return
        for m in range(first, last):
            self._pending.append((m, self._begin(m, number, give)))

    def _begin(self, number: int, updates: int, give: Callable[[], None]) -> Future[dict[str, Any]]:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")

        def work() -> dict[str, Any]:
            if self._stop.is_set():
                raise RolloutCancelled("the stage ended before its pairs were made")
            if self._failure is not None:
                # The maker must not go on to later steps without the one that failed.
                raise self._failure
            try:
                give()
                return self.making.make(number, updates).to_json()
            except Exception as error:
                self._failure = error
                raise
            finally:
                self.access.rest()

        return self._pool.submit(work)

    def remake(self, number: int) -> Made:
        """See PairSource.remake."""
        give = self.access.hand_over()
        future = self._begin(number, number, give) if self.main else None
        return Made.of_json(self.access.share(future))

    def under_way(self) -> list[dict[str, Any]]:
        """Steps made and not yet taken, once they are done; those that fail are left out, to be
        made anew. Their pairs come from weights that are no more, so a checkpoint keeps them."""
        made: list[dict[str, Any]] = []
        for number, future in self._pending:
            if future.exception() is not None:
                break
            made.append({"number": number, **future.result()})
        return made

    def restore(self, kept: Sequence[Mapping[str, Any]]) -> None:
        """Take back what under_way gave."""
        for entry in kept:
            number = entry["number"]
            self._started_to = number + 1
            if self.main:
                done: Future[dict[str, Any]] = Future()
                done.set_result({k: v for k, v in entry.items() if k != "number"})
                self._pending.append((number, done))

    def close(self) -> None:
        """End the thread; what it waits for is cancelled (`stop` is set)."""
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
