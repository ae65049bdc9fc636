"""A rollout server as seen from a client: a RolloutEngine whose answers are checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from nemo_selfpref import errors
from nemo_selfpref.errors import RolloutError, RolloutRefused, RolloutTimeout
from nemo_selfpref.redact import redact
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.checked_engine import CheckedEngine
from nemo_selfpref.rollout.serving.wire import (
    Call,
    Failure,
    GenerateCall,
    Health,
    Info,
    Line,
    Stamp,
    UpdateReport,
    WeightsCall,
)
from nemo_selfpref.types import WeightSet

CONNECT_S = 10.0
SILENCE_S = 15.0
"""A server at work says so every second; after this long it is taken for dead."""

_CALLERS_MISTAKES = (400, 413, 415, 422)
"""Not 401, 404 or 429: another server may well answer."""
_JSON = {"Content-Type": "application/json"}
_SHOWN = 300
"""Characters of a reply that is no answer of ours."""

Reply = TypeVar("Reply", bound=BaseModel)


class ServerClient(CheckedEngine):
    """RolloutEngine over one server. Safe to use from several threads.

    Args:
        url: http://host:port
        token: the bearer token.
        expect: the weights of a set that answers must come from; None takes any.
    """

    def __init__(
        self,
        url: str,
        token: str,
        expect: Callable[[WeightSet], Stamp | None] = lambda _: None,
    ) -> None:
        super().__init__(url.rstrip("/"), expect)
        self.url = self.name
        self._token = token
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )

    def close(self) -> None:
        self._http.close()

    # -- about the server ---------------------------------------------------------------------

    def info(self, timeout_s: float = CONNECT_S) -> Info:
        return self._ask("GET", "/rollout/info", Info, timeout_s)

    def health(self, timeout_s: float = CONNECT_S) -> Health:
        return self._ask("GET", "/rollout/health", Health, timeout_s)

    def update(self, call: WeightsCall) -> UpdateReport:
        return self._ask("POST", "/rollout/weights", UpdateReport, call.timeout_s + SILENCE_S, call)

    def sleep(self, timeout_s: float = 120.0) -> Health:
        return self._ask("POST", "/rollout/sleep", Health, timeout_s)

    def wake(self, timeout_s: float = 120.0) -> Health:
        return self._ask("POST", "/rollout/wake", Health, timeout_s)

    # -- transport ----------------------------------------------------------------------------

    def _work(self, call: Call, emit: Callable[[Line], None], until: Until) -> None:
        path = "/rollout/generate" if isinstance(call, GenerateCall) else "/rollout/labels"
        wait = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
        try:
            with self._http.stream(
                "POST", path, content=call.model_dump_json(), headers=_JSON, timeout=wait
            ) as reply:
                if reply.status_code != 200:
                    reply.read()
                    raise self._refusal(reply)
                self._read_lines(reply, emit, until)
        except httpx.TimeoutException as error:
            raise RolloutTimeout(f"{self.url}{path}: no answer in time ({error!r})") from error
        except httpx.HTTPError as error:
            raise RolloutError(f"{self.url}{path}: {error!r}") from error

    def _read_lines(
        self, reply: httpx.Response, emit: Callable[[Line], None], until: Until
    ) -> None:
        for text in reply.iter_lines():
            if until.cancelled():  # leaving closes the connection, which stops the work there
                return
            line = self._parsed(Line, text)
            if line.error is not None:
                raise self._raised(line.error)
            if line.done is not None:
                return
            if line.completion is not None or line.label is not None:
                emit(line)
        raise self._broken("the reply was cut short")

    def _ask(
        self,
        method: str,
        path: str,
        kind: type[Reply],
        timeout_s: float,
        body: BaseModel | None = None,
    ) -> Reply:
        content = None if body is None else body.model_dump_json()
        try:
            reply = self._http.request(
                method,
                path,
                content=content,
                headers=_JSON if content else None,
                timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S)),
            )
        except httpx.TimeoutException as error:
            raise RolloutTimeout(
                f"{self.url}{path}: no answer within {timeout_s:.1f} s ({error!r})"
            ) from error
        except httpx.HTTPError as error:
            raise RolloutError(f"{self.url}{path}: {error!r}") from error
        if reply.status_code != 200:
            raise self._refusal(reply)
        return self._parsed(kind, reply.content)

    def _parsed(self, kind: type[Reply], content: str | bytes) -> Reply:
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            raise self._broken(self._shown(str(error.errors()[0]))[:_SHOWN]) from None

    def _refusal(self, reply: httpx.Response) -> RolloutError:
        other = RolloutRefused if reply.status_code in _CALLERS_MISTAKES else RolloutError
        try:
            failure = Failure.model_validate(json.loads(reply.content)["error"])
            made = self._raised(failure, other)
        except (ValueError, KeyError, TypeError):
            shown = self._shown(reply.text)[:_SHOWN]
            made = other(f"{self.url}: status {reply.status_code}: {shown}")
        made.status = reply.status_code
        return made

    def _raised(self, failure: Failure, other: type[RolloutError] = RolloutError) -> RolloutError:
        """The server's exception, as ours of the same name; as `other` where we have none."""
        kind: Any = getattr(errors, failure.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, RolloutError)):
            kind = other
        return kind(f"{self.url}: {self._shown(failure.message)}")

    def _shown(self, text: str) -> str:
        """What a server says, which may be what it was told."""
        return redact(text, [self._token])
