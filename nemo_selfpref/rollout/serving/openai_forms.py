"""How answers look to an OpenAI client: whole, or as the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

Fields = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """The text that one token added to an answer, and its log-prob."""

    text: str
    logprob: float
    offset: int
    """Characters of the answer before it."""

    @property
    def bytes(self) -> list[int] | None:
        """None for a part of a character, whose bytes the text does not tell."""
        return None if "\ufffd" in self.text else list(self.text.encode())


@dataclass(frozen=True)
class Answer:
    """One choice. `tokens` were sampled for it, those that its text leaves out as well."""

    index: int
    text: str
    finish_reason: str
    tokens: int
    fingerprint: str
    pieces: Sequence[Piece] | None = None
    """None where no log-probs were asked for."""


@dataclass(frozen=True)
class Reply:
    """What all answers to one question share."""

    model: str
    prompt_tokens: int
    usage_in_stream: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: secrets.token_hex(12))

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def whole(self, answers: Sequence[Answer]) -> Fields:
        """The reply to a question that was not streamed."""
        head = self._head(self.whole_object, _fingerprint(answers))
        choices = [self.choice(answer) for answer in answers]
        return {**head, "choices": choices, "usage": self._usage(answers)}

    def opening(self, count: int) -> Iterator[Fields]:
        """Chunks before the first answer."""
        yield from ()

    def chunks(self, answer: Answer) -> Iterator[Fields]:
        """The chunks of one answer."""
        raise NotImplementedError

    def closing(self, answers: Sequence[Answer]) -> Iterator[Fields]:
        """Chunks after the last answer."""
        if self.usage_in_stream:
            head = self._head(self.chunk_object, _fingerprint(answers))
            yield {**head, "choices": [], "usage": self._usage(answers)}

    def choice(self, answer: Answer) -> Fields:
        raise NotImplementedError

    def _chunk(self, choice: Fields, fingerprint: str | None) -> Fields:
        made = {**self._head(self.chunk_object, fingerprint), "choices": [choice]}
        return {**made, "usage": None} if self.usage_in_stream else made

    def _head(self, kind: str, fingerprint: str | None) -> Fields:
        return {
            "id": f"{self.prefix}-{self.key}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": fingerprint,
        }

    def _usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        made = sum(answer.tokens for answer in answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }


def _fingerprint(answers: Sequence[Answer]) -> str:
    return "+".join(sorted({answer.fingerprint for answer in answers}))


class ChatReply(Reply):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def choice(self, answer: Answer) -> Fields:
        return {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer),
            "finish_reason": answer.finish_reason,
        }

    def opening(self, count: int) -> Iterator[Fields]:
        for index in range(count):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk(self._delta(index, delta), None)

    def chunks(self, answer: Answer) -> Iterator[Fields]:
        said = self._delta(answer.index, {"content": answer.text})
        said["logprobs"] = self._logprobs(answer)
        yield self._chunk(said, answer.fingerprint)
        end = self._delta(answer.index, {}, answer.finish_reason)
        yield self._chunk(end, answer.fingerprint)

    @staticmethod
    def _delta(index: int, delta: Fields, finish_reason: str | None = None) -> Fields:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    @staticmethod
    def _logprobs(answer: Answer) -> Fields | None:
        if answer.pieces is None:
            return None
        content = [
            {"token": p.text, "logprob": p.logprob, "bytes": p.bytes, "top_logprobs": []}
            for p in answer.pieces
        ]
        return {"content": content, "refusal": None}


class CompletionsReply(Reply):
    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def choice(self, answer: Answer) -> Fields:
        return {
            "index": answer.index,
            "text": answer.text,
            "logprobs": self._logprobs(answer),
            "finish_reason": answer.finish_reason,
        }

    def chunks(self, answer: Answer) -> Iterator[Fields]:
        yield self._chunk(self.choice(answer), answer.fingerprint)

    @staticmethod
    def _logprobs(answer: Answer) -> Fields | None:
        if answer.pieces is None:
            return None
        return {
            "tokens": [p.text for p in answer.pieces],
            "token_logprobs": [p.logprob for p in answer.pieces],
            "top_logprobs": None,
            "text_offset": [p.offset for p in answer.pieces],
        }
