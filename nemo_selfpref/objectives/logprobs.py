"""From hidden states to per-token log-probs: the only tensor-parallel mathematics of the losses.

    log p(t) = w_t . h - logsumexp_v(w_v . h)

The vocabulary is split over the tensor-parallel group; each rank projects onto its own rows, and
three small all-reduces (maximum, sum of exponentials, target logit) join them. Logits are
accumulated in float32 whatever the weights' precision, exist for `chunk_size` tokens at a time and
are computed again in the backward pass, so neither pass ever holds [tokens, vocabulary].
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def float32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with float32 accumulation and a float32 result."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op=op, group=group)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_start, chunk_size, group):  # type: ignore[override]
        num_tokens = hidden.shape[0]
        logprobs = torch.empty(num_tokens, dtype=torch.float32, device=hidden.device)
        lse = torch.empty_like(logprobs)
        for start in range(0, num_tokens, chunk_size):
            part = slice(start, start + chunk_size)
            logits = float32_matmul(hidden[part], weight.t())
            peak = (
                logits.amax(-1) if weight.shape[0] else logits.new_full((logits.shape[0],), -1e30)
            )
            _all_reduce(peak, dist.ReduceOp.MAX, group)
            total = (logits - peak[:, None]).exp_().sum(-1)
            local, mask = _local_targets(targets[part], vocab_start, weight.shape[0])
            at_target = logits.gather(1, local[:, None])[:, 0] if weight.shape[0] else peak
            joined = torch.stack([total, torch.where(mask, at_target, torch.zeros_like(at_target))])
            _all_reduce(joined, dist.ReduceOp.SUM, group)
            lse[part] = peak + joined[0].log()
            logprobs[part] = joined[1] - lse[part]
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.vocab_start, ctx.chunk_size, ctx.group = vocab_start, chunk_size, group
        return logprobs

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        hidden, weight, targets, lse = ctx.saved_tensors
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            grad_logits = (float32_matmul(hidden[part], weight.t()) - lse[part, None]).exp_().neg_()
            local, mask = _local_targets(targets[part], ctx.vocab_start, weight.shape[0])
            if weight.shape[0]:
                grad_logits.scatter_add_(1, local[:, None], mask[:, None].float())
            grad_logits.mul_(grad[part, None])
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[part] = float32_matmul(grad_logits, weight)
            grad_weight += float32_matmul(grad_logits.t(), hidden[part])
        _all_reduce(grad_hidden, dist.ReduceOp.SUM, ctx.group)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None, None, None, None


def _local_targets(targets: Tensor, vocab_start: int, vocab_rows: int) -> tuple[Tensor, Tensor]:
    """Row of each target in this rank's part of the vocabulary, and whether it lies there."""
    local = targets - vocab_start
    mask = (local >= 0) & (local < vocab_rows)
    return torch.where(mask, local, torch.zeros_like(local)), mask


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_start: int = 0,
    chunk_size: int = 1024,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Log-prob of each target token, float32 [N].

    Args:
        hidden: [N, H] states that predict the targets, the same on every rank of `group`.
        weight: [V_local, H] this rank's rows of the output projection, padding rows left out.
        targets: int64 [N] token ids of the whole vocabulary.
        vocab_start: id of the first row of `weight`.
        chunk_size: tokens whose logits exist at one time.
        group: tensor-parallel group; None for an unsplit vocabulary.
    """
    return _TokenLogprobs.apply(hidden, weight, targets, vocab_start, chunk_size, group)


def sum_by_sequence(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sums of `values` [N] by sequence index int64 [N]; shape [num_sequences]."""
    return values.new_zeros(num_sequences).index_add(0, sequence, values)
