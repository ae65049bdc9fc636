"""A rollout server as seen from a client: a RolloutEngine whose answers are checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from nemo_selfpref import errors
from nemo_selfpref.errors import RolloutError, RolloutTimeout, StaleWeightsError
from nemo_selfpref.rollout.engine import FOREVER, Until
from nemo_selfpref.rollout.serving.wire import (
    Call,
    CompletionRecord,
    Failure,
    GenerateCall,
    Health,
    Info,
    LabelRecord,
    LabelsCall,
    Line,
    ParamsRecord,
    RequestRecord,
    Stamp,
    UpdateReport,
    WeightsCall,
)
from nemo_selfpref.types import (
    Completion,
    GenerationRequest,
    LabelScores,
    SamplingParams,
    TokenIds,
    WeightSet,
)

CONNECT_S = 10.0
SILENCE_S = 15.0
"""A server at work says so every second; after this long it is taken for dead."""

Reply = TypeVar("Reply", bound=BaseModel)
OnDone = Callable[[int, int], None]


class ServerClient:
    """One server. Safe to use from several threads.

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
        self.url, self.expect = url.rstrip("/"), expect
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

    # -- questions ----------------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: OnDone | None = None,
        until: Until = FOREVER,
    ) -> list[Completion]:
        """See RolloutEngine.generate."""
        # Ids are the caller's and may repeat; places do not.
        named = [
            RequestRecord.of(r).model_copy(update={"id": str(i)}) for i, r in enumerate(requests)
        ]
        call = GenerateCall(
            weight_set=weight_set,
            expect=self.expect(weight_set),
            timeout_s=until.remaining,
            requests=named,
            params=ParamsRecord.of(params),
        )
        found: dict[int, Completion] = {}
        for record in self.stream_generate(call, until):
            place = int(record.id)
            made = record.model_copy(update={"id": requests[place].id})
            found[place] = made.completion()
            if on_done is not None:
                on_done(1, len(record.token_ids))
        return [found[i] for i in range(len(requests))]

    def label_scores(
        self,
        prompts: Sequence[TokenIds],
        labels: TokenIds,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: OnDone | None = None,
        until: Until = FOREVER,
    ) -> list[LabelScores]:
        """See RolloutEngine.label_scores."""
        call = LabelsCall(
            weight_set=weight_set,
            expect=self.expect(weight_set),
            timeout_s=until.remaining,
            prompts=[list(p) for p in prompts],
            labels=list(labels),
        )
        found: dict[int, LabelScores] = {}
        for record in self.stream_labels(call, until):
            found[record.index] = record.scores()
            if on_done is not None:
                on_done(1, 0)
        return [found[i] for i in range(len(prompts))]

    def stream_generate(
        self, call: GenerateCall, until: Until = FOREVER
    ) -> Iterator[CompletionRecord]:
        """Completions as they come, each asked for and each once.

        Raises:
            RolloutError: the server failed, or broke the contract.
        """
        wanted = {r.id for r in call.requests}
        for line in self._stream("/rollout/generate", call, len(wanted), until):
            record = line.completion
            if record is None or record.id not in wanted:
                raise self._broken(f"an answer nobody asked for: {str(line)[:200]}")
            self._check_weights(call, record)
            if len(record.token_ids) != len(record.logprobs) or not record.token_ids:
                raise self._broken(
                    f"{len(record.token_ids)} tokens with {len(record.logprobs)} log-probs"
                )
            wanted.remove(record.id)
            yield record
        if wanted:
            raise self._broken(f"{len(wanted)} of {len(call.requests)} answers did not come")

    def stream_labels(self, call: LabelsCall, until: Until = FOREVER) -> Iterator[LabelRecord]:
        """The same for label scores."""
        wanted = set(range(len(call.prompts)))
        for line in self._stream("/rollout/labels", call, len(wanted), until):
            record = line.label
            if record is None or record.index not in wanted:
                raise self._broken(f"a score nobody asked for: {str(line)[:200]}")
            if len(record.logprobs) != len(call.labels):
                raise self._broken(f"{len(record.logprobs)} scores for {len(call.labels)} labels")
            wanted.remove(record.index)
            yield record
        if wanted:
            raise self._broken(f"{len(wanted)} of {len(call.prompts)} scores did not come")

    def _check_weights(self, call: GenerateCall, record: CompletionRecord) -> None:
        got = Stamp(version=record.weight_version, digest=record.weight_digest)
        if record.weight_set != call.weight_set or (call.expect and got != call.expect):
            raise StaleWeightsError(
                f"{self.url} answered with {record.weight_set.value} {got}, asked for "
                f"{call.weight_set.value} {call.expect or ''}: the answer is refused"
            )

    # -- transport ----------------------------------------------------------------------------

    def _stream(self, path: str, call: Call, count: int, until: Until) -> Iterator[Line]:
        if count == 0:
            return
        wait = httpx.Timeout(SILENCE_S, connect=CONNECT_S)
        try:
            with self._http.stream(
                "POST", path, content=call.model_dump_json(), headers=_JSON, timeout=wait
            ) as reply:
                if reply.status_code != 200:
                    reply.read()
                    raise self._refusal(reply)
                yield from self._lines(reply, until)
        except httpx.TimeoutException as error:
            raise RolloutTimeout(f"{self.url}{path}: no answer in time ({error!r})") from error
        except httpx.HTTPError as error:
            raise RolloutError(f"{self.url}{path}: {error!r}") from error

    def _lines(self, reply: httpx.Response, until: Until) -> Iterator[Line]:
        for text in reply.iter_lines():
            until.check(self.url)
            line = self._parsed(Line, text)
            if line.error is not None:
                raise self._raised(line.error)
            if line.done is not None:
                return
            if line.completion is not None or line.label is not None:
                yield line
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
            raise self._broken(str(error.errors()[0])) from error

    def _refusal(self, reply: httpx.Response) -> RolloutError:
        try:
            return self._raised(Failure.model_validate(json.loads(reply.content)["error"]))
        except (ValueError, KeyError, TypeError):
            return RolloutError(f"{self.url}: status {reply.status_code}: {reply.text[:300]}")

    def _raised(self, failure: Failure) -> RolloutError:
        """The server's exception, as ours of the same name."""
        kind: Any = getattr(errors, failure.kind, RolloutError)
        if not (isinstance(kind, type) and issubclass(kind, RolloutError)):
            kind = RolloutError
        return kind(f"{self.url}: {failure.message}")

    def _broken(self, what: str) -> RolloutError:
        return RolloutError(f"{self.url} broke the contract: {what}")


_JSON = {"Content-Type": "application/json"}
