"""The in-process engine: decodes on the training weights, with no second copy and no server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_selfpref.errors import RolloutError
from nemo_selfpref.rollout.sampling import sample, uniform
from nemo_selfpref.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenIds,
    WeightSet,
)

_COMPACT_BELOW = 0.6
"""Finished sequences leave the batch once fewer than this share are still running."""


class Decoder(Protocol):
    """What the engine needs of a model (megatron/decode.py)."""

    @property
    def weight_version(self) -> int: ...
    def begin(self, prompts: Sequence[TokenIds], max_new_tokens: int) -> Tensor | None: ...
    def advance(self, tokens: Tensor) -> Tensor | None: ...
    def keep(self, rows: Tensor) -> None: ...
    def share(self, tokens: Tensor | None, count: int) -> Tensor: ...


@dataclass
class _Running:
    """A sequence being decoded."""

    index: int
    request: GenerationRequest
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


class EmbeddedEngine:
    """RolloutEngine over a Decoder; collective over all ranks of the run.

    Args:
        decoder: the model replica of this rank.
        stop_ids: tokens that end an answer; the stop token is part of it.
        max_length: longest prompt + answer the model accepts.
        batch_size: sequences a replica decodes together.
        replica, num_replicas: this rank's data-parallel place; each replica takes its share.
        gather: joins the replicas' JSON results, in replica order.
        gather_stages: the same over the pipeline, whose last stage knows the log-probs.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        stop_ids: frozenset[int],
        max_length: int,
        batch_size: int,
        replica: int = 0,
        num_replicas: int = 1,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        gather_stages: Callable[[Any], list[Any]] = lambda value: [value],
    ) -> None:
        self.decoder, self.stop_ids, self.max_length = decoder, stop_ids, max_length
        self.batch_size, self.replica, self.num_replicas = batch_size, replica, num_replicas
        self._gather, self._gather_stages = gather, gather_stages

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """See RolloutEngine.generate."""
        if weight_set is not WeightSet.POLICY:
            raise RolloutError(
                "the embedded engine decodes on the policy's weights; "
                f"got weight set {weight_set.value}"
            )
        self._check(requests, params)
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
        mine = order[self.replica :: self.num_replicas]
        done: dict[str, list[Any]] = {}
        with torch.no_grad():
            for batch in _chunks(mine, self.batch_size):
                finished = self._decode([_Running(i, requests[i]) for i in batch], params)
                done.update(self._gather_stages(finished)[-1])
                if on_done is not None:
                    tokens = sum(len(entry[0]) for entry in finished.values())
                    on_done(len(batch) * self.num_replicas, tokens * self.num_replicas)
        for part in self._gather(done):
            done.update(part)
        version = self.decoder.weight_version
        return [_completion(r, done[str(i)], version) for i, r in enumerate(requests)]

    def _check(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> None:
        for request in requests:
            length = len(request.prompt_ids)
            if length == 0:
                raise RolloutError(f"prompt {request.id} is empty: expected at least one token")
            if length + params.max_new_tokens > self.max_length:
                raise RolloutError(
                    f"prompt {request.id} has {length} tokens; with rollout.max_new_tokens="
                    f"{params.max_new_tokens} that passes the model's {self.max_length}. "
                    "Lower rollout.max_new_tokens or data.max_prompt_length."
                )

    def _decode(self, batch: list[_Running], params: SamplingParams) -> dict[str, list[Any]]:
        done: dict[str, list[Any]] = {}
        active = batch
        logits = self.decoder.begin([s.request.prompt_ids for s in active], params.max_new_tokens)
        for step in range(params.max_new_tokens):
            tokens = self._sample(active, logits, params, step)
            self._append(active, tokens)
            if all(s.finished for s in active) or step + 1 == params.max_new_tokens:
                break
            active, tokens = self._compact(active, tokens)
            logits = self.decoder.advance(tokens)
        for sequence in batch:
            reason = FinishReason.STOP if sequence.finished else FinishReason.LENGTH
            done[str(sequence.index)] = [sequence.token_ids, sequence.logprobs, reason.value]
        return done

    def _sample(
        self, active: list[_Running], logits: Tensor | None, params: SamplingParams, step: int
    ) -> Tensor:
        tokens = None
        if logits is not None:
            uniforms = [uniform(s.request.seed, step) for s in active]
            tokens, logprobs = sample(logits, params, uniforms)
            for sequence, value in zip(active, logprobs.tolist(), strict=True):
                if not sequence.finished:
                    sequence.logprobs.append(value)
        return self.decoder.share(tokens, len(active))

    def _append(self, active: list[_Running], tokens: Tensor) -> None:
        for sequence, token in zip(active, tokens.tolist(), strict=True):
            if not sequence.finished:
                sequence.token_ids.append(token)
                sequence.finished = token in self.stop_ids

    def _compact(self, active: list[_Running], tokens: Tensor) -> tuple[list[_Running], Tensor]:
        running = [i for i, s in enumerate(active) if not s.finished]
        if len(running) > _COMPACT_BELOW * len(active):
            return active, tokens
        rows = torch.tensor(running, device=tokens.device)
        self.decoder.keep(rows)
        return [active[i] for i in running], tokens[rows]


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _completion(request: GenerationRequest, entry: list[Any], version: int) -> Completion:
    tokens, logprobs, reason = entry
    return Completion(
        id=request.id,
        token_ids=tuple(tokens),
        logprobs=tuple(logprobs),
        finish_reason=FinishReason(reason),
        weight_set=WeightSet.POLICY,
        weight_version=version,
    )
