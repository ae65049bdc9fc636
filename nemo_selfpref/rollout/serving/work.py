"""A call on a fleet as numbered places, each with one answer, and who is asked for which."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.client import ServerClient
from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    GenerateCall,
    LabelRecord,
    LabelsCall,
    Stamp,
)
from nemo_selfpref.types import WeightSet

_LEAST_TIMEOUT_S = 1e-3


class Work(Protocol):
    """A call as numbered places, each with one answer."""

    @property
    def weight_set(self) -> WeightSet: ...

    @property
    def count(self) -> int: ...

    def prompt(self, place: int) -> Sequence[int]: ...

    def cost(self, place: int) -> int:
        """Tokens to come, at most."""
        ...

    def answers(
        self, client: ServerClient, places: Sequence[int], stamp: Stamp, until: Until
    ) -> Iterator[tuple[int, Any]]:
        """Ask one engine for some places."""
        ...

    def give(self, place: int, record: Any) -> None:
        """Hand an answer to whoever asked."""
        ...


def _timeout(until: Until) -> float | None:
    left = until.remaining
    return None if left is None else max(left, _LEAST_TIMEOUT_S)


@dataclass
class GenerateWork:
    call: GenerateCall
    emit: Callable[[CompletionRecord], None]

    @property
    def weight_set(self) -> WeightSet:
        return self.call.weight_set

    @property
    def count(self) -> int:
        return len(self.call.requests)

    def prompt(self, place: int) -> Sequence[int]:
        return self.call.requests[place].prompt_ids

    def cost(self, place: int) -> int:
        return self.call.limit(place)

    def answers(
        self, client: ServerClient, places: Sequence[int], stamp: Stamp, until: Until
    ) -> Iterator[tuple[int, CompletionRecord]]:
        # Ids are the caller's and may repeat; places do not.
        named = [self.call.requests[p].model_copy(update={"id": str(p)}) for p in places]
        part = self.call.model_copy(
            update={"requests": named, "expect": stamp, "timeout_s": _timeout(until)}
        )
        for record in client.stream_generate(part, until):
            yield int(record.id), record

    def give(self, place: int, record: CompletionRecord) -> None:
        self.emit(record.model_copy(update={"id": self.call.requests[place].id}))


@dataclass
class LabelsWork:
    call: LabelsCall
    emit: Callable[[LabelRecord], None]

    @property
    def weight_set(self) -> WeightSet:
        return self.call.weight_set

    @property
    def count(self) -> int:
        return len(self.call.prompts)

    def prompt(self, place: int) -> Sequence[int]:
        return self.call.prompts[place]

    def cost(self, place: int) -> int:
        return 1

    def answers(
        self, client: ServerClient, places: Sequence[int], stamp: Stamp, until: Until
    ) -> Iterator[tuple[int, LabelRecord]]:
        part = self.call.model_copy(
            update={
                "prompts": [self.call.prompts[p] for p in places],
                "expect": stamp,
                "timeout_s": _timeout(until),
            }
        )
        for record in client.stream_labels(part, until):
            yield places[record.index], record

    def give(self, place: int, record: LabelRecord) -> None:
        self.emit(record.model_copy(update={"index": place}))


def tokens(work: Work, places: Sequence[int]) -> int:
    """To read and to write, at most; a prompt is read once however many answers it gets."""
    prompts = {tuple(work.prompt(place)) for place in places}
    return sum(map(len, prompts)) + sum(map(work.cost, places))


def share_out(work: Work, places: Sequence[int], loads: Sequence[int]) -> list[list[int]]:
    """Places for each of several engines, balanced by tokens on top of what each has to do already.
    All answers to one prompt come from one engine, which then reads it once."""
    by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place in places:
        by_prompt[tuple(work.prompt(place))].append(place)
    groups = [(tokens(work, group), group) for group in by_prompt.values()]
    shares: list[list[int]] = [[] for _ in loads]
    totals = list(loads)
    for cost, group in sorted(groups, key=lambda pair: -pair[0]):
        least = totals.index(min(totals))
        shares[least] += group
        totals[least] += cost
    return [sorted(share) for share in shares]
