"""The element-wise passes of the log-prob head as Triton kernels: one reading of a chunk's logits
each, where torch needs one for every operation. The products stay with cuBLAS.

TRITON_INTERPRET=1, set before this file is imported, runs them on the CPU, slowly.
"""

from __future__ import annotations

import os

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Read when the kernels below are made: they are interpreted from then on, or never."""

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _statistics_kernel(
    logits, local, peaks, totals, at_targets, stride, vocab_rows, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    offsets = tl.arange(0, BLOCK)
    # Every lane keeps its own maximum and sum, so that lanes meet once a row and not once a block.
    # The maximum starts finite: of two infinities the difference would be no number.
    peak = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_rows, BLOCK):
        columns = start + offsets
        value = tl.load(line + columns, mask=columns < vocab_rows, other=float("-inf"))
        higher = tl.maximum(peak, value)
        total = total * tl.exp(peak - higher) + tl.exp(value - higher)
        peak = higher
    highest = tl.max(peak, axis=0)
    target = tl.load(local + row)
    tl.store(peaks + row, highest)
    tl.store(totals + row, tl.sum(total * tl.exp(peak - highest), axis=0))
    tl.store(at_targets + row, tl.load(line + target, mask=target >= 0, other=0.0))


@triton.jit
def _gradient_kernel(
    logits, local, lse, grad, out, stride, out_stride, vocab_rows, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab_rows
    value = tl.load(logits + row.to(tl.int64) * stride + columns, mask=inside, other=0.0)
    onehot = (columns == tl.load(local + row)).to(tl.float32)
    value = (onehot - tl.exp(value - tl.load(lse + row))) * tl.load(grad + row)
    line = out + row.to(tl.int64) * out_stride
    tl.store(line + columns, value.to(out.dtype.element_ty), mask=inside)


def statistics(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum of exp(logit - maximum) and the target's logit of each row, float32 [n].

    Args:
        logits: float32 [n, V_local].
        local: int64 [n] column of each row's target; -1 where there is none, its logit is then 0.
    """
    rows, columns = logits.shape
    peak, total, at_target = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    if rows:
        _statistics_kernel[(rows,)](  # type: ignore[reportIndexIssue]
            logits,
            local,
            peak,
            total,
            at_target,
            logits.stride(0),
            columns,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return peak, total, at_target


def to_gradient(logits: Tensor, local: Tensor, lse: Tensor, grad: Tensor, out: Tensor) -> None:
    """Write (onehot - softmax) * grad to `out` [n, V_local], of any type; it may be `logits`.

    Args:
        logits: float32 [n, V_local].
        local: int64 [n] column of each row's target, or -1.
        lse: float32 [n] log-sum-exp over the whole vocabulary.
        grad: float32 [n] gradient of the log-probs, contiguous.
    """
    rows, columns = logits.shape
    if rows and columns:
        blocks = triton.cdiv(columns, _BLOCK)
        _gradient_kernel[(rows, blocks)](  # type: ignore[reportIndexIssue]
            logits,
            local,
            lse,
            grad,
            out,
            logits.stride(0),
            out.stride(0),
            columns,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
