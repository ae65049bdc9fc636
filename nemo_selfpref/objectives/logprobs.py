"""From hidden states to per-token log-probs: the only tensor-parallel mathematics of the losses.

    log p(t) = w_t . h - logsumexp_v(w_v . h)

The vocabulary is split over the tensor-parallel group; each rank projects onto its own rows, and
two small all-reduces (maxima; sums of exponentials with target logits) join them. Logits are
accumulated in float32 whatever the weights' precision, exist for `chunk_size` tokens at a time and
are computed again in the backward pass, so neither pass ever holds [tokens, vocabulary]. The
weight's gradient is summed in float32 too, in Megatron's own buffer where the caller names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_selfpref.errors import ConfigError

GradSink = Callable[[], Tensor | None]
"""Asked in the backward pass for the float32 buffer, shaped like the weight, to add to."""


def float32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with float32 accumulation and a float32 result."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def main_grad_sink(parameter: Tensor, rows: int) -> GradSink:
    """The first `rows` rows of the float32 buffer where Megatron's DDP sums the gradient of
    `parameter`; None as long as there is no such buffer.

    No mark is left on the parameter: DDP's hook adds to the buffer what autograd gathered, which is
    zeros from here and, with tied embeddings, the other use's gradient.
    """

    def find() -> Tensor | None:
        buffer = getattr(parameter, "main_grad", None)
        return buffer[:rows] if buffer is not None and buffer.dtype == torch.float32 else None

    return find


@dataclass(frozen=True)
class _Passes:
    """The element-wise work on a chunk's logits, described in logprobs_triton.py."""

    statistics: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    to_gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def _statistics(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Overwrites the logits: a second array of their size would double the peak.
    if not logits.shape[1]:
        nothing = logits.new_zeros(logits.shape[0])
        return torch.full_like(nothing, -torch.inf), nothing, nothing
    peak = logits.amax(-1)
    at_target = logits.gather(1, local.clamp_min(0)[:, None])[:, 0].masked_fill_(local < 0, 0.0)
    return peak, logits.sub_(peak[:, None]).exp_().sum(-1), at_target


def _to_gradient(logits: Tensor, local: Tensor, lse: Tensor, grad: Tensor, out: Tensor) -> None:
    logits.sub_(lse[:, None]).exp_().mul_(-grad[:, None])
    at_target = grad.masked_fill(local < 0, 0.0)
    logits.scatter_add_(1, local.clamp_min(0)[:, None], at_target[:, None])
    if out is not logits:
        out.copy_(logits)


_TORCH = _Passes(_statistics, _to_gradient)


def _passes(backend: str, device: torch.device) -> _Passes:
    if backend not in ("torch", "triton", "auto"):
        raise ConfigError(f"backend={backend}: expected torch, triton or auto; choose one of them")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return _TORCH
    try:
        from nemo_selfpref.objectives import logprobs_triton
    except ImportError as error:
        if backend == "auto":
            return _TORCH
        raise ConfigError(
            f"backend=triton: it cannot be imported ({error}); expected the package triton; "
            "install it or set backend=torch"
        ) from error
    if device.type != "cuda" and not logprobs_triton.INTERPRETED:
        raise ConfigError(
            f"backend=triton: the hidden states are on {device.type}; expected a CUDA device; "
            "set backend=torch, or TRITON_INTERPRET=1 to try the kernels without one"
        )
    return _Passes(logprobs_triton.statistics, logprobs_triton.to_gradient)


@dataclass(frozen=True)
class _Head:
    """What both passes of one call share besides tensors."""

    vocab_start: int
    chunk_size: int
    group: dist.ProcessGroup | None
    passes: _Passes
    grad_sink: GradSink | None

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(x, op=op, group=self.group)

    def chunks(self, hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Tokens and their float32 logits [n, V_local]: one buffer, written anew for each chunk."""
        num_tokens = hidden.shape[0]
        shape = (min(self.chunk_size, num_tokens), weight.shape[0])
        logits = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        for start in range(0, num_tokens, self.chunk_size):
            stop = min(start + self.chunk_size, num_tokens)
            part, chunk = slice(start, stop), logits[: stop - start]
            _product(hidden[part], weight.t(), out=chunk)
            yield part, chunk

    def join(self, peak: Tensor, total: Tensor, at_target: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and log-sum-exps over the whole vocabulary from each rank's statistics."""
        highest = peak.clone()
        self.all_reduce(highest, dist.ReduceOp.MAX)
        sums = torch.stack([total * (peak - highest).exp(), at_target])
        self.all_reduce(sums, dist.ReduceOp.SUM)
        lse = highest + sums[0].log()
        return sums[1] - lse, lse


def _operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the type they are multiplied in: the CPU has no product of bfloat16 numbers that is
    returned in float32."""
    return (hidden, weight) if hidden.is_cuda else (hidden.float(), weight.float())


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, head):  # type: ignore[override]
        local = _local_targets(targets, head.vocab_start, weight.shape[0])
        statistics = torch.empty(3, hidden.shape[0], dtype=torch.float32, device=hidden.device)
        for part, logits in head.chunks(*_operands(hidden, weight)):
            for whole, values in zip(
                statistics, head.passes.statistics(logits, local[part]), strict=True
            ):
                whole[part] = values
        logprobs, lse = head.join(*statistics)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.head = head
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        hidden, weight, targets, lse = ctx.saved_tensors
        head: _Head = ctx.head
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if for_hidden else None
        sink = head.grad_sink() if for_weight and head.grad_sink is not None else None
        grad_weight = sink
        if for_weight and sink is None:
            grad_weight = weight.new_zeros(weight.shape, dtype=torch.float32)
        if weight.shape[0]:
            _add_gradients(head, hidden, weight, targets, lse, grad, grad_hidden, grad_weight)
        if grad_hidden is not None:
            head.all_reduce(grad_hidden, dist.ReduceOp.SUM)
            grad_hidden = grad_hidden.to(hidden.dtype)
        if sink is not None:
            # DDP's hook must still find a gradient. It is added to the sink, hence zeros.
            grad_weight = weight.new_zeros(()).expand(weight.shape)
        elif grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def _add_gradients(
    head: _Head,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    hidden, weight = _operands(hidden, weight)
    local, grad = _local_targets(targets, head.vocab_start, weight.shape[0]), grad.contiguous()
    narrow = None
    for part, logits in head.chunks(hidden, weight):
        grad_logits = logits
        if weight.dtype != torch.float32:
            if narrow is None:
                narrow = torch.empty_like(logits, dtype=weight.dtype)
            grad_logits = narrow[: logits.shape[0]]
        head.passes.to_gradient(logits, local[part], lse[part], grad[part], grad_logits)
        if grad_hidden is not None:
            _product(grad_logits, weight, out=grad_hidden[part])
        if grad_weight is not None:
            _add_product(grad_weight, grad_logits.t(), hidden[part])


def _local_targets(targets: Tensor, vocab_start: int, vocab_rows: int) -> Tensor:
    """Row of each target in this rank's part of the vocabulary, -1 where it lies elsewhere."""
    local = targets - vocab_start
    return local.masked_fill_((local < 0) | (local >= vocab_rows), -1)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_start: int = 0,
    chunk_size: int = 1024,
    group: dist.ProcessGroup | None = None,
    grad_sink: GradSink | None = None,
    backend: str = "torch",
) -> Tensor:
    """Log-prob of each target token, float32 [N].

    Args:
        hidden: [N, H] states that predict the targets, the same on every rank of `group`.
        weight: [V_local, H] this rank's rows of the output projection, padding rows left out.
        targets: int64 [N] token ids of the whole vocabulary.
        vocab_start: id of the first row of `weight`.
        chunk_size: tokens whose logits exist at one time.
        group: tensor-parallel group; None for an unsplit vocabulary.
        grad_sink: finds the buffer that the backward pass adds the weight's gradient to, see
            main_grad_sink; autograd is then handed zeros. Without one, or while it finds none,
            autograd gets the gradient, summed in float32 and rounded once.
        backend: what runs the element-wise passes: torch; triton; or auto, triton on CUDA where it
            is installed.
    """
    passes = _passes(backend, hidden.device)
    head = _Head(vocab_start, chunk_size, group, passes, grad_sink)
    return _TokenLogprobs.apply(hidden, weight, targets, head)


def sum_by_sequence(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sums of `values` [N, ...] by sequence index int64 [N]; shape [num_sequences, ...]."""
    zeros = values.new_zeros(num_sequences, *values.shape[1:])
    return zeros.index_add(0, sequence, values)
