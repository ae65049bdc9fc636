"""The in-process engine: decodes on the training weights, with no second copy and no server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_selfpref.errors import RolloutCancelled, RolloutError
from nemo_selfpref.monitor.heartbeat import tick
from nemo_selfpref.rollout.engine import FOREVER, Until
from nemo_selfpref.rollout.sampling import sample, uniform
from nemo_selfpref.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    LabelScores,
    SamplingParams,
    TokenIds,
    WeightSet,
)

_COMPACT_BELOW = 0.6
"""Finished sequences leave the batch once fewer than this share are still running."""


class Decoder(Protocol):
    """What the engine needs of a model (megatron/decode.py)."""

    def using(self, weight_set: WeightSet) -> AbstractContextManager[int]: ...
    def begin(self, prompts: Sequence[TokenIds], max_new_tokens: int) -> Tensor | None: ...
    def advance(self, tokens: Tensor) -> Tensor | None: ...
    def keep(self, rows: Tensor) -> None: ...
    def share(self, tokens: Tensor | None, count: int) -> Tensor: ...


@dataclass
class _Running:
    """A sequence being decoded."""

    index: int
    request: GenerationRequest
    limit: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stopped: bool = False

    @property
    def finished(self) -> bool:
        return self.stopped or len(self.token_ids) >= self.limit


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
        agree: whether any rank of the run says so; every rank must give up at the same token.
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
        agree: Callable[[bool], bool] = lambda over: over,
    ) -> None:
        self.decoder, self.stop_ids, self.max_length = decoder, stop_ids, max_length
        self.batch_size, self.replica, self.num_replicas = batch_size, replica, num_replicas
        self._gather, self._gather_stages, self._agree = gather, gather_stages, agree

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: Callable[[int, int], None] | None = None,
        until: Until = FOREVER,
    ) -> list[Completion]:
        """See RolloutEngine.generate."""
        running = [_Running(i, r, _limit(r, params)) for i, r in enumerate(requests)]
        for sequence in running:
            self._check(sequence.request.id, sequence.request.prompt_ids, sequence.limit)

        def decode(numbers: list[int]) -> tuple[dict[str, list[Any]], int]:
            finished = self._decode([running[n] for n in numbers], params, until)
            return finished, sum(len(entry[0]) for entry in finished.values())

        with self.decoder.using(weight_set) as version:
            done = self._over_replicas([r.prompt_ids for r in requests], decode, on_done, until)
        return [_completion(r, e, weight_set, version) for r, e in zip(requests, done, strict=True)]

    def label_scores(
        self,
        prompts: Sequence[TokenIds],
        labels: TokenIds,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: Callable[[int, int], None] | None = None,
        until: Until = FOREVER,
    ) -> list[LabelScores]:
        """See RolloutEngine.label_scores."""
        for number, prompt in enumerate(prompts):
            self._check(str(number), prompt, 0)

        def weigh(numbers: list[int]) -> tuple[dict[str, list[Any]], int]:
            tick()
            logits = self.decoder.begin([prompts[n] for n in numbers], 0)
            if logits is None:
                return {}, 0
            logprobs = logits.log_softmax(-1)
            rows = torch.cat([logprobs[:, list(labels)], logprobs.amax(-1, keepdim=True)], dim=1)
            return {str(n): row for n, row in zip(numbers, rows.tolist(), strict=True)}, 0

        with self.decoder.using(weight_set):
            done = self._over_replicas(prompts, weigh, on_done, until)
        return [LabelScores(tuple(row[:-1]), row[-1]) for row in done]

    def _over_replicas(
        self,
        prompts: Sequence[TokenIds],
        work: Callable[[list[int]], tuple[dict[str, list[Any]], int]],
        on_done: Callable[[int, int], None] | None,
        until: Until,
    ) -> list[list[Any]]:
        """Share the prompts out, longest first, and join what `work` makes of each batch."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        mine = order[self.replica :: self.num_replicas]
        done: dict[str, list[Any]] = {}
        with torch.no_grad():
            # As many rounds on every replica, so that all of them look at the time together.
            for start in range(0, -(-len(order) // self.num_replicas), self.batch_size):
                self._check_time(until)
                batch = mine[start : start + self.batch_size]
                if not batch:
                    continue
                finished, tokens = work(batch)
                done.update(self._gather_stages(finished)[-1])
                if on_done is not None:
                    on_done(len(batch) * self.num_replicas, tokens * self.num_replicas)
        for part in self._gather(done):
            done.update(part)
        return [done[str(i)] for i in range(len(prompts))]

    def _check_time(self, until: Until) -> None:
        """Give up where `until` is over for any rank. Collective."""
        if until is not FOREVER and self._agree(until.over):
            until.check("sampling")
            raise RolloutCancelled("sampling: another rank gave up")

    def _check(self, name: str, prompt: TokenIds, new_tokens: int) -> None:
        if not prompt:
            raise RolloutError(f"prompt {name} is empty: expected at least one token")
        if len(prompt) + new_tokens > self.max_length:
            raise RolloutError(
                f"prompt {name} has {len(prompt)} tokens; with rollout.max_new_tokens="
                f"{new_tokens} that passes the model's {self.max_length}. "
                "Lower rollout.max_new_tokens or data.max_prompt_length."
            )

    def _decode(
        self, batch: list[_Running], params: SamplingParams, until: Until
    ) -> dict[str, list[Any]]:
        done: dict[str, list[Any]] = {}
        active = batch
        longest = max(s.limit for s in active)
        stop_ids = self.stop_ids | set(params.stop_token_ids)
        logits = self.decoder.begin([s.request.prompt_ids for s in active], longest)
        for step in range(longest):
            tick()
            tokens = self._sample(active, logits, params, step)
            self._append(active, tokens, stop_ids)
            if all(s.finished for s in active):
                break
            if self.num_replicas == 1:  # others decode for another number of steps
                self._check_time(until)
            active, tokens = self._compact(active, tokens)
            logits = self.decoder.advance(tokens)
        for sequence in batch:
            reason = FinishReason.STOP if sequence.stopped else FinishReason.LENGTH
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

    def _append(self, active: list[_Running], tokens: Tensor, stop_ids: frozenset[int]) -> None:
        for sequence, token in zip(active, tokens.tolist(), strict=True):
            if not sequence.finished:
                sequence.token_ids.append(token)
                sequence.stopped = token in stop_ids

    def _compact(self, active: list[_Running], tokens: Tensor) -> tuple[list[_Running], Tensor]:
        running = [i for i, s in enumerate(active) if not s.finished]
        if len(running) > _COMPACT_BELOW * len(active):
            return active, tokens
        rows = torch.tensor(running, device=tokens.device)
        self.decoder.keep(rows)
        return [active[i] for i in running], tokens[rows]


def _limit(request: GenerationRequest, params: SamplingParams) -> int:
    own = request.max_new_tokens
    return params.max_new_tokens if own is None else min(own, params.max_new_tokens)


def _completion(
    request: GenerationRequest, entry: list[Any], weight_set: WeightSet, version: int
) -> Completion:
    tokens, logprobs, reason = entry
    return Completion(
        id=request.id,
        token_ids=tuple(tokens),
        logprobs=tuple(logprobs),
        finish_reason=FinishReason(reason),
        weight_set=weight_set,
        weight_version=version,
    )
