"""The thread that owns an engine, and the line of what it has to do.

Every step, weight update and probe happens on that thread, one after the other. An update waits for
what runs and holds back what comes, so no answer is ever made by two versions.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from nemo_selfpref.errors import RolloutError
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.held_weights import INITIAL, HeldWeights
from nemo_selfpref.rollout.serving.vllm_engine import VLLMEngine
from nemo_selfpref.rollout.serving.wire import GenerateCall, LabelsCall, Stamp

_IDLE_S = 0.2
_CLOSE_S = 10.0


@dataclass(eq=False)
class _Job:
    """A call being answered."""

    call: GenerateCall | LabelsCall
    emit: Callable[[Any], None]
    until: Until
    done: Future[None] = field(default_factory=Future)
    stamp: Stamp = INITIAL
    """The weights that answer it, once it was started."""
    open: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Requests in the engine: place in the call, and the name vLLM itself has for it."""


@dataclass(eq=False)
class _Order:
    """Something to do while nothing runs."""

    act: Callable[[], Any]
    until: Until
    done: Future[Any] = field(default_factory=Future)


class EngineLine:
    """First come, first served, but for what must wait until the engine is idle: then all behind
    it waits, too."""

    def __init__(self, engine: VLLMEngine, weights: HeldWeights) -> None:
        self._engine, self._weights = engine, weights
        self._inbox: queue.SimpleQueue[_Job | _Order | None] = queue.SimpleQueue()
        self._waiting: deque[_Job | _Order] = deque()
        self._running: dict[str, _Job] = {}
        self._beat, self._calls = time.monotonic(), 0
        self._end = ""
        """Why the thread has ended."""
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    # -- called from any thread ---------------------------------------------------------------

    @property
    def failure(self) -> str:
        """Why nothing is answered any more; empty while it is."""
        return self._weights.failure or self._end

    @property
    def beat_age_s(self) -> float:
        """Since the thread last showed that it runs."""
        return time.monotonic() - self._beat

    @property
    def waiting(self) -> int:
        """Calls and orders that wait for what runs."""
        return len(self._waiting)

    @property
    def load(self) -> int:
        """Requests that run, and what waits."""
        return len(self._running) + len(self._waiting)

    def answer(
        self, call: GenerateCall | LabelsCall, emit: Callable[[Any], None], until: Until
    ) -> None:
        """Hand the answer to each place of a call to `emit`; return when all are there. See
        Backend.generate for what it raises."""
        job = _Job(call, emit, until)
        self._send(job)
        job.done.result()

    def ask(self, act: Callable[[], Any], until: Until) -> Any:
        """What `act` returns or raises, called on the thread while nothing runs.

        Raises:
            RolloutTimeout, RolloutCancelled: `until` was over first; it was not called.
        """
        order = _Order(act, until)
        self._send(order)
        return order.done.result()

    def close(self) -> None:
        """End the thread, and with an error what runs and waits."""
        self._inbox.put(None)
        self._thread.join(timeout=_CLOSE_S)

    def _send(self, item: _Job | _Order) -> None:
        self._inbox.put(item)
        # Looked at after the put: what comes later than the last emptying of the inbox sees it.
        if self._end:
            raise self._death()

    def _death(self) -> RolloutError:
        return RolloutError(f"the engine has died: {self.failure}")

    # -- on the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            # Asking makes torch give this thread the process's number of OpenMP threads. It would
            # at its first own operation; vLLM's kernels fail where it changes between two of them.
            import_module("torch").get_num_threads()
            while self._take():
                self._give_up()
                self._admit()
                if self._running:
                    self._step()
                self._beat = time.monotonic()
            self._end = "the engine was closed"
        except BaseException as error:
            self._end = f"vLLM failed: {error!r}"
        self._refuse_all()

    def _refuse_all(self) -> None:
        waiting: list[_Job | _Order] = [*self._jobs(), *self._waiting]
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._inbox.get_nowait()
                waiting += [item] if item is not None else []
        for item in waiting:
            if not item.done.done():
                item.done.set_exception(self._death())

    def _jobs(self) -> list[_Job]:
        """Those that run, each once."""
        return list({id(job): job for job in self._running.values()}.values())

    def _take(self) -> bool:
        """Move what was sent into the line; False once the engine is closed."""
        busy = bool(self._running or self._waiting)
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._inbox.get(timeout=_IDLE_S) if not busy else self._inbox.get_nowait()
                if item is None:
                    return False
                self._waiting.append(item)
                busy = True
        return True

    def _give_up(self) -> None:
        """End what is past its deadline or no longer wanted, in the engine and in the line."""
        for job in self._jobs():
            if job.until.over:
                self._abort(job)
                _fail_if_over(job)
        for item in [item for item in self._waiting if item.until.over]:
            self._waiting.remove(item)
            _fail_if_over(item)

    def _abort(self, job: _Job) -> None:
        self._engine.abort([own for _, own in job.open.values()])
        for name in job.open:
            self._running.pop(name, None)
        job.open.clear()

    def _admit(self) -> None:
        """Start what stands first in the line, until something must wait for the engine to be
        idle: an order, or a call of weights that are not loaded."""
        while self._waiting:
            item = self._waiting[0]
            if self._running and not self._joins(item):
                return
            self._waiting.popleft()
            try:
                if isinstance(item, _Order):
                    item.done.set_result(item.act())
                else:
                    self._start(item)
            except Exception as error:
                self._fail(item, error)

    def _joins(self, item: _Job | _Order) -> bool:
        """Whether it can be begun while others run."""
        return isinstance(item, _Job) and self._weights.is_loaded(item.call.weight_set)

    def _fail(self, item: _Job | _Order, error: Exception) -> None:
        """End one call or order; the engine goes on."""
        if not isinstance(error, RolloutError):
            error = RolloutError(f"vLLM refused or failed: {error!r}")
        try:
            if isinstance(item, _Job):
                self._abort(item)
        finally:  # It is in no line any more: nobody else would tell who waits for it.
            if not item.done.done():
                item.done.set_exception(error)

    def _start(self, job: _Job) -> None:
        job.stamp = self._weights.load_for(job.call)
        salt = f"{job.call.weight_set.value}:{job.stamp.digest}"
        self._calls += 1
        for number, question in enumerate(self._engine.questions(job.call)):
            name = f"{self._calls}-{number}"
            job.open[name] = (number, self._engine.add(name, question, salt))
            self._running[name] = job

    def _step(self) -> None:
        for name, output in self._engine.step():
            job = self._running.pop(name, None)
            if job is not None:
                self._finish(job, job.open.pop(name)[0], output)

    def _finish(self, job: _Job, number: int, output: Any) -> None:
        try:
            job.emit(self._engine.read(job.call, number, output, job.stamp))
        except Exception as error:
            self._fail(job, error)
            return
        if not job.open:
            job.done.set_result(None)


def _fail_if_over(item: _Job | _Order) -> None:
    try:
        item.until.check("the engine's answer")
    except RolloutError as error:
        item.done.set_exception(error)
