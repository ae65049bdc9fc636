"""Records that cross a seam between two parts of the system.

Token ids are what travels: a completion is never decoded and tokenised again on its way into a
preference pair, so what is trained on is exactly what was sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Message = Mapping[str, str]
"""One chat turn: {"role": "system" | "user" | "assistant", "content": text}."""

TokenIds = tuple[int, ...]


class WeightSet(StrEnum):
    """Which copy of the weights a rollout or a reference pass uses.

    POLICY: what is being trained. FROZEN: what the run started from, or what its preparation made
    of that (RunContext.freeze). EMA: the moving average of
    the policy. LAGGED: an earlier policy or EMA, taken when the reference was last moved.
    """

    POLICY = "policy"
    FROZEN = "frozen"
    EMA = "ema"
    LAGGED = "lagged"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class Demonstration:
    """A prompt with one answer to imitate; the answer ends with the end-of-turn token."""

    id: str
    messages: tuple[Message, ...]
    prompt_ids: TokenIds
    response_ids: TokenIds
    response: str
    source: str
    """Where the row came from, `file:line`."""


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt; `strength` is P(chosen beats rejected).

    `augmented_prompt_ids` is the same prompt with a refinement instruction before the query, for
    losses that score the answers under both. `messages` are there for pairs read from data.
    """

    id: str
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    strength: float = 1.0
    provenance: Mapping[str, Any] = field(default_factory=dict)
    augmented_prompt_ids: TokenIds | None = None
    messages: tuple[Message, ...] = ()


TrainingRow = Demonstration | PreferencePair


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Temperature 0 is greedy; top_p 1 and top_k 0 switch those cuts off.

    `stop_token_ids` end an answer, beside the engine's own stop tokens.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: TokenIds = ()


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to sample. `seed` alone decides the draw, whatever the batch or layout.

    Several answers to one prompt are several requests; an engine reads their prompt once where it
    can. To continue an answer, its first tokens are the end of `prompt_ids`.
    `max_new_tokens` lowers the limit of the SamplingParams for this request.
    """

    id: str
    prompt_ids: TokenIds
    seed: int = 0
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class LabelScores:
    """How likely a model finds each label as the next token.

    `logprobs`: one for each label, untempered. `best`: the log-prob of its likeliest next token,
    whichever that is.
    """

    logprobs: tuple[float, ...]
    best: float


@dataclass(frozen=True)
class Completion:
    """What an engine returns.

    `token_ids` includes the stop token when finish_reason is STOP; `logprobs` are the untempered
    log-probabilities of those tokens, one each; `weight_version` names the weights that made it.
    `cached_tokens` of the prompt were not computed anew.
    """

    id: str
    token_ids: TokenIds
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    weight_set: WeightSet
    weight_version: int
    cached_tokens: int = 0


@dataclass
class DropReport:
    """Rows kept and dropped, with the reason for each drop; nothing is dropped without a count."""

    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.every: list[tuple[str, str]] = []
        """(reason, row) of each drop of this process: no field, since it is kept in a file."""

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.examples.setdefault(reason, where)
        self.every.append((reason, where))

    def add(self, other: DropReport) -> None:
        """Count another report's rows too."""
        self.kept += other.kept
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        self.examples = {**other.examples, **self.examples}
        self.every += other.every

    def summary(self) -> str:
        dropped = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.dropped.items()))
        return f"{self.kept} kept" + (f", dropped {dropped}" if dropped else ", none dropped")


def flatten_messages(messages: Sequence[Message]) -> str:
    """Readable text of a conversation, for prompts shown to a teacher and for reports."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)
