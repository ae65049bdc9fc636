"""A rollout server without a model, for the tests of what happens when servers fail:

    python stub_engine.py SPEC.json

Everything but the model is real: process, port, routes, weights with versions. An answer is a
function of prompt, seed and weights. Its faults are in faults.json in the spec's model folder, read
anew at every answer; a fault named {"start": n} holds for the n-th start alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_selfpref.errors import RolloutError, RolloutRefused, StaleWeightsError, WeightSyncError
from nemo_selfpref.files import write_text
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.app import create_app
from nemo_selfpref.rollout.serving.auth import read_token
from nemo_selfpref.rollout.serving.engine_process import serve
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec
from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    FolderSource,
    GenerateCall,
    Health,
    Info,
    LabelRecord,
    LabelsCall,
    Stamp,
    UpdateReport,
    WeightsCall,
)
from nemo_selfpref.types import FinishReason, WeightSet

INITIAL = Stamp(version=-1, digest="initial")


def stub_answer(prompt: list[int], seed: int, stamp: Stamp) -> list[int]:
    """The tokens every stub answers with."""
    text = json.dumps([prompt, seed, stamp.version, stamp.digest])
    return list(hashlib.sha256(text.encode()).digest()[:4])


def stub_scores(prompt: list[int], labels: list[int], stamp: Stamp) -> list[float]:
    return [-1.0 - stub_answer(prompt, label, stamp)[0] for label in labels]


class StubBackend:
    """Backend: see there."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec, self.folder = spec, Path(spec.model)
        self.start = self._count_start()
        first = self.fault("starts_with")
        stamp = INITIAL if first is None else Stamp.model_validate(first)
        self.held = {WeightSet(name): stamp for name in spec.weight_sets}
        self.runs: dict[WeightSet, str] = {}
        self.answered = self.running = 0
        self.asleep = False
        self.idle = threading.Condition()
        self.beat = time.monotonic()
        threading.Thread(target=self._beat, daemon=True).start()

    def _count_start(self) -> int:
        path = self.folder / "starts"
        started = int(path.read_text()) + 1 if path.exists() else 1
        path.write_text(str(started))
        return started

    def fault(self, name: str) -> Any:
        """The fault's setting, or None. {"answer_s": 0.1} holds always,
        {"die_after": {"start": 1, "value": 3}} for the first start."""
        try:
            found = json.loads((self.folder / "faults.json").read_text()).get(name)
        except FileNotFoundError:
            return None
        if isinstance(found, dict) and "start" in found:
            return found["value"] if found["start"] == self.start else None
        return found

    def _beat(self) -> None:
        while True:
            if not self.fault("dead_engine"):
                self.beat = time.monotonic()
            time.sleep(0.02)

    def info(self) -> Info:
        return Info(
            engine="stub",
            versions={"stub": "1"},
            model=self.spec.model,
            dtype=self.spec.dtype,
            vocab_size=self.fault("vocab_size") or 500,
            max_length=self.spec.max_length,
            stop_ids=list(self.spec.stop_ids),
            tokenizer_sha256=self.spec.tokenizer_sha256,
            weight_sets=list(self.spec.weight_sets),
            memory={"weights": 100, "kv_cache": 10},
            max_temperature=self.fault("max_temperature"),
            max_labels=self.fault("max_labels"),
        )

    def health(self) -> Health:
        reason = self.fault("quarantined") or ""
        status = "quarantined" if reason else "sleeping" if self.asleep else "serving"
        return Health(
            status=status,
            reason=reason,
            beat_age_s=time.monotonic() - self.beat,
            running=self.running,
            weights={name.value: stamp for name, stamp in self.held.items()},
        )

    def check(self, call: GenerateCall | LabelsCall) -> None:
        held = self.held.get(call.weight_set)
        if held is None:
            raise RolloutError(f"no {call.weight_set.value} weights are held here")
        if call.expect is not None and call.expect != held:
            raise StaleWeightsError(f"{call.expect} were asked for; {held} are held")
        if self.fault("refuse_at_once"):
            raise RolloutRefused("no stub can be asked that")

    def generate(
        self, call: GenerateCall, emit: Callable[[CompletionRecord], None], until: Until
    ) -> None:
        def answer(number: int, stamp: Stamp) -> None:
            request = call.requests[number]
            tokens = stub_answer(request.prompt_ids, request.seed, stamp)
            emit(
                CompletionRecord(
                    id=request.id,
                    token_ids=tokens,
                    logprobs=[-0.5] * len(tokens),
                    finish_reason=FinishReason.LENGTH,
                    weight_set=call.weight_set,
                    weight_version=stamp.version,
                    weight_digest=stamp.digest,
                )
            )

        self._each(call, len(call.requests), answer, until)

    def label_scores(
        self, call: LabelsCall, emit: Callable[[LabelRecord], None], until: Until
    ) -> None:
        def answer(number: int, stamp: Stamp) -> None:
            scores = stub_scores(call.prompts[number], call.labels, stamp)
            emit(LabelRecord(index=number, logprobs=scores, best=max(scores)))

        self._each(call, len(call.prompts), answer, until)

    def _each(
        self,
        call: GenerateCall | LabelsCall,
        count: int,
        answer: Callable[[int, Stamp], None],
        until: Until,
    ) -> None:
        with self.idle:
            self.check(call)
            stamp = self.held[call.weight_set]
            self.running += 1
        try:
            for number in range(count):
                self._work(until)
                answer(number, stamp)
                self.answered += 1
        finally:
            with self.idle:
                self.running -= 1
                self.idle.notify_all()

    def _work(self, until: Until) -> None:
        """The time an answer takes, and what may befall the engine meanwhile."""
        if self.answered == self.fault("die_after"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.answered == self.fault("silent_after"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.fault("refuse_answers"):
            raise RolloutError("this stub refuses to answer")
        if self.fault("refuse_question"):
            raise RolloutRefused("no stub can answer that")
        end = time.monotonic() + (self.fault("answer_s") or 0.0)
        while time.monotonic() < end or self.fault("dead_engine"):
            until.check("the stub's answer")
            time.sleep(0.01)
        until.check("the stub's answer")

    def update(self, call: WeightsCall) -> UpdateReport:
        manifest = call.manifest
        name = manifest.weight_set
        if self.fault("refuse_updates"):
            raise WeightSyncError("this stub refuses weights")
        if not isinstance(call.source, FolderSource) or name not in self.held:
            raise WeightSyncError("not a folder, or not a set of this stub's")
        sent = json.loads((Path(call.source.folder) / "manifest.json").read_text())
        if sent["digest"] != manifest.digest:
            raise WeightSyncError("the folder holds other weights")
        if self.runs.get(name) == manifest.run and manifest.version < self.held[name].version:
            raise WeightSyncError(f"{manifest.stamp} is older than {self.held[name]}: refused")
        with self.idle:
            if not self.idle.wait_for(lambda: self.running == 0, call.timeout_s):
                raise WeightSyncError("what runs did not end in time")
            time.sleep(self.fault("update_s") or 0.0)
            self.held[name], self.runs[name] = manifest.stamp, manifest.run
        return UpdateReport(
            stamp=manifest.stamp, wait_s=0.0, verify_s=0.0, load_s=0.01, probe_s=0.0
        )

    def sleep(self) -> None:
        if self.fault("cannot_sleep"):
            raise RolloutError("this stub cannot sleep")
        self.asleep = True

    def wake(self) -> None:
        self.asleep = False

    def close(self) -> None:
        pass


def main() -> None:
    spec = EngineSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    backend = StubBackend(spec)

    def ready(port: int) -> None:
        write_text(Path(spec.ready_file), json.dumps({"port": port, "pid": os.getpid()}))

    if backend.fault("no_start"):
        sys.exit("this stub does not start")
    app = create_app(backend, read_token(Path(spec.token_file)))
    serve(app, spec.host, spec.port, ready)


if __name__ == "__main__":
    main()
