"""vLLM in this process as a Backend: engine, the weights it holds, the thread that owns both."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from nemo_selfpref.errors import RolloutError, RolloutTimeout, WeightSyncError
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.engine_line import EngineLine
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec
from nemo_selfpref.rollout.serving.held_weights import INITIAL, HeldWeights
from nemo_selfpref.rollout.serving.limits import check_question
from nemo_selfpref.rollout.serving.manifest import verify_files
from nemo_selfpref.rollout.serving.vllm_engine import VLLMEngine
from nemo_selfpref.rollout.serving.weight_files import facts_of_folder
from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    FolderSource,
    GenerateCall,
    Health,
    Info,
    LabelRecord,
    LabelsCall,
    UpdateReport,
    WeightsCall,
)

__all__ = ["INITIAL", "VLLMBackend"]


class VLLMBackend:
    """Backend over one vLLM engine.

    Raises:
        RolloutError: vLLM cannot load the model.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._root = Path(spec.weights_dir).resolve()
        found = facts_of_folder(Path(spec.model))
        # Sent in the engine's own type, whatever that of the folder is.
        facts = {name: (shape, spec.dtype) for name, (shape, _) in found.items()}
        self._engine = VLLMEngine(spec, facts)
        self._weights = HeldWeights(spec, self._engine)
        self._line = EngineLine(self._engine, self._weights)

    def info(self) -> Info:
        return self._engine.info

    def health(self) -> Health:
        reason = self._line.failure
        status = "quarantined" if reason else "sleeping" if self._engine.asleep else "serving"
        return Health(
            status=status,
            reason=reason,
            beat_age_s=self._line.beat_age_s,
            running=self._line.load,
            weights={name.value: stamp for name, stamp in self._weights.stamps().items()},
        )

    # -- questions ----------------------------------------------------------------------------

    def check(self, call: GenerateCall | LabelsCall) -> None:
        """See Backend.check."""
        if self._line.failure:
            raise RolloutError(f"the engine is quarantined: {self._line.failure}")
        self._weights.check(call)
        check_question(call, self._engine.info)

    def generate(
        self, call: GenerateCall, emit: Callable[[CompletionRecord], None], until: Until
    ) -> None:
        if call.requests:
            self._line.answer(call, emit, until)

    def label_scores(
        self, call: LabelsCall, emit: Callable[[LabelRecord], None], until: Until
    ) -> None:
        if call.prompts:
            self._line.answer(call, emit, until)

    # -- weights ------------------------------------------------------------------------------

    def update(self, call: WeightsCall) -> UpdateReport:
        """See Backend.update. Files are verified while questions are answered; only the loading
        waits for what runs, `timeout_s` at most."""
        manifest, source = call.manifest, call.source
        if not isinstance(source, FolderSource):
            raise WeightSyncError("an engine takes weights from a folder; the server joins groups")
        folder = self._checked_folder(source.folder)
        self._weights.check_manifest(manifest)
        started = time.monotonic()
        verify_files(folder, manifest)
        verified = time.monotonic()
        until = Until.within(call.timeout_s)
        try:
            return self._line.ask(
                lambda: self._weights.install(folder, manifest, verified - started, verified),
                until,
            )
        except RolloutTimeout as error:
            held = self._weights.stamps()[manifest.weight_set]
            raise WeightSyncError(
                f"{manifest.weight_set.value} {manifest.stamp} was not loaded: what runs did not "
                f"end within {call.timeout_s:.0f} s. {held} is served."
            ) from error

    def _checked_folder(self, name: str) -> Path:
        folder = Path(name).resolve()
        if not folder.is_relative_to(self._root):
            raise WeightSyncError(f"{folder} is not below {self._root}: refused")
        return folder

    # -- sleep, the end -----------------------------------------------------------------------

    def sleep(self) -> None:
        if not self.spec.enable_sleep_mode:
            raise RolloutError("this engine cannot sleep: vLLM's sleep mode needs a GPU")
        self._line.ask(self._engine.sleep, Until())

    def wake(self) -> None:
        if self._engine.asleep:
            self._line.ask(self._engine.wake, Until())

    def close(self) -> None:
        self._line.close()
