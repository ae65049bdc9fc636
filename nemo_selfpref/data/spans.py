"""Which tokens of a packed batch belong together, and which of them a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Tokens [start, start + length) of a packed batch. Each attends to those before it in the
    span, and to all tokens of its context, [context, context + context_length)."""

    start: int
    length: int
    context: int = 0
    context_length: int = 0


def spans_of(lengths: Sequence[int]) -> tuple[Span, ...]:
    """Separate sequences laid end to end."""
    spans, start = [], 0
    for length in lengths:
        spans.append(Span(start, length))
        start += length
    return tuple(spans)


@dataclass(frozen=True)
class ContextSlices:
    """How context parallelism cuts `total` packed tokens over `size` ranks.

    The tokens are cut into 2 * size equal slices and rank r holds slices r and 2 size - 1 - r:
    causal attention costs more the later a token stands in its sequence, so each rank gets an
    early and a late part. `total` must be a multiple of 2 * size.
    """

    total: int
    size: int
    rank: int

    def own(self) -> list[tuple[int, int]]:
        """[low, high) of the packed tokens on this rank, in the order it holds them."""
        return self._of(self.rank)

    def own_tokens(self) -> Tensor:
        """int64 [total / size] packed position of each token here."""
        return torch.cat([torch.arange(low, high) for low, high in self.own()])

    def gathered_tokens(self) -> Tensor:
        """int64 [total] packed position of each token when all ranks' are laid end to end."""
        ranges = [part for rank in range(self.size) for part in self._of(rank)]
        return torch.cat([torch.arange(low, high) for low, high in ranges])

    def place_in_gathered(self) -> Tensor:
        """int64 [total] where each packed token lies in that order."""
        return _inverse(self.gathered_tokens(), self.total)

    def place_here(self) -> Tensor:
        """int64 [total] where each packed token lies on this rank; -1 for those of others."""
        return _inverse(self.own_tokens(), self.total)

    def _of(self, rank: int) -> list[tuple[int, int]]:
        if self.size == 1:
            return [(0, self.total)]
        assert self.total % (2 * self.size) == 0, "the batch was not padded for its context slices"
        width = self.total // (2 * self.size)
        return [(n * width, (n + 1) * width) for n in (rank, 2 * self.size - 1 - rank)]


def _inverse(tokens: Tensor, total: int) -> Tensor:
    place = torch.full((total,), -1, dtype=torch.int64)
    place[tokens] = torch.arange(tokens.numel())
    return place
