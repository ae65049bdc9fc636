"""The contract of a rollout engine: token ids in, token ids out, every answer tagged with the
version of the weights that made it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nemo_selfpref.errors import RolloutCancelled, RolloutTimeout
from nemo_selfpref.types import (
    Completion,
    GenerationRequest,
    LabelScores,
    SamplingParams,
    TokenIds,
    WeightSet,
)


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Until:
    """When to give up waiting: at a moment of time.monotonic(), or when no longer wanted."""

    deadline: float | None = None
    cancelled: Callable[[], bool] = _never

    @classmethod
    def within(cls, seconds: float | None, cancelled: Callable[[], bool] = _never) -> Until:
        return cls(None if seconds is None else time.monotonic() + seconds, cancelled)

    @property
    def remaining(self) -> float | None:
        """Seconds left, at least 0; None for no end."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    @property
    def over(self) -> bool:
        return self.cancelled() or self.remaining == 0.0

    def check(self, what: str) -> None:
        """Raise RolloutCancelled or RolloutTimeout where it is over; `what` was waited for."""
        if self.cancelled():
            raise RolloutCancelled(f"{what}: cancelled")
        if self.remaining == 0.0:
            raise RolloutTimeout(f"{what}: not done by the deadline")


FOREVER = Until()


class RolloutEngine(Protocol):
    """Samples completions, and weighs labels as the next token."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: Callable[[int, int], None] | None = None,
        until: Until = FOREVER,
    ) -> list[Completion]:
        """One completion for each request, in the order of the requests.

        A completion depends on its prompt, seed, parameters and the weights alone, not on the
        other requests or on the parallel layout, up to a draw that lies within the logits' rounding
        of the border between two tokens. `on_done(completions, tokens)` reports progress.

        Raises:
            RolloutError: a prompt is empty or too long for the model, or the weight set is one
                this engine does not hold.
            RolloutTimeout, RolloutCancelled: `until` was over first; nothing is returned.
        """
        ...

    def label_scores(
        self,
        prompts: Sequence[TokenIds],
        labels: TokenIds,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: Callable[[int, int], None] | None = None,
        until: Until = FOREVER,
    ) -> list[LabelScores]:
        """Log-probs of the label tokens right after each prompt, in the order of the prompts.

        Raises:
            RolloutError: as in generate.
        """
        ...
