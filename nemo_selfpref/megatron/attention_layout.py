"""Who sees whom among packed tokens, in the shapes that attention computes in.

It is told by spans (data/spans.py): the tokens of a span attend causally to themselves and to all
of their context. So one layout describes separate sequences, answers that share a prompt, and a
part of either under context parallelism.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from nemo_selfpref.config.model_schema import AttentionBackend
from nemo_selfpref.data.spans import ContextSlices, Span, spans_of
from nemo_selfpref.megatron.kv_cache import KVCache

_MAX_PADDED_SHARE = 1.25
"""Runs are attended to in groups of like length; a group may be padded by a quarter."""


@dataclass(frozen=True)
class AttentionGroup:
    """Runs of queries attended to together: S runs of up to Lq queries and up to Lk keys each.

    queries: int64 [S, Lq] token of each cell among this rank's; keys: int64 [S, Lk] token of each
    cell among the keys; cells: int64 [n] the cells of `queries` that are no padding, in order.
    mask: bool [S, 1, Lq, Lk], or None where every run sees its own tokens only, causally.
    """

    queries: Tensor
    keys: Tensor
    cells: Tensor
    mask: Tensor | None = None


@dataclass(kw_only=True)
class PackedAttention(PackedSeqParams):
    """Layout of packed tokens, carried through megatron-core as its packed_seq_params.

    qkv_format stays "sbhd" so that megatron-core applies the rotary embedding token by token from
    the frequencies it is handed, whatever the sequence.
    """

    groups: list[AttentionGroup] = field(default_factory=list)
    tokens_of_groups: Tensor | None = None
    """Packed position of each token, group after group; None where that is the identity."""
    key_group: Any = None
    """Process group over which keys and values are gathered; None where this rank has them all."""
    block_mask: BlockMask | None = None
    """Takes the place of `groups` where FlexAttention computes."""
    cache: KVCache | None = None
    cache_rows: Tensor | None = None
    cache_positions: Tensor | None = None
    decode_mask: Tensor | None = None
    """bool [B, 1, 1, L] while decoding one token a sequence; None otherwise."""
    decode_length: int = 0

    def __post_init__(self) -> None:
        self.qkv_format = "sbhd"


def packed_attention(
    lengths: tuple[int, ...], device: torch.device, **cache: Any
) -> PackedAttention:
    """Causal attention within each of the sequences laid end to end."""
    return attention_layout(spans_of(lengths), device, **cache)


def attention_layout(
    spans: Sequence[Span],
    device: torch.device,
    *,
    slices: ContextSlices | None = None,
    key_group: Any = None,
    backend: AttentionBackend = AttentionBackend.sdpa,
    **cache: Any,
) -> PackedAttention:
    """Attention of the tokens that `slices` leaves on this rank (all of them by default).

    With slices, keys and values are gathered over `key_group` before attention.
    """
    total = spans[-1].start + spans[-1].length
    slices = slices or ContextSlices(total, 1, 0)
    split: dict[str, Any] = {"key_group": key_group if slices.size > 1 else None, **cache}
    if backend is AttentionBackend.flex:
        return PackedAttention(block_mask=_block_mask(spans, slices, device), **split)
    groups, order = _groups(_runs(spans, slices), slices.place_in_gathered(), device)
    in_order = bool((order[1:] > order[:-1]).all())
    return PackedAttention(
        groups=groups, tokens_of_groups=None if in_order else order.to(device), **split
    )


@dataclass(frozen=True)
class _Run:
    """Queries [start, start + length) of this rank's tokens; they see all of `context` and the
    tokens from `own` on, the first query the first of these alone."""

    start: int
    length: int
    own: int
    own_length: int
    context: int
    context_length: int

    @property
    def num_keys(self) -> int:
        return self.context_length + self.own_length

    @property
    def is_plain(self) -> bool:
        """Causal over its own queries' tokens."""
        return self.num_keys == self.length


def _runs(spans: Sequence[Span], slices: ContextSlices) -> list[_Run]:
    runs, local = [], 0
    for low, high in slices.own():
        for span in spans:
            first, last = max(span.start, low), min(span.start + span.length, high)
            if first >= last:
                continue
            runs.append(
                _Run(
                    start=local + first - low,
                    length=last - first,
                    own=span.start,
                    own_length=last - span.start,
                    context=span.context,
                    context_length=span.context_length,
                )
            )
        local += high - low
    return runs


