from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_selfpref.config.model_schema import AttentionBackend
from nemo_selfpref.data.spans import ContextSlices, Span
from nemo_selfpref.megatron.attention import PackedCoreAttention
from nemo_selfpref.megatron.attention_layout import (
    _groups_of_like_length,
    attention_layout,
    packed_attention,
)

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 4, 2, 8
MIXES = [
    (1,),
    (5,),
    (1, 1, 1),
    (4, 4),
    (3, 4, 4),
    (1, 30),
    (30, 1),
    (7, 1, 30, 2, 29, 1, 8),
    (2, 60, 3, 59, 1, 20, 21, 2),
    (16, 15, 14, 13, 1, 2),
]


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    module = PackedCoreAttention(SimpleNamespace(), 1, None, "self")
    layout = packed_attention(lengths, CPU)
    return module(q[:, None], k[:, None], v[:, None], None, packed_seq_params=layout)[:, 0]


def attend_alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention of one sequence, written out; query heads share key-value heads."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def tensors(total: int, kv_heads: int = KV_HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(total)
    shapes = [(total, HEADS, DIM), (total, kv_heads, DIM), (total, kv_heads, DIM)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


def check(lengths: tuple[int, ...], kv_heads: int) -> None:
    """Packed output and gradients equal those of each sequence on its own."""
    qkv = tensors(sum(lengths), kv_heads)
    packed = attend(*qkv, lengths)
    alone = torch.cat(
        [attend_alone(*p) for p in zip(*(x.split(lengths) for x in qkv), strict=True)]
    )
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(packed.shape, dtype=torch.float64)
    got = torch.autograd.grad(packed, qkv, upstream)
    want = torch.autograd.grad(alone, qkv, upstream)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", MIXES, ids=str)
def test_packed_equals_one_sequence_at_a_time(lengths: tuple[int, ...], kv_heads: int) -> None:
    check(lengths, kv_heads)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(min_value=1, max_value=40), min_size=1, max_size=9).map(tuple))
def test_packed_equals_one_sequence_at_a_time_for_any_lengths(lengths: tuple[int, ...]) -> None:
    check(lengths, KV_HEADS)


def test_the_softmax_scale_is_used() -> None:
    q, k, v = tensors(6)
    module = PackedCoreAttention(SimpleNamespace(), 1, None, "self", softmax_scale=1e-12)
    layout = packed_attention((6,), CPU)
    out = module(q[:, None], k[:, None], v[:, None], None, packed_seq_params=layout)
    # A vanishing scale makes every weight equal: the output is the running mean of the values.
    mean = v.cumsum(0) / torch.arange(1, 7)[:, None, None]
    want = mean.repeat_interleave(2, 1).flatten(1)
    torch.testing.assert_close(out[:, 0], want, rtol=0, atol=1e-9)


def test_sequences_of_unlike_length_are_grouped() -> None:
    # 8 x 1.25 = 10 cells would hold both 8 and 2 only if 16 <= 1.25 * 10.
    assert _groups_of_like_length((8, 2)) == [[0], [1]]
    assert _groups_of_like_length((2, 8, 7, 2)) == [[1, 2], [0, 3]]
    # 3 x 8 = 24 cells for 20 tokens: 24 <= 1.25 * 20, one group.
    assert _groups_of_like_length((8, 6, 6)) == [[0, 1, 2]]
    assert _groups_of_like_length((8, 5, 6)) == [[0, 2], [1]]


@given(st.lists(st.integers(min_value=1, max_value=200), min_size=1, max_size=30).map(tuple))
def test_groups_hold_every_sequence_once_and_little_padding(lengths: tuple[int, ...]) -> None:
    groups = _groups_of_like_length(lengths)
    assert sorted(m for group in groups for m in group) == list(range(len(lengths)))
    for group in groups:
        members = [lengths[m] for m in group]
        assert max(members) * len(members) <= 1.25 * sum(members)


def test_layout_of_two_groups() -> None:
    layout = packed_attention((2, 5), CPU)
    assert [g.queries.tolist() for g in layout.groups] == [[[2, 3, 4, 5, 6]], [[0, 1]]]
    assert [g.cells.tolist() for g in layout.groups] == [[0, 1, 2, 3, 4], [0, 1]]
    assert all(g.mask is None for g in layout.groups)
    assert layout.tokens_of_groups is not None
    assert layout.tokens_of_groups.tolist() == [2, 3, 4, 5, 6, 0, 1]


def test_layout_of_one_padded_group() -> None:
    layout = packed_attention((3, 4), CPU)
    (group,) = layout.groups
    assert group.queries.tolist() == group.keys.tolist() == [[0, 1, 2, 0], [3, 4, 5, 6]]
    assert group.cells.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert layout.tokens_of_groups is None
    assert layout.qkv_format == "sbhd"


SHARED = (
    Span(0, 4),
    Span(4, 3, 0, 4),
    Span(7, 1, 0, 4),
    Span(8, 5),
    Span(13, 2, 8, 5),
    Span(15, 1),
)
"""Two prompts of 4 and 5 tokens with answers of 3 and 1, and of 2; one token of padding."""


def sees(spans: Sequence[Span]) -> Tensor:
    """bool [T, T]: whether a token sees another, rule by rule."""
    total = sum(span.length for span in spans)
    seen = torch.zeros(total, total, dtype=torch.bool)
    for span in spans:
        for token in range(span.start, span.start + span.length):
            seen[token, span.start : token + 1] = True
            seen[token, span.context : span.context + span.context_length] = True
    return seen


def attend_seen(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


@pytest.mark.parametrize("backend", [AttentionBackend.sdpa, AttentionBackend.flex])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_spans_and_slices(backend: AttentionBackend, size: int) -> None:
    """Shared prompts, cut over context ranks or not, by both backends: outputs and gradients."""
    qkv = tensors(16)
    want = attend_seen(*qkv, sees(SHARED))
    module = PackedCoreAttention(SimpleNamespace(), 1, None, "self")
    parts = []
    for rank in range(size):
        slices = ContextSlices(16, size, rank)
        layout = attention_layout(SHARED, CPU, slices=slices, backend=backend)
        own, gathered = slices.own_tokens(), slices.gathered_tokens()
        q, k, v = qkv[0][own], qkv[1][gathered], qkv[2][gathered]
        if backend is AttentionBackend.flex:
            q, k, v = q.detach(), k.detach(), v.detach()
        parts.append(module._packed(q, k, v, layout).flatten(1))
    order = torch.cat([ContextSlices(16, size, rank).own_tokens() for rank in range(size)])
    got = torch.zeros_like(want).index_copy(0, order, torch.cat(parts))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if backend is AttentionBackend.flex:
        return  # torch has no backward pass of it on a CPU
    upstream = torch.randn(want.shape, dtype=torch.float64)
    pairs = (torch.autograd.grad(out, qkv, upstream, retain_graph=True) for out in (got, want))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_context_slices_by_hand() -> None:
    assert ContextSlices(8, 2, 0).own() == [(0, 2), (6, 8)]
    assert ContextSlices(8, 2, 1).own_tokens().tolist() == [2, 3, 4, 5]
    assert ContextSlices(8, 2, 1).gathered_tokens().tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert ContextSlices(8, 2, 0).place_in_gathered().tolist() == [0, 1, 4, 5, 6, 7, 2, 3]
    assert ContextSlices(8, 2, 1).place_here().tolist() == [-1, -1, 0, 1, 2, 3, -1, -1]
    assert ContextSlices(5, 1, 0).own() == [(0, 5)]
