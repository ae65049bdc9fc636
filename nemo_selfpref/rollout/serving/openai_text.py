"""Between an OpenAI client's texts and the tokens that engines take and make."""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Sequence

from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.rollout.serving.openai_calls import ApiError, ChatCall, CompletionsCall
from nemo_selfpref.rollout.serving.openai_forms import Answer, Piece
from nemo_selfpref.rollout.serving.wire import CompletionRecord, Info, RequestRecord
from nemo_selfpref.types import FinishReason, TokenIds

_CONTEXT = 8
"""Tokens before one that decide how it reads: more than a character has bytes."""

Call = ChatCall | CompletionsCall


class Texts:
    """A tokenizer, for many threads: it may be used by one at a time."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self._lock = threading.Lock()

    def tokens(self, call: Call, info: Info) -> TokenIds:
        """The prompt of a question.

        Raises:
            ApiError: a token that the model does not have.
            DataError: the template refuses the conversation.
        """
        with self._lock:
            if isinstance(call, ChatCall):
                messages = [message.plain() for message in call.messages]
                return self.tokenizer.encode_chat(messages, add_generation_prompt=True)
            if isinstance(call.prompt, str):
                return self.tokenizer.encode_text(call.prompt)
        if max(call.prompt) >= info.vocab_size:
            what = f"the prompt holds the token {max(call.prompt)}; the model has {info.vocab_size}"
            raise ApiError(400, what, "prompt", "invalid_value")
        return tuple(call.prompt)

    def answer(self, call: Call, record: CompletionRecord) -> Answer:
        """A completion as text, without its stop token and what follows a stop string."""
        stopped = record.finish_reason is FinishReason.STOP
        ids = record.token_ids[:-1] if stopped else record.token_ids
        with self._lock:
            text = self.tokenizer.decode(ids)
            pieces = self._pieces(ids, record.logprobs) if call.wants_logprobs else None
        ends = [place for stop in call.stops if (place := text.find(stop)) >= 0]
        if ends:
            text, stopped = text[: min(ends)], True
            pieces = pieces and [p for p in pieces if p.offset < len(text)]
        return Answer(
            index=int(record.id),
            text=text,
            finish_reason="stop" if stopped else "length",
            tokens=len(record.token_ids),
            fingerprint=f"{record.weight_version}-{record.weight_digest[:12]}",
            pieces=pieces,
        )

    def _pieces(self, ids: Sequence[int], logprobs: Sequence[float]) -> list[Piece]:
        """A token's text is what it adds to those before it: alone it may lose its space."""
        made: list[Piece] = []
        offset = 0
        for place, logprob in zip(range(len(ids)), logprobs, strict=False):
            first = max(0, place - _CONTEXT)
            before = self.tokenizer.decode(ids[first:place])
            text = self.tokenizer.decode(ids[first : place + 1])[len(before) :]
            made.append(Piece(text, logprob, offset))
            offset += len(text)
        return made


def requests_of(call: Call, prompt: TokenIds) -> list[RequestRecord]:
    """One for each choice, each with a seed of its own that the call's decides."""
    base = secrets.randbits(62) if call.seed is None else call.seed

    def seed(index: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{base}/{index}".encode()).digest()[:8]) >> 1

    return [
        RequestRecord(id=str(index), prompt_ids=list(prompt), seed=seed(index))
        for index in range(call.n or 1)
    ]


def limit_of(call: Call, prompt: TokenIds, info: Info) -> int:
    """How many tokens an answer may have: what was asked for, or what the context leaves.

    Raises:
        ApiError: the prompt leaves less.
    """
    room = info.max_length - len(prompt)
    if room < (call.limit or 1):
        wanted = f"the prompt has {len(prompt)} tokens and {call.limit or 1} are to come"
        raise ApiError(
            400,
            f"{wanted}, but the model's context holds {info.max_length}: shorten the prompt or "
            "lower max_tokens",
            "messages" if isinstance(call, ChatCall) else "prompt",
            "context_length_exceeded",
        )
    return call.limit or min(room, call.default_limit)
