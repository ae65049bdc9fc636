"""A RolloutEngine over the wire's records, whoever answers them: every answer is checked."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, TypeVar

from pydantic import ValidationError

from nemo_selfpref.errors import RolloutError, StaleWeightsError
from nemo_selfpref.rollout.engine import FOREVER, Until
from nemo_selfpref.rollout.serving.wire import (
    Call,
    CompletionRecord,
    GenerateCall,
    LabelRecord,
    LabelsCall,
    Line,
    ParamsRecord,
    RequestRecord,
    Stamp,
)
from nemo_selfpref.types import (
    Completion,
    GenerationRequest,
    LabelScores,
    SamplingParams,
    TokenIds,
    WeightSet,
)

_LOOK_S = 0.1
"""How often a wait looks whether it is over."""

OnDone = Callable[[int, int], None]
Question = TypeVar("Question", bound=Call)


class CheckedEngine(ABC):
    """One call is one answer of `_work`, whose lines are waited for and checked here. Safe to use
    from several threads.

    Args:
        name: of who answers, for messages.
        expect: the weights of a set that answers must come from; None takes any.
    """

    def __init__(self, name: str, expect: Callable[[WeightSet], Stamp | None]) -> None:
        self.name, self.expect = name, expect

    @abstractmethod
    def _work(self, call: Call, emit: Callable[[Line], None], until: Until) -> None:
        """Hand every answer to `emit`; return when all are there or `until` is over. Runs in a
        thread of its own."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: OnDone | None = None,
        until: Until = FOREVER,
    ) -> list[Completion]:
        """See RolloutEngine.generate."""
        until.check(self.name)

        def fields() -> dict[str, Any]:
            # Ids are the caller's and may repeat; places do not.
            records = [RequestRecord.of(request) for request in requests]
            placed = [r.model_copy(update={"id": str(i)}) for i, r in enumerate(records)]
            return {"requests": placed, "params": ParamsRecord.of(params)}

        call = self._question(GenerateCall, weight_set, until, fields)
        found: dict[int, Completion] = {}
        with closing(self.stream_generate(call, until)) as answers:
            for record in answers:
                place = int(record.id)
                made = record.model_copy(update={"id": requests[place].id})
                found[place] = made.completion()
                if on_done is not None:
                    on_done(1, len(record.token_ids))
        return [found[i] for i in range(len(requests))]

    def label_scores(
        self,
        prompts: Sequence[TokenIds],
        labels: TokenIds,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: OnDone | None = None,
        until: Until = FOREVER,
    ) -> list[LabelScores]:
        """See RolloutEngine.label_scores."""
        until.check(self.name)

        def fields() -> dict[str, Any]:
            return {"prompts": [list(p) for p in prompts], "labels": list(labels)}

        call = self._question(LabelsCall, weight_set, until, fields)
        found: dict[int, LabelScores] = {}
        with closing(self.stream_labels(call, until)) as answers:
            for record in answers:
                found[record.index] = record.scores()
                if on_done is not None:
                    on_done(1, 0)
        return [found[i] for i in range(len(prompts))]

    def _question(
        self,
        kind: type[Question],
        weight_set: WeightSet,
        until: Until,
        fields: Callable[[], dict[str, Any]],
    ) -> Question:
        left = until.remaining
        try:
            return kind(
                weight_set=weight_set,
                expect=self.expect(weight_set),
                timeout_s=None if left is None else max(left, 1e-3),
                **fields(),
            )
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RolloutError(
                f"this cannot be asked of {self.name}: {where}: {first['msg']}, "
                f"got {str(first['input'])[:100]}"
            ) from error

    def stream_generate(
        self, call: GenerateCall, until: Until = FOREVER
    ) -> Generator[CompletionRecord, None, None]:
        """Completions as they come, each asked for and each once.

        Raises:
            RolloutError: who answers failed, or broke the contract.
        """
        wanted = {r.id for r in call.requests}
        if len(wanted) != len(call.requests):
            raise RolloutError("a request's id comes twice in one call: expected each once")
        for line in self._lines(call, len(wanted), until):
            record = line.completion
            if record is None or record.id not in wanted:
                raise self._broken(f"an answer nobody asked for: {str(line)[:200]}")
            self._check_weights(call, record)
            if len(record.token_ids) != len(record.logprobs) or not record.token_ids:
                raise self._broken(
                    f"{len(record.token_ids)} tokens with {len(record.logprobs)} log-probs"
                )
            wanted.remove(record.id)
            yield record
        if wanted:
            raise self._broken(f"{len(wanted)} of {len(call.requests)} answers did not come")

    def stream_labels(
        self, call: LabelsCall, until: Until = FOREVER
    ) -> Generator[LabelRecord, None, None]:
        """The same for label scores."""
        wanted = set(range(len(call.prompts)))
        for line in self._lines(call, len(wanted), until):
            record = line.label
            if record is None or record.index not in wanted:
                raise self._broken(f"a score nobody asked for: {str(line)[:200]}")
            if len(record.logprobs) != len(call.labels):
                raise self._broken(f"{len(record.logprobs)} scores for {len(call.labels)} labels")
            wanted.remove(record.index)
            yield record
        if wanted:
            raise self._broken(f"{len(wanted)} of {len(call.prompts)} scores did not come")

    def _check_weights(self, call: GenerateCall, record: CompletionRecord) -> None:
        got = Stamp(version=record.weight_version, digest=record.weight_digest)
        if record.weight_set != call.weight_set or (call.expect and got != call.expect):
            raise StaleWeightsError(
                f"{self.name} answered with {record.weight_set.value} {got}, asked for "
                f"{call.weight_set.value} {call.expect or ''}: the answer is refused"
            )

    def _lines(self, call: Call, count: int, until: Until) -> Iterator[Line]:
        """The lines of one call. Who waits looks at `until` all the while, not only when a line
        comes: whoever answers may hang."""
        if count == 0:
            return
        lines: queue.SimpleQueue[Line | BaseException | None] = queue.SimpleQueue()
        gone = threading.Event()

        def run() -> None:
            try:
                self._work(call, lines.put, Until(until.deadline, gone.is_set))
            except BaseException as error:
                lines.put(error)
            finally:
                lines.put(None)

        threading.Thread(target=run, daemon=True).start()
        try:
            while True:
                until.check(self.name)
                try:
                    item = lines.get(timeout=_LOOK_S)
                except queue.Empty:
                    continue
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            gone.set()

    def _broken(self, what: str) -> RolloutError:
        return RolloutError(f"{self.name} broke the contract: {what}")
