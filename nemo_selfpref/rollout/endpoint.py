"""The external LLM of SGPO step 1, behind an OpenAI-compatible chat completions endpoint.

Answers are paid for, so each is on disk before the next is asked for: a run that is killed and
started again asks only for those that were in flight.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import re
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import httpx
import tenacity

from nemo_selfpref.errors import RolloutError
from nemo_selfpref.redact import redact
from nemo_selfpref.rollout.answer_cache import AnswerCache, clean
from nemo_selfpref.rollout.endpoint_config import (
    EndpointConfig,
    api_key,
    checked_url,
    is_loopback,
)
from nemo_selfpref.rollout.teacher import TeacherRequest, check_ids

MAX_BACKOFF_S, MAX_RETRY_AFTER_S, MAX_REPLY_BYTES = 60.0, 600.0, 32 * 2**20
_USAGE = ("prompt_tokens", "completion_tokens")
_HINTS = {
    401: "check the API key in the environment variable named by api_key_env",
    403: "check what the API key in the variable named by api_key_env may use",
    404: "check base_url (it usually ends in /v1) and model",
}


@dataclass(frozen=True)
class TeacherCost:
    """What one teacher has spent so far; tokens are those of its own calls, as the server counts.

    `cut_off` counts answers, cached ones too, that ended at max_tokens.
    """

    calls: int = 0
    cached: int = 0
    cut_off: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class EndpointTeacher:
    """Answers from an OpenAI-compatible endpoint; equal prompts are asked once.

    Raises:
        ConfigError: a setting is out of range, the URL is unsafe or the API key is not set.
        DataError: the cache is damaged, or is not a cache.
    """

    def __init__(self, config: EndpointConfig, *, backoff_s: float = 1.0) -> None:
        self._config = replace(config)
        self._url = checked_url(config)
        self._key = api_key(config.api_key_env)
        self._cache = AnswerCache(config.cache_path)
        self._backoff_s = backoff_s
        self._cost = TeacherCost()
        self._lock = threading.Lock()
        self._next_slot = 0.0

    def cost(self) -> TeacherCost:
        return self._cost

    def estimate_tokens(self, requests: Sequence[TeacherRequest]) -> int:
        """Rough prompt tokens that `answer` would send: four characters each, cached ones free."""
        prompts = {self._cache_key(request.prompt): request.prompt for request in requests}
        new = (prompt for key, prompt in prompts.items() if key not in self._cache.rows)
        return sum(math.ceil(len(prompt) / 4) for prompt in new)

    def answer(
        self, requests: Sequence[TeacherRequest], on_done: Callable[[int], None] | None = None
    ) -> dict[str, str]:
        check_ids(requests)
        waiting: dict[str, list[str]] = {}
        todo: dict[str, TeacherRequest] = {}
        for request in requests:
            key = self._cache_key(request.prompt)
            waiting.setdefault(key, []).append(request.id)
            if key not in self._cache.rows:
                todo.setdefault(key, request)
        done = len(requests) - sum(len(waiting[key]) for key in todo)
        self._count(cached=done)
        if on_done and done:
            on_done(done)
        with contextlib.closing(self._fetch(todo)) as arrivals:
            for key in arrivals:
                done += len(waiting[key])
                if on_done:
                    on_done(done)
        rows = {key: self._cache.rows[key] for key in waiting}
        self._count(cut_off=sum(row["finish_reason"] == "length" for row in rows.values()))
        return {r.id: rows[self._cache_key(r.prompt)]["answer"] for r in requests}

    def _fetch(self, todo: Mapping[str, TeacherRequest]) -> Generator[str, None, None]:
        if not todo:
            return
        stop, threads = threading.Event(), self._config.max_concurrency
        client = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=self._config.timeout_s,
            limits=httpx.Limits(max_connections=threads, max_keepalive_connections=threads),
            # A proxy from the environment would carry requests for this machine off it.
            trust_env=not is_loopback(self._url.host),
        )
        with client, ThreadPoolExecutor(threads) as pool:
            jobs = {pool.submit(self._ask, client, stop, key, todo[key]): key for key in todo}
            try:
                for job in as_completed(jobs):
                    job.result()
                    yield jobs[job]
            finally:
                # Answers in flight are paid for: they end and are saved, but nothing is retried.
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _ask(
        self, client: httpx.Client, stop: threading.Event, key: str, request: TeacherRequest
    ) -> None:
        attempts = self._config.max_attempts
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(attempts) | tenacity.stop_when_event_set(stop),
            wait=self._delay,
            retry=tenacity.retry_if_exception_type(_Transient),
            sleep=tenacity.sleep_using_event(stop),
            reraise=True,
        )
        try:
            self._cache.put(key, retrying(self._post, client, stop, request))
        except _Transient as error:
            raise RolloutError(
                f"request {request.id!r}: {error}, after {attempts} attempts; run again when the "
                "endpoint is well, or lower max_concurrency (with cache_path set, the answers so "
                "far are kept)"
            ) from None

    def _delay(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        # The exponent is held down because a float power overflows long before a patient user does.
        backoff = min(MAX_BACKOFF_S, self._backoff_s * 2.0 ** min(state.attempt_number - 1, 32))
        return getattr(error, "retry_after", 0.0) + random.uniform(backoff / 2, backoff)

    def _post(
        self, client: httpx.Client, stop: threading.Event, request: TeacherRequest
    ) -> dict[str, str]:
        self._pace(stop)
        if stop.is_set():
            raise RolloutError(f"request {request.id!r}: not sent, because the run is stopping")
        try:
            status, retry_after, data = self._exchange(client, request.prompt)
        except httpx.RequestError as error:
            raise _Transient(self._safe(f"{type(error).__name__} {error}")) from None
        if status == 200:
            return self._accept(request, data)
        what = self._described(status, data)
        if status in (408, 409, 429) or status >= 500:
            raise _Transient(what, retry_after)
        if status == 400 and b'"content_filter"' in data:
            # Azure refuses a prompt this way, where others answer 200 with this finish_reason.
            return {"answer": "", "finish_reason": "content_filter"}
        redirected = "redirects are not followed: give the final base_url"
        hint = redirected if 300 <= status < 400 else _HINTS.get(status, "correct the request")
        raise RolloutError(f"request {request.id!r}: {what}; {hint}")

    def _accept(self, request: TeacherRequest, data: bytes) -> dict[str, str]:
        try:
            row, usage = _parse_reply(data)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise RolloutError(
                f"request {request.id!r}: no chat completion in {self._described(200, data)}; "
                "expected the JSON of OpenAI's chat completions: check base_url"
            ) from None
        self._count(calls=1, **usage)
        return row

    def _exchange(self, client: httpx.Client, prompt: str) -> tuple[int, float, bytes]:
        body = {"messages": [{"role": "user", "content": prompt}], **self._sampling()}
        # httpx times each read; a server that sends a byte now and then would hold us for ever.
        deadline, data = time.monotonic() + self._config.timeout_s, bytearray()
        headers = {"Content-Type": "application/json"}
        content = json.dumps(body).encode()
        with client.stream("POST", self._url, content=content, headers=headers) as reply:
            for chunk in reply.iter_bytes():
                data += chunk
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"no whole reply in {self._config.timeout_s} s")
                if len(data) > MAX_REPLY_BYTES:
                    raise RolloutError(f"a reply of more than {MAX_REPLY_BYTES} bytes; check model")
            asked = reply.headers.get("Retry-After", "").strip()
        seconds = float(asked) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", asked) else 0.0
        return reply.status_code, min(seconds, MAX_RETRY_AFTER_S), bytes(data)

    def _pace(self, stop: threading.Event) -> None:
        if not self._config.requests_per_minute:
            return
        with self._lock:
            slot = max(self._next_slot, time.monotonic())
            self._next_slot = slot + 60.0 / self._config.requests_per_minute
        stop.wait(slot - time.monotonic())

    def _sampling(self) -> dict[str, Any]:
        names = ("model", "temperature", "top_p", "max_tokens")
        return {name: getattr(self._config, name) for name in names}

    def _cache_key(self, prompt: str) -> str:
        identity = json.dumps([str(self._url), self._sampling(), prompt], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()

    def _count(self, **more: int) -> None:
        with self._lock:
            totals = {name: getattr(self._cost, name) + n for name, n in more.items()}
            self._cost = replace(self._cost, **totals)

    def _described(self, status: int, data: bytes) -> str:
        return self._safe(f"HTTP {status} from {self._url}: {data.decode('utf-8', 'replace')}")

    def _safe(self, text: str) -> str:
        # Hidden before it is cut, so that no half of a key is left at the end.
        return redact(text.replace(self._key, "[API key]") if self._key else text)[:400]


class _Transient(Exception):
    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def _parse_reply(data: bytes) -> tuple[dict[str, str], dict[str, int]]:
    reply = json.loads(data)
    choice = reply["choices"][0]
    answer, finish = choice["message"].get("content") or "", choice.get("finish_reason") or ""
    if not isinstance(answer, str) or not isinstance(finish, str):
        raise TypeError
    text = "" if finish == "content_filter" else clean(answer)
    usage = {name: _count_in(reply.get("usage"), name) for name in _USAGE}
    return {"answer": text, "finish_reason": finish}, usage


def _count_in(usage: Any, name: str) -> int:
    # Not every server counts, and an answer that is paid for is not lost over its count.
    count = usage.get(name) if isinstance(usage, dict) else 0
    return count if type(count) is int and count > 0 else 0
