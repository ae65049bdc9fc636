"""More calls than a server takes at a time: further ones wait, and are told that they do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator

import httpx
import pytest
from app_server import running

from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving import app as module
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
from nemo_selfpref.types import FinishReason

TOKEN = "t" * 32
BODY = {"requests": [{"id": "0", "prompt_ids": [5]}], "params": {"max_new_tokens": 1}}


class HeldBackend:
    """Answers once it is released, or ends when nobody wants the answer any more."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.begun = threading.Semaphore(0)

    def check(self, call: GenerateCall | LabelsCall) -> None:
        pass

    def generate(
        self, call: GenerateCall, emit: Callable[[CompletionRecord], None], until: Until
    ) -> None:
        self.begun.release()
        while not self.released.wait(0.01):
            until.check("the answer")
        for request in call.requests:
            emit(
                CompletionRecord(
                    id=request.id,
                    token_ids=[7],
                    logprobs=[-1.0],
                    finish_reason=FinishReason.LENGTH,
                    weight_set=call.weight_set,
                    weight_version=0,
                    weight_digest="d",
                )
            )

    def label_scores(
        self, call: LabelsCall, emit: Callable[[LabelRecord], None], until: Until
    ) -> None:
        raise AssertionError("nobody asks for labels here")

    def health(self) -> Health:
        return Health(status="serving")

    def info(self) -> Info:
        raise AssertionError("nobody asks here")

    def update(self, call: WeightsCall) -> UpdateReport:
        raise AssertionError("nobody sends weights here")

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def backend() -> HeldBackend:
    return HeldBackend()


@pytest.fixture
def http(backend: HeldBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    monkeypatch.setattr(module, "MAX_CALLS", 1)
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    with running(module.create_app(backend, TOKEN)) as url:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False) as http:
            yield http
        backend.released.set()


def test_a_call_that_waits_for_its_turn_is_told_so(
    http: httpx.Client, backend: HeldBackend
) -> None:
    with (
        http.stream("POST", "/rollout/generate", json=BODY) as first,
        http.stream("POST", "/rollout/generate", json=BODY) as second,
    ):
        assert backend.begun.acquire(timeout=30)
        lines = second.iter_lines()
        assert [next(lines) for _ in range(5)] == ["{}"] * 5
        assert not backend.begun.acquire(blocking=False)
        assert http.get("/rollout/health").status_code == 200
        backend.released.set()
        for reply in (first.iter_lines(), lines):
            said = [json.loads(line) for line in reply]
            assert said[-1] == {"done": 1} and said[-2]["completion"]["token_ids"] == [7]


@pytest.mark.parametrize("leaves", ["while it waits", "while it is answered"])
def test_a_caller_that_leaves_gives_its_turn_back(
    http: httpx.Client, backend: HeldBackend, leaves: str
) -> None:
    for _ in range(3):
        with http.stream("POST", "/rollout/generate", json=BODY) as first:
            assert backend.begun.acquire(timeout=30)
            if leaves == "while it waits":
                with http.stream("POST", "/rollout/generate", json=BODY) as waiting:
                    assert next(waiting.iter_lines()) == "{}"
            assert next(first.iter_lines()) == "{}"
    backend.released.set()
    reply = http.post("/rollout/generate", json=BODY)
    assert json.loads(reply.text.splitlines()[-1]) == {"done": 1}
