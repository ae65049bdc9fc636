"""Log-probs of sequences without gradient, over all ranks of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_selfpref.data.batching import PackedBatch, TokenSequence, collate
from nemo_selfpref.megatron.parallel import (
    all_gather_json,
    context_group,
    pipeline_group,
    replica_group,
)
from nemo_selfpref.types import TokenIds

if TYPE_CHECKING:
    from nemo_selfpref.megatron.policy import Policy

_SCORE_TOKENS = 8192
"""Tokens of one forward-only micro-batch."""


@dataclass(frozen=True)
class SequenceLogps:
    """Response log-prob sums float64 [N] and lengths int64 [N] of N sequences."""

    sums: Tensor
    lengths: Tensor


_Found = dict[str, list[float]]
_Read = Callable[["Policy", Tensor, PackedBatch], _Found]
"""What is wanted of the states of one batch, by the number of the sequence."""


def score(
    policy: Policy,
    sequences: Sequence[TokenSequence],
    progress: Callable[[int], None] | None = None,
) -> SequenceLogps:
    """Policy.score."""
    values = _over_ranks(policy, sequences, _sums, progress)
    return SequenceLogps(
        sums=torch.tensor([v[0] for v in values], dtype=torch.float64),
        lengths=torch.tensor([int(v[1]) for v in values], dtype=torch.int64),
    )


def response_token_logprobs(
    policy: Policy, sequences: Sequence[TokenSequence]
) -> list[list[float]]:
    """Log-prob of each response token, given the prompt and those before it; collective, and the
    same on every rank."""
    return _over_ranks(policy, sequences, _tokens)


@torch.no_grad()
def _over_ranks(
    policy: Policy,
    sequences: Sequence[TokenSequence],
    read: _Read,
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    mine = _share_of(policy, sequences)
    found: _Found = {}
    policy.module.eval()
    for numbers in _by_tokens(sequences, mine):
        found.update(_score_batch(policy, [sequences[n] for n in numbers], numbers, read))
        if progress is not None:
            progress(len(numbers) * policy.layout.scorer[1])
    device = policy.platform.device()
    last = all_gather_json(found, pipeline_group(), device)[-1]
    for part in all_gather_json(last, replica_group(), device):
        found.update(part)
    return [found[str(n)] for n in range(len(sequences))]


def _sums(policy: Policy, hidden: Tensor, batch: PackedBatch) -> _Found:
    logps = policy.pair_logps(hidden, batch)
    values = zip(logps.chosen.tolist(), logps.chosen_len.tolist(), strict=True)
    return {str(n): [value, length] for n, (value, length) in zip(batch.rows, values, strict=True)}


def _tokens(policy: Policy, hidden: Tensor, batch: PackedBatch) -> _Found:
    logprobs = policy.response_logprobs(hidden, batch)
    wanted = batch.target_is_response
    # With a split context each rank has some of a sequence's tokens; their places order them.
    mine = [
        batch.target_sequence[wanted].tolist(),
        batch.positions[batch.predict_from[wanted]].tolist(),
        logprobs[wanted].tolist(),
    ]
    parts = all_gather_json(mine, context_group(), hidden.device)
    found: dict[int, list[tuple[int, float]]] = {}
    for part in parts:
        for sequence, position, value in zip(*part, strict=True):
            found.setdefault(sequence, []).append((position, value))
    return {str(n): [v for _, v in sorted(found[i])] for i, n in enumerate(batch.rows)}


def _share_of(policy: Policy, sequences: Sequence[TokenSequence]) -> list[int]:
    """The sequences this rank scores: longest first, those of one prompt together where it is
    computed once for all."""
    number, count = policy.layout.scorer

    def size(n: int) -> int:
        return -len(sequences[n][0] + sequences[n][1])

    if not policy.config.share_prompts:
        return sorted(range(len(sequences)), key=size)[number::count]
    groups: dict[TokenIds, list[int]] = {}
    for n, (prompt, _) in enumerate(sequences):
        groups.setdefault(prompt, []).append(n)
    dealt = sorted(groups.values(), key=lambda g: (min(map(size, g)), g))[number::count]
    return [n for group in dealt for n in group]


def _score_batch(
    policy: Policy, sequences: Sequence[TokenSequence], numbers: Sequence[int], read: _Read
) -> _Found:
    whole = collate(
        sequences,
        numbers,
        paired=False,
        pad_multiple=policy.pad_multiple,
        share_prompts=policy.config.share_prompts,
    )
    found: _Found = {}

    def step(batches: Iterator[PackedBatch], model: torch.nn.Module) -> Any:
        batch, hidden = policy.forward(model, next(batches))

        def keep(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            found.update(read(policy, hidden, batch))
            # Megatron wants a loss and a count; nobody reads them.
            return hidden.new_zeros(()), torch.ones((), dtype=torch.int, device=hidden.device), {}

        return hidden, keep

    count = policy.packing_rule(1).count_multiple
    policy.run_schedule(step, [whole] * count, list(policy.parts), forward_only=True)
    return found


def _by_tokens(sequences: Sequence[TokenSequence], order: Sequence[int]) -> Iterator[list[int]]:
    """Cut `order` into batches of at most _SCORE_TOKENS tokens (one sequence at least)."""
    batch: list[int] = []
    used = 0
    for number in order:
        size = len(sequences[number][0]) + len(sequences[number][1])
        if batch and used + size > _SCORE_TOKENS:
            yield batch
            batch, used = [], 0
        batch.append(number)
        used += size
    if batch:
        yield batch
