"""The contract of a rollout engine: token ids in, token ids out, every answer tagged with the
version of the weights that made it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from nemo_selfpref.types import (
    Completion,
    GenerationRequest,
    LabelScores,
    SamplingParams,
    TokenIds,
    WeightSet,
)


class RolloutEngine(Protocol):
    """Samples completions, and weighs labels as the next token."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """One completion for each request, in the order of the requests.

        A completion depends on its prompt, seed, parameters and the weights alone, not on the
        other requests or on the parallel layout, up to a draw that lies within the logits' rounding
        of the border between two tokens. `on_done(completions, tokens)` reports progress.

        Raises:
            RolloutError: a prompt is empty or too long for the model, or the weight set is one
                this engine does not hold.
        """
        ...

    def label_scores(
        self,
        prompts: Sequence[TokenIds],
        labels: TokenIds,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: Callable[[int, int], None] | None = None,
    ) -> list[LabelScores]:
        """Log-probs of the label tokens right after each prompt, in the order of the prompts.

        Raises:
            RolloutError: as in generate.
        """
        ...