def _groups(
    runs: Sequence[_Run], place: Tensor, device: torch.device
) -> tuple[list[AttentionGroup], Tensor]:
    """The groups, and each token's packed position in their order. place: int64 [T] where the key
    of each packed token lies among the gathered keys."""
    groups, order = [], []
    for numbers in _groups_of_like_size(runs):
        members = [runs[n] for n in numbers]
        start = torch.tensor([m.start for m in members])[:, None]
        size = torch.tensor([m.length for m in members])[:, None]
        column = torch.arange(max(m.length for m in members))[None]
        # A padding cell reads the run's first token, and what it computes is not read.
        queries = start + torch.where(column < size, column, torch.zeros_like(column))
        cells = (column < size).flatten().nonzero()[:, 0]
        order.append(queries.flatten()[cells])
        keys, mask = _keys_of(members, column, place)
        groups.append(
            AttentionGroup(
                queries.to(device),
                keys.to(device),
                cells.to(device),
                None if mask is None else mask.to(device),
            )
        )
    return groups, torch.cat(order)


def _keys_of(members: Sequence[_Run], query: Tensor, place: Tensor) -> tuple[Tensor, Tensor | None]:
    """Keys [S, Lk] of some runs, context first, and the mask where causality alone won't do. Keys
    that pad a run come after all a query may see."""
    context = torch.tensor([m.context_length for m in members])[:, None]
    own = torch.tensor([m.own_length for m in members])[:, None]
    column = torch.arange(max(m.num_keys for m in members))[None]
    in_context = torch.tensor([m.context for m in members])[:, None] + column
    in_own = torch.tensor([m.own for m in members])[:, None] + column - context
    token = torch.where(column < context, in_context, in_own)
    first = torch.tensor([m.own for m in members])[:, None]
    keys = place[torch.where(column < context + own, token, first)]
    if all(m.is_plain for m in members):
        return keys, None
    before = context + own - torch.tensor([m.length for m in members])[:, None]
    return keys, (column[:, None] <= (before + query)[:, :, None])[:, None]


def _groups_of_like_size(runs: Sequence[_Run]) -> list[list[int]]:
    """Run numbers in groups whose padding stays small; one group where that is cheap."""
    groups: list[list[int]] = []
    for plain in (True, False):
        members = [n for n, run in enumerate(runs) if run.is_plain is plain]
        if plain and members:
            lengths = tuple(runs[n].length for n in members)
            groups += [[members[i] for i in group] for group in _groups_of_like_length(lengths)]
        elif members:
            groups += _groups_of_like_area(runs, members)
    return groups


def _groups_of_like_area(runs: Sequence[_Run], members: Sequence[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    used = rows = columns = 0
    for n in sorted(members, key=lambda n: (-runs[n].num_keys, -runs[n].length)):
        area = runs[n].length * runs[n].num_keys
        height, width = max(rows, runs[n].length), max(columns, runs[n].num_keys)
        cells = height * width * (len(groups[-1]) + 1) if groups else 0
        if not groups or cells > _MAX_PADDED_SHARE * (used + area):
            groups.append([])
            used, height, width = 0, runs[n].length, runs[n].num_keys
        groups[-1].append(n)
        used, rows, columns = used + area, height, width
    return groups


def _groups_of_like_length(lengths: tuple[int, ...]) -> list[list[int]]:
    """Sequence numbers in groups whose padding stays small; one group where that is cheap."""
    if max(lengths) * len(lengths) <= _MAX_PADDED_SHARE * sum(lengths):
        return [list(range(len(lengths)))]
    groups: list[list[int]] = []
    used = longest = 0
    for member in sorted(range(len(lengths)), key=lambda m: -lengths[m]):
        fits = groups and longest * (len(groups[-1]) + 1) <= _MAX_PADDED_SHARE * (
            used + lengths[member]
        )
        if not fits:
            groups.append([])
            used, longest = 0, lengths[member]
        groups[-1].append(member)
        used += lengths[member]
    return groups


def _block_mask(spans: Sequence[Span], slices: ContextSlices, device: torch.device) -> BlockMask:
    """The same rule for FlexAttention, which computes only the blocks where it allows a pair."""
    columns = [(s.start, s.context, s.context + s.context_length) for s in spans]
    sizes = torch.tensor([s.length for s in spans])
    first, low, high = torch.tensor(columns).repeat_interleave(sizes, 0).to(device).unbind(1)
    query_token = slices.own_tokens().to(device)
    key_token = slices.gathered_tokens().to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        q, k = query_token[query], key_token[key]
        own = (k >= first[q]) & (k <= q)
        return own | ((k >= low[q]) & (k < high[q]))

    make = _block_mask_maker(device.type == "cuda")
    return make(sees, None, None, query_token.numel(), key_token.numel(), device=str(device))


@functools.cache
def _block_mask_maker(cuda: bool) -> Any:
    # Compiled, the rule is never written out for all pairs of tokens, only for blocks of them.
    return torch.compile(create_block_mask) if cuda else create_block_mask
