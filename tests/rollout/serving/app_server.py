"""A server's app on a port of this process, and a backend for it that samples with a real model."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from stub_fleet import eventually

from nemo_selfpref.errors import RolloutError, StaleWeightsError
from nemo_selfpref.rollout.engine import RolloutEngine, Until
from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    GenerateCall,
    Health,
    Info,
    LabelRecord,
    LabelsCall,
    Stamp,
    UpdateReport,
    WeightsCall,
)
from nemo_selfpref.types import WeightSet

TOKEN = "t" * 32
MAX_LENGTH = 128


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The url of an app that answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="critical", access_log=False, lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


class ModelBackend:
    """A Backend over engines of this process, one for each set of weights."""

    def __init__(self, engines: Mapping[str, RolloutEngine], stop_ids: frozenset[int]) -> None:
        self.engines = engines
        self.stamps = {name: Stamp(version=n, digest=name * 9) for n, name in enumerate(engines)}
        self.given: list[GenerateCall] = []
        self.ended: list[BaseException | None] = []
        self.wait: Callable[[Until], None] = lambda _: None
        """Done before an answer: an engine may be busy."""
        self._lock = threading.Lock()
        self._info = Info(
            engine="embedded",
            versions={},
            model="llama",
            dtype="float32",
            vocab_size=500,
            max_length=MAX_LENGTH,
            stop_ids=sorted(stop_ids),
            tokenizer_sha256="0" * 64,
            weight_sets=list(engines),
            memory={},
        )

    def info(self) -> Info:
        return self._info

    def health(self) -> Health:
        return Health(status="serving", weights=self.stamps)

    def check(self, call: GenerateCall | LabelsCall) -> None:
        if call.expect not in (None, self.stamps[call.weight_set.value]):
            raise StaleWeightsError("others are held")

    def generate(
        self, call: GenerateCall, emit: Callable[[CompletionRecord], None], until: Until
    ) -> None:
        self.given.append(call)
        try:
            self.wait(until)
            self._generate(call, emit, until)
        except BaseException as error:
            self.ended.append(error)
            raise
        self.ended.append(None)

    def _generate(
        self, call: GenerateCall, emit: Callable[[CompletionRecord], None], until: Until
    ) -> None:
        name = call.weight_set
        requests = [record.request() for record in call.requests]
        with self._lock:
            engine = self.engines[name.value]
            found = engine.generate(requests, call.params.params(), WeightSet.POLICY, until=until)
        for completion in found:
            record = CompletionRecord.of(completion, self.stamps[name.value].digest)
            version = self.stamps[name.value].version
            emit(record.model_copy(update={"weight_set": name, "weight_version": version}))

    def label_scores(
        self, call: LabelsCall, emit: Callable[[LabelRecord], None], until: Until
    ) -> None:
        engine = self.engines[call.weight_set.value]
        prompts = [tuple(prompt) for prompt in call.prompts]
        for index, scores in enumerate(engine.label_scores(prompts, tuple(call.labels))):
            emit(LabelRecord(index=index, logprobs=list(scores.logprobs), best=scores.best))

    def update(self, call: WeightsCall) -> UpdateReport:
        raise RolloutError("these weights stay as they are")

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...
