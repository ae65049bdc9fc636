"""What an OpenAI client may ask for, and how it is told no.

A setting that would change the answer is obeyed or refused by name, never ignored. Those that
change nothing (`user`, `metadata`, `store: false`, and others at the value that switches them off)
are taken.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from fastapi.responses import JSONResponse
from pydantic import Field, ValidationError

from nemo_selfpref.errors import (
    DataError,
    RolloutError,
    RolloutRefused,
    RolloutTimeout,
    SelfPrefError,
    StaleWeightsError,
)
from nemo_selfpref.rollout.serving.wire import Record, Token

MAX_CHOICES = 128
_ONLY_OFF = {
    "best_of",
    "echo",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "presence_penalty",
    "response_format",
    "store",
    "suffix",
    "tool_choice",
    "tools",
    "top_logprobs",
}
"""Taken only at the value that changes nothing."""
_STATUS: tuple[tuple[type[SelfPrefError], int], ...] = (
    (DataError, 400),
    (RolloutRefused, 400),
    (StaleWeightsError, 409),
    (RolloutTimeout, 504),
    (RolloutError, 503),
)


class ApiError(Exception):
    """A refusal in OpenAI's form."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @classmethod
    def of(cls, error: SelfPrefError) -> ApiError:
        status = next((s for kind, s in _STATUS if isinstance(error, kind)), 500)
        return cls(status, str(error), code=type(error).__name__)

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status)


class TextPart(Record):
    type: Literal["text"]
    text: str


class ChatMessage(Record):
    """A turn. What a client sends back of an earlier answer may name the parts it did not have."""

    role: str
    content: str | list[TextPart]
    name: None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    annotations: None = None
    audio: None = None

    def plain(self) -> dict[str, str]:
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": self.role, "content": text}


class StreamOptions(Record):
    include_usage: bool = False


Off = Annotated[float, Field(ge=0, le=0)]
"""Taken at 0 alone."""
Stop = Annotated[str, Field(min_length=1)]


class _Sampling(Record):
    """What both kinds of question have in common."""

    default_limit: ClassVar[int] = 4096
    """Tokens of an answer at most, where neither the caller nor the model's context says less."""
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: int | None = None
    stop: Stop | list[Stop] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    frequency_penalty: Off | None = None
    presence_penalty: Off | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most, where the caller says so."""
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        raise NotImplementedError


class TextFormat(Record):
    type: Literal["text"]


class ChatCall(_Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)


class CompletionsCall(_Sampling):
    default_limit: ClassVar[int] = 16
    """OpenAI's own for this route."""
    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[Token], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    """0: those of the answer's own tokens; the likeliest others are not to be had."""
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


CallKind = TypeVar("CallKind", bound=_Sampling)


def read_call(kind: type[CallKind], body: bytes) -> CallKind:
    """The question in a request's body.

    Raises:
        ApiError: not JSON, a setting that is unknown or not supported, or a wrong value; the
            error's `param` names it.
    """
    try:
        call = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error
    own = getattr(call, "max_completion_tokens", None)
    if own is not None and call.max_tokens is not None:
        raise ApiError(
            400, "max_tokens and max_completion_tokens were both set: give one", "max_tokens"
        )
    if call.stream_options is not None and not call.stream:
        raise ApiError(400, "stream_options needs stream=true", "stream_options")
    return call


def _refusal(error: ValidationError) -> ApiError:
    found = error.errors()
    first = found[0]
    if not first["loc"]:
        return ApiError(400, f"the body is not a JSON object: {first['msg']}")
    if first["loc"][0] == "messages" and "content" in first["loc"]:
        param = ".".join(map(str, first["loc"][:3]))
        return ApiError(400, f"{param}: expected a text or a list of texts", param, "invalid_value")
    # A union's place ends with its types' names, which mean nothing to a caller.
    param = ".".join(map(str, first["loc"][: 1 if first["loc"][0] != "messages" else 3]))
    value = repr(first.get("input"))[:80]
    if first["type"] == "extra_forbidden" or param in _ONLY_OFF:
        what = param if first["type"] == "extra_forbidden" else f"{param}={value}"
        message = f"{what} is not supported here, and nothing was sampled: leave it out"
        return ApiError(400, message, param, "unsupported_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{param} is missing", param, "missing_required_parameter")
    return ApiError(400, f"{param}: {first['msg']}; got {value}", param, "invalid_value")
