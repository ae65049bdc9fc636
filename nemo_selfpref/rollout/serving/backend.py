"""What stands behind a rollout server's routes: one engine, or a fleet of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    GenerateCall,
    Health,
    Info,
    LabelRecord,
    LabelsCall,
    UpdateReport,
    WeightsCall,
)


class Backend(Protocol):
    """Every method may be called from several threads at once and blocks until it is done."""

    def info(self) -> Info: ...

    def health(self) -> Health: ...

    def check(self, call: GenerateCall | LabelsCall) -> None:
        """Refuse a call before any work.

        Raises:
            StaleWeightsError: other weights than `call.expect` are held.
            RolloutError: a prompt that is empty or too long, or a set that is not held.
        """
        ...

    def generate(
        self, call: GenerateCall, emit: Callable[[CompletionRecord], None], until: Until
    ) -> None:
        """Hand each completion to `emit` once it is there; returns when all are.

        Raises:
            StaleWeightsError: the weights changed between the check and the sampling.
            RolloutTimeout, RolloutCancelled: `until` was over; what ran was aborted.
            RolloutError: the engine failed.
        """
        ...

    def label_scores(
        self, call: LabelsCall, emit: Callable[[LabelRecord], None], until: Until
    ) -> None:
        """The same for label scores."""
        ...

    def update(self, call: WeightsCall) -> UpdateReport:
        """Take in new weights: all of them, or none.

        Raises:
            WeightSyncError: refused or failed; says what is held now.
        """
        ...

    def sleep(self) -> None:
        """Give the GPU's memory back until `wake`."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None: ...
