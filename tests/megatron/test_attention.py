from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_selfpref.megatron.attention import (
    KVCache,
    PackedCoreAttention,
    _groups_of_like_length,
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
    gathers = [gather.tolist() for gather, _ in layout.groups]
    assert gathers == [[[2, 3, 4, 5, 6]], [[0, 1]]]
    assert [scatter.tolist() for _, scatter in layout.groups] == [[0, 1, 2, 3, 4], [0, 1]]
    assert layout.tokens_of_groups is not None
    assert layout.tokens_of_groups.tolist() == [2, 3, 4, 5, 6, 0, 1]


def test_layout_of_one_padded_group() -> None:
    layout = packed_attention((3, 4), CPU)
    ((gather, scatter),) = layout.groups
    assert gather.tolist() == [[0, 1, 2, 0], [3, 4, 5, 6]]
    assert scatter.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert layout.tokens_of_groups is None
    assert layout.qkv_format == "sbhd"


def test_cache_writes_by_row_and_position() -> None:
    cache = KVCache(batch_size=2, max_length=3)
    key = torch.tensor([[[1.0]], [[2.0]]])
    keys, values = cache.write(7, torch.tensor([0, 1]), torch.tensor([2, 0]), key, -key)
    assert keys[..., 0, 0].tolist() == [[0, 0, 1], [2, 0, 0]]
    assert values[..., 0, 0].tolist() == [[0, 0, -1], [-2, 0, 0]]
    keys, _ = cache.write(7, torch.tensor([1]), torch.tensor([1]), key[:1] * 5, key[:1])
    assert keys[..., 0, 0].tolist() == [[0, 0, 1], [2, 5, 0]]
    assert list(cache.keys) == [7]


def test_cache_keeps_the_rows_asked_for_in_every_layer() -> None:
    cache = KVCache(batch_size=3, max_length=1)
    rows, positions = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    for layer in (1, 2):
        values = torch.tensor([[[1.0]], [[2.0]], [[3.0]]]) * layer
        cache.write(layer, rows, positions, values, values * 10)
    cache.keep(torch.tensor([2, 0]))
    assert cache.batch_size == 2
    assert {n: k.flatten().tolist() for n, k in cache.keys.items()} == {1: [3, 1], 2: [6, 2]}
    assert {n: v.flatten().tolist() for n, v in cache.values.items()} == {1: [30, 10], 2: [60, 20]}


def test_tokens_must_come_packed() -> None:
    q, k, v = tensors(2)
    module = PackedCoreAttention(SimpleNamespace(), 1, None, "self")
    with pytest.raises(AssertionError, match="packed"):
        module(q[:, None], k[:, None], v[:, None], None)
