"""Attention over packed sequences, and over a key-value cache while decoding.

One module serves training, log-prob passes and generation on every device: it takes packed
tokens [T, 1, heads, dim] after the rotary embedding, and never lets one sequence see another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_MAX_PADDED_SHARE = 1.25
"""Sequences are attended to in groups of like length; a group may be padded by a quarter."""


@dataclass
class KVCache:
    """Keys and values of a batch being decoded: per layer [B, max_length, kv_heads, dim]."""

    batch_size: int
    max_length: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def write(
        self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store [N, kv_heads, dim] at (row, position); returns the layer's whole cache."""
        if layer not in self.keys:
            shape = (self.batch_size, self.max_length, *key.shape[1:])
            self.keys[layer] = key.new_zeros(shape)
            self.values[layer] = value.new_zeros(shape)
        self.keys[layer][rows, positions] = key
        self.values[layer][rows, positions] = value
        return self.keys[layer], self.values[layer]

    def keep(self, rows: Tensor) -> None:
        """Forget every sequence but `rows`."""
        self.batch_size = int(rows.numel())
        for store in (self.keys, self.values):
            for layer in store:
                store[layer] = store[layer][rows].contiguous()


@dataclass(kw_only=True)
class PackedAttention(PackedSeqParams):
    """Layout of packed tokens, carried through megatron-core as its packed_seq_params.

    qkv_format stays "sbhd" so that megatron-core applies the rotary embedding token by token from
    the frequencies it is handed, whatever the sequence.
    """

    groups: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """A group's (gather [S, L] token of each cell, scatter [n] cell of each token, in order)."""
    tokens_of_groups: Tensor | None = None
    """Packed position of each token, group after group; None where that is the identity."""
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
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    groups, order = [], []
    for members in _groups_of_like_length(lengths):
        longest = max(lengths[m] for m in members)
        start = torch.tensor([starts[m] for m in members])[:, None]
        size = torch.tensor([lengths[m] for m in members])[:, None]
        column = torch.arange(longest)[None]
        # A padding cell reads the sequence's first token; being later than every real token it is
        # never attended to, and its own output is not read.
        gather = start + torch.where(column < size, column, torch.zeros_like(column))
        scatter = (column < size).flatten().nonzero()[:, 0]
        groups.append((gather.to(device), scatter.to(device)))
        order.append(gather.flatten()[scatter])
    tokens = torch.cat(order)
    in_order = bool((tokens[1:] > tokens[:-1]).all())
    return PackedAttention(
        groups=groups,
        tokens_of_groups=None if in_order else tokens.to(device),
        **cache,
    )


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


class PackedCoreAttention(torch.nn.Module):
    """Core attention of the layer spec. Dropout is not supported: it would make log-probs differ
    between the policy and its reference."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedAttention | None = None,
    ) -> Tensor:
        """[T, 1, heads, dim] queries, keys and values to [T, 1, heads * dim]."""
        assert isinstance(packed_seq_params, PackedAttention), "tokens must come packed"
        layout = packed_seq_params
        q, k, v = query[:, 0], key[:, 0], value[:, 0]
        if layout.cache is not None:
            assert layout.cache_rows is not None and layout.cache_positions is not None
            keys, values = layout.cache.write(
                self.layer_number, layout.cache_rows, layout.cache_positions, k, v
            )
            if layout.decode_mask is not None:
                out = self._decode(q, keys, values, layout)
                return out.reshape(query.shape[0], 1, -1)
        return self._packed(q, k, v, layout).reshape(query.shape[0], 1, -1)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, layout: PackedAttention) -> Tensor:
        parts = []
        for gather, scatter in layout.groups:
            padded = (x[gather].transpose(1, 2) for x in (q, k, v))
            out = self._attend(*padded, causal=True, mask=None)
            parts.append(out.transpose(1, 2).flatten(0, 1)[scatter])
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        if layout.tokens_of_groups is None:
            return joined
        return torch.zeros_like(joined).index_copy(0, layout.tokens_of_groups, joined)

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor, layout: PackedAttention) -> Tensor:
        length = layout.decode_length
        return self._attend(
            q[:, :, None],
            keys[:, :length].transpose(1, 2),
            values[:, :length].transpose(1, 2),
            causal=False,
            mask=layout.decode_mask,
        )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None
    ) -> Tensor:
        return scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=causal,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
