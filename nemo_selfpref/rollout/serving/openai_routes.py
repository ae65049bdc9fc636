"""The part of OpenAI's interface that a rollout server speaks, for any OpenAI client to look at
the weights it holds: each set of weights is a model.

Engines hand over whole answers. A stream therefore brings an answer in one chunk, and a stop string
cuts the text of an answer that was sampled to its end.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import SelfPrefError
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.app import BEAT_S, MAX_CALLS, in_thread
from nemo_selfpref.rollout.serving.backend import Backend
from nemo_selfpref.rollout.serving.openai_calls import (
    ApiError,
    ChatCall,
    CompletionsCall,
    read_call,
)
from nemo_selfpref.rollout.serving.openai_forms import (
    Answer,
    ChatReply,
    CompletionsReply,
    Fields,
    Reply,
)
from nemo_selfpref.rollout.serving.openai_text import Call, Texts, limit_of, requests_of
from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    GenerateCall,
    Info,
    ParamsRecord,
)
from nemo_selfpref.types import WeightSet

POLL_S = 0.2
"""How often it is asked whether the client is still there."""


def openai_routes(
    backend: Backend, tokenizer: ChatTokenizer, timeout_s: float | None = None
) -> Callable[[FastAPI], None]:
    """GET /v1/models, POST /v1/chat/completions and /v1/completions, for create_app(extend=...).

    Args:
        tokenizer: that of the weights; text from clients never becomes a control token.
        timeout_s: how long one question may take; None for no limit.
    """
    service = _Service(backend, tokenizer, timeout_s)

    def extend(app: FastAPI) -> None:
        app.get("/v1/models")(service.models)
        app.get("/v1/models/{name:path}")(service.model)
        app.post("/v1/chat/completions")(service.chat)
        app.post("/v1/completions")(service.complete)

    return extend


@dataclass(frozen=True)
class _Question:
    """A call, checked and in tokens."""

    call: Call
    asked: GenerateCall
    reply: Reply


class _Service:
    def __init__(self, backend: Backend, tokenizer: ChatTokenizer, timeout_s: float | None) -> None:
        self.backend, self.texts, self.timeout_s = backend, Texts(tokenizer), timeout_s
        self._created = int(time.time())
        self._turns = asyncio.Semaphore(MAX_CALLS)

    # -- routes -----------------------------------------------------------------------------------

    async def models(self) -> Response:
        return await _answered(self._models())

    async def model(self, name: str) -> Response:
        return await _answered(self._model(name))

    async def chat(self, request: Request) -> Response:
        return await _answered(self._question(request, ChatCall))

    async def complete(self, request: Request) -> Response:
        return await _answered(self._question(request, CompletionsCall))

    async def _models(self) -> Response:
        info = await in_thread(self.backend.info)
        listed = [self._described(name, info) for name in info.weight_sets]
        return JSONResponse({"object": "list", "data": listed})

    async def _model(self, name: str) -> Response:
        info = await in_thread(self.backend.info)
        _check_held(name, info)
        return JSONResponse(self._described(name, info))

    def _described(self, name: str, info: Info) -> Fields:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "nemo_selfpref",
            "max_model_len": info.max_length,
        }

    async def _question(self, request: Request, kind: type[Call]) -> Response:
        body = await request.body()
        question = await in_thread(self._prepare, kind, body)
        if question.call.stream:
            return StreamingResponse(self._events(question), media_type="text/event-stream")
        async with self._turns:
            answers = await self._whole(question, request)
        return JSONResponse(question.reply.whole(answers))

    # -- from text to tokens, in a thread ---------------------------------------------------------

    def _prepare(self, kind: type[Call], body: bytes) -> _Question:
        call = read_call(kind, body)
        info = self.backend.info()
        _check_held(call.model, info)
        prompt = self.texts.tokens(call, info)
        asked = GenerateCall(
            weight_set=WeightSet(call.model),
            requests=requests_of(call, prompt),
            params=ParamsRecord(
                max_new_tokens=limit_of(call, prompt, info),
                temperature=1.0 if call.temperature is None else call.temperature,
                top_p=1.0 if call.top_p is None else call.top_p,
            ),
        )
        self.backend.check(asked)
        usage = call.stream_options is not None and call.stream_options.include_usage
        form = ChatReply if isinstance(call, ChatCall) else CompletionsReply
        return _Question(call, asked, form(call.model, len(prompt), usage))

    # -- asking the engines -----------------------------------------------------------------------

    async def _whole(self, question: _Question, request: Request) -> list[Answer]:
        """All answers; given up once the client has gone away."""
        gone = threading.Event()
        until = Until.within(self.timeout_s, gone.is_set)

        def ask() -> list[Answer]:
            records: list[CompletionRecord] = []
            self.backend.generate(question.asked, records.append, until)
            made = [self.texts.answer(question.call, record) for record in records]
            return sorted(made, key=lambda answer: answer.index)

        work = asyncio.ensure_future(in_thread(ask))
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=POLL_S)
                if await request.is_disconnected():
                    gone.set()
            return work.result()
        finally:
            gone.set()

    async def _events(self, question: _Question) -> AsyncIterator[bytes]:
        """Server-sent events: the answers in the order they are done, then [DONE]."""
        reply, answers = question.reply, list[Answer]()
        async with self._turns:
            for chunk in reply.opening(len(question.asked.requests)):
                yield _event(chunk)
            async with aclosing(self._emitted(question.asked)) as emitted:
                async for item in emitted:
                    if item is None:
                        yield b": at work\n\n"
                    elif isinstance(item, BaseException):
                        yield _event(_failure(item).body())
                        return
                    else:
                        answers.append(await in_thread(self.texts.answer, question.call, item))
                        for chunk in reply.chunks(answers[-1]):
                            yield _event(chunk)
        for chunk in reply.closing(answers):
            yield _event(chunk)
        yield b"data: [DONE]\n\n"

    async def _emitted(
        self, asked: GenerateCall
    ) -> AsyncGenerator[CompletionRecord | BaseException | None, None]:
        """Completions as they come; an error ends them; None while nothing came for a while."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[CompletionRecord | BaseException | None] = asyncio.Queue()
        gone = threading.Event()
        until = Until.within(self.timeout_s, gone.is_set)

        def emit(item: CompletionRecord | BaseException | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        def run() -> None:
            try:
                self.backend.generate(asked, emit, until)
                emit(None)
            except BaseException as error:
                emit(error)

        threading.Thread(target=run, daemon=True).start()
        try:
            while True:
                try:
                    item = await asyncio.wait_for(queue.get(), BEAT_S)
                except TimeoutError:
                    yield None
                    continue
                if item is None:
                    return
                yield item
        finally:
            gone.set()


async def _answered(work: Any) -> Response:
    try:
        return await work
    except (ApiError, SelfPrefError) as error:
        return _failure(error).response()


def _failure(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SelfPrefError):
        return ApiError.of(error)
    return ApiError(500, f"the server failed: {error!r}")


def _check_held(name: str, info: Info) -> None:
    if name not in info.weight_sets:
        held = ", ".join(info.weight_sets)
        raise ApiError(404, f"no model {name!r} here; there are {held}", "model", "model_not_found")


def _event(fields: Fields) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()
