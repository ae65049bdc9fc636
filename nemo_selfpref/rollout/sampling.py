"""Drawing tokens from logits, reproducibly: the draw of a request depends on its own seed and on
how many tokens it has, so batches can be cut, compacted and spread over replicas at will."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from nemo_selfpref.types import SamplingParams

_MASK = (1 << 64) - 1


def seed_of(*parts: object) -> int:
    """A 63-bit seed out of anything printable, stable across processes and versions."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniform(seed: int, step: int) -> float:
    """The step-th uniform draw in [0, 1) of the stream `seed` (SplitMix64)."""
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def sample(logits: Tensor, params: SamplingParams, uniforms: list[float]) -> tuple[Tensor, Tensor]:
    """Next token int64 [B] and its untempered log-prob float32 [B] from logits float32 [B, V].

    Temperature first, then top-k, then the smallest set with top-p of the mass; the token is the
    inverse of that distribution at the request's uniform draw.
    """
    logprobs = logits.log_softmax(-1)
    if params.temperature == 0.0:
        tokens = logits.argmax(-1)
    else:
        tokens = _draw(logits / params.temperature, params, uniforms)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _draw(scaled: Tensor, params: SamplingParams, uniforms: list[float]) -> Tensor:
    width = params.top_k if 0 < params.top_k < scaled.shape[1] else scaled.shape[1]
    order, ids = scaled.topk(width, dim=-1)
    probs = order.softmax(-1, dtype=torch.float64)
    cumulative = probs.cumsum(-1)
    # The token that crosses top_p belongs to the set.
    kept = torch.where(cumulative - probs < params.top_p, probs, torch.zeros_like(probs))
    # The draw goes by token id, not by rank: tokens that are equally likely but for rounding may
    # change places in the ranking from one parallel layout to another.
    ids, by_id = ids.sort(-1)
    kept = kept.gather(1, by_id)
    cumulative = kept.cumsum(-1)
    draw = torch.tensor(uniforms, dtype=torch.float64, device=scaled.device)[:, None]
    position = (cumulative <= draw * cumulative[:, -1:]).sum(-1, keepdim=True)
    places = torch.arange(width, device=scaled.device)
    last = torch.where(kept > 0, places, 0).amax(-1, keepdim=True)
    return ids.gather(1, torch.minimum(position, last))[:, 0]
