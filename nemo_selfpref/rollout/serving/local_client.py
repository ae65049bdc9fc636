"""A backend in this very process as a RolloutEngine, without a server between."""

from __future__ import annotations

from collections.abc import Callable

from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.backend import Backend
from nemo_selfpref.rollout.serving.checked_engine import CheckedEngine
from nemo_selfpref.rollout.serving.wire import Call, GenerateCall, LabelsCall, Line, Stamp
from nemo_selfpref.types import WeightSet


class BackendEngine(CheckedEngine):
    """RolloutEngine over any Backend; what it asks and accepts is what ServerClient does."""

    def __init__(
        self, backend: Backend, expect: Callable[[WeightSet], Stamp | None] = lambda _: None
    ) -> None:
        super().__init__("the engine of this process", expect)
        self.backend = backend

    def _work(self, call: Call, emit: Callable[[Line], None], until: Until) -> None:
        if isinstance(call, GenerateCall):
            self.backend.check(call)
            self.backend.generate(call, lambda record: emit(Line(completion=record)), until)
        elif isinstance(call, LabelsCall):
            self.backend.check(call)
            self.backend.label_scores(call, lambda record: emit(Line(label=record)), until)
