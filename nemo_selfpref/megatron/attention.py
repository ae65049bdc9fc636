"""Attention over packed tokens, and over a key-value cache while decoding.

One module serves training, log-prob passes and generation on every device. It takes packed tokens
[T, 1, heads, dim] after the rotary embedding; attention_layout.py says who sees whom.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from nemo_selfpref.megatron.attention_layout import PackedAttention


@functools.cache
def _flex(cuda: bool) -> Any:
    # On a CPU it runs uncompiled, as a check of the mask: the compiler has no backward pass there.
    return torch.compile(flex_attention, dynamic=True) if cuda else flex_attention


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
        if layout.key_group is not None:
            k, v = _gather_keys(k, v, layout.key_group)
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
        if layout.block_mask is not None:
            return self._flex(q, k, v, layout.block_mask)
        parts = []
        for group in layout.groups:
            queries = q[group.queries].transpose(1, 2)
            keys, values = (x[group.keys].transpose(1, 2) for x in (k, v))
            out = self._attend(queries, keys, values, causal=group.mask is None, mask=group.mask)
            parts.append(out.transpose(1, 2).flatten(0, 1)[group.cells])
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        if layout.tokens_of_groups is None:
            return joined
        return torch.zeros_like(joined).index_copy(0, layout.tokens_of_groups, joined)

    def _flex(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = _flex(q.is_cuda)(
            queries,
            keys,
            values,
            block_mask=mask,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[0].transpose(0, 1)

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


def _gather_keys(key: Tensor, value: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Keys and values of every rank of `group`, in rank order; gradients are summed back."""
    both = torch.stack([key, value], dim=1)
    both = gather_from_sequence_parallel_region(both, group=group)
    return both[:, 0], both[:, 1]
