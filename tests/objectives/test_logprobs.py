from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_selfpref.objectives.logprobs import _local_targets, sum_by_sequence, token_logprobs

TOKENS, VOCAB, HIDDEN = 37, 211, 16


def problem(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, ...]:
    """hidden, weight, targets and the gradient that arrives at the log-probs."""
    generator = torch.Generator().manual_seed(5)
    hidden = (scale * torch.randn(TOKENS, HIDDEN, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    return hidden, weight, targets, torch.randn(TOKENS, generator=generator)


def expected(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The same in float64 with torch's own log_softmax."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logprobs = (h @ w.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logprobs.detach(), *torch.autograd.grad(logprobs, (h, w), grad.double())


@pytest.mark.parametrize("chunk_size", [1, 3, 1024])
def test_value_and_gradients_against_float64(chunk_size: int) -> None:
    hidden, weight, targets, grad = problem()
    logprobs = token_logprobs(hidden, weight, targets, chunk_size=chunk_size)
    grads = torch.autograd.grad(logprobs, (hidden, weight), grad)
    want, *want_grads = expected(hidden, weight, targets, grad)
    torch.testing.assert_close(logprobs.double(), want, rtol=1e-5, atol=1e-5)
    for got, exact in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_two_tokens_of_two_words_by_hand() -> None:
    # Logits (ln 3, 0) give probabilities 3/4 and 1/4.
    hidden = torch.tensor([[1.0], [1.0]])
    weight = torch.tensor([[1.0986122886681098], [0.0]])
    logprobs = token_logprobs(hidden, weight, torch.tensor([0, 1]))
    assert logprobs.tolist() == pytest.approx([-0.2876820724517809, -1.3862943611198906])


def test_padding_rows_left_out_change_nothing() -> None:
    hidden, weight, targets, grad = problem()
    padding = torch.full((17, HIDDEN), 100.0)
    padded = torch.cat([weight.detach(), padding]).requires_grad_()
    logprobs = token_logprobs(hidden, padded[:VOCAB], targets)
    (got,) = torch.autograd.grad(logprobs, padded, grad)
    want, _, want_weight = expected(hidden, weight, targets, grad)
    torch.testing.assert_close(logprobs.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[:VOCAB].double(), want_weight, rtol=1e-5, atol=1e-5)
    assert got[VOCAB:].eq(0).all()


def test_bfloat16_inputs_lose_only_their_own_rounding() -> None:
    hidden, weight, targets, grad = problem(torch.bfloat16)
    logprobs = token_logprobs(hidden, weight, targets, chunk_size=8)
    grads = torch.autograd.grad(logprobs, (hidden, weight), grad)
    want, *want_grads = expected(hidden, weight, targets, grad)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), want, rtol=1e-5, atol=1e-5)
    for got, exact in zip(grads, want_grads, strict=True):
        assert got.dtype == torch.bfloat16
        # Rounded to 8 bits before and after the last product.
        assert (got.double() - exact).norm() <= 2**-7 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_targets(dtype: torch.dtype) -> None:
    hidden = torch.zeros(0, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.ones(VOCAB, HIDDEN, dtype=dtype, requires_grad=True)
    logprobs = token_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64))
    logprobs.sum().backward()
    assert logprobs.shape == (0,) and logprobs.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.shape == (0, HIDDEN)
    assert weight.grad is not None and weight.grad.eq(0).all()


def test_extreme_logits() -> None:
    # Logits of the order of 1e5: all the mass sits on the largest.
    hidden, weight, targets, grad = problem(scale=1e4)
    logprobs = token_logprobs(hidden, weight, targets, chunk_size=5)
    grads = torch.autograd.grad(logprobs, (hidden, weight), grad)
    want, *_ = expected(hidden, weight, targets, grad)
    assert want.min() < -1e4
    torch.testing.assert_close(logprobs.double(), want, rtol=1e-5, atol=0.05)
    assert all(g.isfinite().all() for g in grads)


def test_targets_of_another_rank_are_masked() -> None:
    # Rows 4..6 of the vocabulary are here.
    local, mask = _local_targets(torch.tensor([3, 4, 6, 7]), 4, 3)
    assert local.tolist() == [0, 0, 2, 0]
    assert mask.tolist() == [False, True, True, False]


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return out


def test_neither_pass_holds_the_logits_of_all_tokens() -> None:
    hidden, weight, targets, grad = problem()
    with LargestTensor() as seen:
        token_logprobs(hidden, weight, targets, chunk_size=4).backward(grad)
    assert seen.largest == VOCAB * HIDDEN  # the weight's gradient; logits were 4 x 211
    assert VOCAB * HIDDEN < TOKENS * VOCAB


def test_sum_by_sequence() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    sums = sum_by_sequence(values, torch.tensor([0, 2, 0, 2]), 4)
    assert sums.tolist() == [5.0, 0.0, 10.0, 0.0]
    counts = sum_by_sequence(torch.ones(3, dtype=torch.int64), torch.tensor([1, 1, 0]), 2)
    assert counts.tolist() == [1, 2] and counts.dtype == torch.int64


def test_sum_by_sequence_of_nothing() -> None:
    assert sum_by_sequence(torch.empty(0), torch.empty(0, dtype=torch.int64), 2).tolist() == [0, 0]


def test_sum_by_sequence_hands_each_value_its_sequences_gradient() -> None:
    values = torch.ones(3, requires_grad=True)
    sums = sum_by_sequence(values, torch.tensor([1, 0, 1]), 2)
    (grad,) = torch.autograd.grad(sums, values, torch.tensor([3.0, 5.0]))
    assert grad.tolist() == [5.0, 3.0, 5.0]
