"""The routes of a rollout server, over whatever stands behind them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse

from nemo_selfpref.errors import (
    ConfigError,
    DataError,
    RolloutError,
    RolloutTimeout,
    SelfPrefError,
    StaleWeightsError,
    WeightSyncError,
)
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.auth import MAX_BODY_BYTES, Guard
from nemo_selfpref.rollout.serving.backend import Backend
from nemo_selfpref.rollout.serving.wire import (
    Failure,
    GenerateCall,
    Health,
    Info,
    LabelsCall,
    Line,
    UpdateReport,
    WeightsCall,
)

_STATUS: tuple[tuple[type[SelfPrefError], int], ...] = (
    (StaleWeightsError, 409),
    (WeightSyncError, 409),
    (RolloutTimeout, 504),
    (ConfigError, 400),
    (DataError, 400),
    (RolloutError, 422),
)
BEAT_S = 1.0
"""While an answer takes longer, an empty line says that the server is alive."""
MAX_CALLS = 256
"""Calls served at a time; each waits in a thread of its own. Further ones wait their turn."""


def create_app(
    backend: Backend,
    token: str,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    extend: Callable[[FastAPI], None] | None = None,
) -> FastAPI:
    """The app of one server; `extend` adds routes of its own."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    turns = asyncio.Semaphore(MAX_CALLS)

    @app.get("/rollout/health")
    async def health() -> Health:
        return await in_thread(backend.health)

    @app.get("/rollout/info")
    async def info() -> Info:
        return await in_thread(backend.info)

    @app.post("/rollout/generate")
    async def generate(call: GenerateCall, request: Request) -> StreamingResponse:
        await in_thread(backend.check, call)

        def work(emit: Callable[[Line], None], until: Until) -> None:
            backend.generate(call, lambda record: emit(Line(completion=record)), until)

        return stream(work, call.timeout_s, turns)

    @app.post("/rollout/labels")
    async def labels(call: LabelsCall, request: Request) -> StreamingResponse:
        await in_thread(backend.check, call)

        def work(emit: Callable[[Line], None], until: Until) -> None:
            backend.label_scores(call, lambda record: emit(Line(label=record)), until)

        return stream(work, call.timeout_s, turns)

    @app.post("/rollout/weights")
    async def weights(call: WeightsCall) -> UpdateReport:
        return await in_thread(backend.update, call)

    @app.post("/rollout/sleep")
    async def sleep() -> Health:
        await in_thread(backend.sleep)
        return await in_thread(backend.health)

    @app.post("/rollout/wake")
    async def wake() -> Health:
        await in_thread(backend.wake)
        return await in_thread(backend.health)

    @app.exception_handler(SelfPrefError)
    async def refused(_: Request, error: SelfPrefError) -> JSONResponse:
        return JSONResponse({"error": failure_of(error).model_dump()}, status_of(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Where and what, not the value: it may be megabytes long.
        found = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:4]]
        failure = Failure(kind="invalid", message="; ".join(found))
        return JSONResponse({"error": failure.model_dump()}, 422)

    if extend is not None:
        extend(app)
    app.add_middleware(Guard, token=token, max_body_bytes=max_body_bytes)
    return app


def failure_of(error: BaseException) -> Failure:
    return Failure(kind=type(error).__name__, message=str(error))


def status_of(error: SelfPrefError) -> int:
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Run a blocking call in a thread of its own; the event loop's pool is too small for calls that
    wait for minutes."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(value)
        else:
            done.set_exception(error)

    def run() -> None:
        try:
            value, error = function(*args), None
        except BaseException as caught:
            value, error = None, caught
        loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, daemon=True).start()
    return await done


def stream(
    work: Callable[[Callable[[Line], None], Until], None],
    timeout_s: float | None,
    turns: asyncio.Semaphore,
) -> StreamingResponse:
    """A reply of lines as `work` emits them. When the client goes away, the work is cancelled."""

    async def lines() -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Line | None] = asyncio.Queue()
        gone = threading.Event()
        until = Until.within(timeout_s, gone.is_set)
        count = 0

        def emit(line: Line | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, line)

        def run() -> None:
            try:
                work(emit, until)
            except BaseException as error:
                emit(Line(error=failure_of(error)))
            finally:
                emit(None)

        turn = asyncio.ensure_future(turns.acquire())
        try:
            while not turn.done():
                await asyncio.wait({turn}, timeout=BEAT_S)
                if not turn.done():
                    yield Line().json_line()
            threading.Thread(target=run, daemon=True).start()
            failed = False
            while True:
                try:
                    line = await asyncio.wait_for(queue.get(), BEAT_S)
                except TimeoutError:
                    yield Line().json_line()
                    continue
                if line is None:
                    break
                failed, count = line.error is not None, count + 1
                yield line.json_line()
            if not failed:
                yield Line(done=count).json_line()
        finally:
            gone.set()
            if not turn.cancel():  # it was had
                turns.release()

    return StreamingResponse(lines(), media_type="application/x-ndjson")
