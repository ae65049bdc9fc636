from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from tiny import MakePolicy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_selfpref.errors import ConfigError
from nemo_selfpref.megatron.cpu_shim import device_scope
from nemo_selfpref.objectives import logprobs as logprobs_module
from nemo_selfpref.objectives.logprobs import (
    _local_targets,
    float32_matmul,
    main_grad_sink,
    sum_by_sequence,
    token_logprobs,
)

TOKENS, VOCAB, HIDDEN = 37, 211, 16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_DEVICE = "cpu" if INTERPRETED else "cuda"
HAS_TRITON = find_spec("triton") is not None
needs_triton = pytest.mark.skipif(
    not HAS_TRITON or not (INTERPRETED or torch.cuda.is_available()),
    reason="triton runs here with a CUDA device or TRITON_INTERPRET=1"
    if HAS_TRITON
    else "triton is not installed",
)
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


def problem(
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    *,
    tokens: int = TOKENS,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """hidden, weight, targets and the gradient that arrives at the log-probs."""
    generator = torch.Generator().manual_seed(5)
    hidden = scale * torch.randn(tokens, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    grad = torch.randn(tokens, generator=generator).to(device)
    inputs = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
    return *inputs, targets.to(device), grad


def expected(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The same in float64 with torch's own log_softmax."""
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logprobs = (h @ w.t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logprobs.detach(), *torch.autograd.grad(logprobs, (h, w), grad.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk_size", [1, 3, 1024])
def test_value_and_gradients_against_float64(chunk_size: int, backend: str) -> None:
    hidden, weight, targets, grad = problem(device=TRITON_DEVICE if backend == "triton" else "cpu")
    logprobs = token_logprobs(hidden, weight, targets, chunk_size=chunk_size, backend=backend)
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


def test_targets_of_another_rank_have_no_row() -> None:
    # Rows 4..6 of the vocabulary are here.
    targets = torch.tensor([3, 4, 6, 7])
    assert _local_targets(targets, 4, 3).tolist() == [-1, 0, 2, -1]
    assert targets.tolist() == [3, 4, 6, 7]


class Rank:
    """One of several threads that stand for the ranks of a tensor-parallel group."""

    def __init__(self, rank: int, barrier: threading.Barrier, slots: list[Tensor]) -> None:
        self.rank, self.barrier, self.slots = rank, barrier, slots

    def size(self) -> int:
        return len(self.slots)

    def reduce(self, x: Tensor, op: Any) -> None:
        self.slots[self.rank] = x.clone()
        self.barrier.wait()
        parts = torch.stack(self.slots)
        self.barrier.wait()
        x.copy_(parts.amax(0) if op == dist.ReduceOp.MAX else parts.sum(0))


def test_split_vocabulary_with_a_rank_of_padding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda x, op, group: group.reduce(x, op))
    hidden, weight, targets, grad = problem()
    barrier, slots = threading.Barrier(3, timeout=60), [torch.empty(0)] * 3
    edges = [0, 120, VOCAB, VOCAB]

    def one(rank: int) -> tuple[Tensor, ...]:
        rows = weight.detach()[edges[rank] : edges[rank + 1]].requires_grad_()
        states = hidden.detach().requires_grad_()
        group: Any = Rank(rank, barrier, slots)
        start = edges[rank]
        logprobs = token_logprobs(
            states, rows, targets, vocab_start=start, chunk_size=8, group=group
        )
        return logprobs, *torch.autograd.grad(logprobs, (states, rows), grad)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(one, range(3)))
    want, want_hidden, want_weight = expected(hidden, weight, targets, grad)
    for logprobs, grad_hidden, _ in results:
        torch.testing.assert_close(logprobs.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad_hidden.double(), want_hidden, rtol=1e-5, atol=1e-5)
    got = torch.cat([rows for _, _, rows in results])
    torch.testing.assert_close(got.double(), want_weight, rtol=1e-5, atol=1e-5)


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


class Operations(TorchDispatchMode):
    """Counts the matrix products, and the arrays of the size of a chunk's logits."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.products: Counter[str] = Counter()
        self.large: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in ("mm", "addmm"):
            self.products[name] += 1
        if isinstance(out, Tensor) and out.numel() == self.elements:
            self.large.add(out.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize("weight_too", [True, False])
@pytest.mark.parametrize("hidden_too", [True, False])
def test_work_is_done_for_the_gradients_that_are_wanted(hidden_too: bool, weight_too: bool) -> None:
    hidden, weight, targets, grad = problem(tokens=40)
    hidden.requires_grad_(hidden_too)
    weight.requires_grad_(weight_too)
    with Operations(4 * VOCAB) as forward:
        logprobs = token_logprobs(hidden, weight, targets, chunk_size=4)
    assert forward.products == {"mm": 10} and len(forward.large) == 1
    assert logprobs.requires_grad == (hidden_too or weight_too)
    if not logprobs.requires_grad:
        return
    with Operations(4 * VOCAB) as backward:
        logprobs.backward(grad)
    wanted = Counter({"mm": 10 + 10 * hidden_too, "addmm": 10 * weight_too})
    assert backward.products == +wanted and len(backward.large) == 1
    _, *want = expected(hidden, weight, targets, grad)
    for tensor, exact, asked in ((hidden, want[0], hidden_too), (weight, want[1], weight_too)):
        assert (tensor.grad is not None) == asked
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad.double(), exact, rtol=1e-5, atol=1e-5)


def saved_shapes(*inputs: Tensor) -> list[tuple[int, ...]]:
    saved: list[Tensor] = []
    pack = lambda x: saved.append(x) or x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        token_logprobs(*inputs, chunk_size=4)
    return [tuple(x.shape) for x in saved]


def test_what_is_kept_for_the_backward_pass() -> None:
    hidden, weight, targets, _ = problem()
    shapes = saved_shapes(hidden, weight, targets)
    assert shapes == [(TOKENS, HIDDEN), (VOCAB, HIDDEN), (TOKENS,), (TOKENS,)]
    with torch.no_grad():
        assert saved_shapes(hidden, weight, targets) == []
    assert saved_shapes(hidden.detach(), weight.detach(), targets) == []


def test_bfloat16_weight_gradient_is_summed_in_float32() -> None:
    """32 chunks. A sum kept in bfloat16 between them is off by 7e-3 here."""
    hidden, weight, targets, grad = problem(torch.bfloat16, tokens=1024)
    total = torch.zeros(VOCAB, HIDDEN)
    logprobs = token_logprobs(hidden, weight, targets, chunk_size=32, grad_sink=lambda: total)
    logprobs.backward(grad)
    want, _, want_weight = expected(hidden, weight, targets, grad)
    assert (logprobs - want).square().mean().sqrt() <= 1e-4
    assert (total - want_weight).norm() <= 1e-3 * want_weight.norm()


def test_bfloat16_products_as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's operands are float32; here they stay bfloat16, as does the chunk's gradient."""

    def product(a: Tensor, b: Tensor, out: Tensor) -> None:
        assert a.dtype == b.dtype == torch.bfloat16
        out.copy_(float32_matmul(a, b))

    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        assert a.dtype == b.dtype == torch.bfloat16
        total.add_(float32_matmul(a, b))

    monkeypatch.setattr(logprobs_module, "_operands", lambda hidden, weight: (hidden, weight))
    monkeypatch.setattr(logprobs_module, "_product", product)
    monkeypatch.setattr(logprobs_module, "_add_product", add_product)
    hidden, weight, targets, grad = problem(torch.bfloat16)
    total = torch.zeros(VOCAB, HIDDEN)
    logprobs = token_logprobs(hidden, weight, targets, chunk_size=8, grad_sink=lambda: total)
    logprobs.backward(grad)
    want, want_hidden, want_weight = expected(hidden, weight, targets, grad)
    torch.testing.assert_close(logprobs.double(), want, rtol=1e-5, atol=1e-5)
    assert (hidden.grad - want_hidden).norm() <= 2**-7 * want_hidden.norm()
    assert (total - want_weight).norm() <= 2**-8 * want_weight.norm()


def test_sink_is_added_to_and_autograd_gets_zeros() -> None:
    hidden, weight, targets, grad = problem()
    total = torch.full((VOCAB, HIDDEN), 3.0)
    for _ in range(2):
        logprobs = token_logprobs(hidden, weight, targets, chunk_size=8, grad_sink=lambda: total)
        logprobs.backward(grad)
    _, want_hidden, want_weight = expected(hidden, weight, targets, grad)
    torch.testing.assert_close(total.double(), 3 + 2 * want_weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), 2 * want_hidden, rtol=1e-5, atol=1e-5)
    assert weight.grad is not None and weight.grad.eq(0).all()


def test_sink_is_not_asked_for_a_frozen_weight() -> None:
    hidden, weight, targets, grad = problem()
    weight.requires_grad_(False)

    def sink() -> Tensor:
        raise AssertionError("asked")

    token_logprobs(hidden, weight, targets, grad_sink=sink).backward(grad)
    assert hidden.grad is not None and weight.grad is None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_parameter_without_a_float32_buffer_gets_its_gradient(dtype: torch.dtype | None) -> None:
    hidden, weight, targets, grad = problem()
    if dtype is not None:
        weight.main_grad = torch.zeros(VOCAB, HIDDEN, dtype=dtype)  # type: ignore[attr-defined]
    sink = main_grad_sink(weight, VOCAB)
    assert sink() is None
    token_logprobs(hidden, weight, targets, grad_sink=sink).backward(grad)
    assert weight.grad is not None
    want = expected(hidden, weight, targets, grad)[2]
    torch.testing.assert_close(weight.grad.double(), want, rtol=1e-5, atol=1e-5)


class Bigram(torch.nn.Module):
    """Predicts each next token from the last; the two tables may be one."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        tables = torch.randn(2, VOCAB + 5, HIDDEN, generator=generator).bfloat16()
        self.embedding = torch.nn.Parameter(tables[0])
        self.output = self.embedding if tied else torch.nn.Parameter(tables[1])

    def loss(self, tokens: Tensor, sink: bool) -> Tensor:
        hidden = torch.nn.functional.embedding(tokens[:-1], self.embedding)
        weight, targets = self.output[:VOCAB], tokens[1:]
        found = main_grad_sink(self.output, VOCAB) if sink else None
        return -token_logprobs(hidden, weight, targets, chunk_size=4, grad_sink=found).sum()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_sink_under_megatrons_ddp(
    tied: bool, overlap: bool, make_policy: MakePolicy, llama_folder: Path
) -> None:
    """Two micro-batches in bfloat16: the float32 buffer holds each use's gradient once."""
    make_policy(llama_folder)  # sets the process groups up
    model = Bigram(tied)
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=1)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    with device_scope():
        ddp = DistributedDataParallel(config, settings, model)
    tokens = torch.arange(3, 40) % VOCAB
    want = torch.autograd.grad(model.loss(tokens, sink=False), list(model.parameters()))
    ddp.zero_grad_buffer()
    with ddp.no_sync():
        model.loss(tokens, sink=True).backward()
    model.loss(tokens, sink=True).backward()
    ddp.finish_grad_sync()
    for parameter, exact in zip(model.parameters(), want, strict=True):
        assert parameter.grad is None  # DDP's hook took it
        got = parameter.main_grad  # type: ignore[attr-defined]
        assert got.dtype == torch.float32 and got.abs().sum() > 0
        # autograd rounds what is wanted to bfloat16, once for each use.
        assert (got - 2 * exact).norm() <= 2**-7 * (2 * exact).norm()
    if not tied:
        # None of it has passed through bfloat16.
        got = model.output.main_grad  # type: ignore[attr-defined]
        assert not got.equal(got.bfloat16().float())


@needs_triton
def test_triton_passes_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics and gradient in a bfloat16 buffer, with the last block in part and no target."""
    from nemo_selfpref.objectives import logprobs_triton

    monkeypatch.setattr(logprobs_triton, "_BLOCK", 64)
    generator = torch.Generator().manual_seed(2)
    logits = (20 * torch.randn(5, VOCAB, generator=generator)).to(TRITON_DEVICE)
    local = torch.tensor([0, 63, 64, VOCAB - 1, -1], device=TRITON_DEVICE)
    grad = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], device=TRITON_DEVICE)
    peak, total, at_target = logprobs_triton.statistics(logits, local)
    exact = logits.double()
    lse = exact.logsumexp(-1)
    picked = [float(logits[i, t]) if t >= 0 else 0.0 for i, t in enumerate(local.tolist())]
    assert at_target.tolist() == picked
    torch.testing.assert_close(peak, logits.amax(-1), rtol=0, atol=0)
    torch.testing.assert_close(peak.double() + total.double().log(), lse, rtol=1e-6, atol=1e-5)
    want = -(exact - lse[:, None]).exp()
    for row, target in enumerate(local.tolist()):
        if target >= 0:
            want[row, target] += 1
    want *= grad.double()[:, None]
    # The interpreter cuts off what does not fit into bfloat16, where CUDA rounds.
    for dtype, tolerance in ((torch.bfloat16, 2**-7), (torch.float32, 1e-5)):
        out = torch.empty(5, VOCAB, dtype=dtype, device=TRITON_DEVICE)
        logprobs_triton.to_gradient(logits, local, lse.float(), grad, out)
        torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=1e-6)
    _, total, at_target = logprobs_triton.statistics(logits[:, :0], torch.full_like(local, -1))
    assert total.eq(0).all() and at_target.eq(0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none answers here")
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_bfloat16_on_cuda(backend: str) -> None:
    """The chunk's gradient is multiplied in bfloat16 there: 2^-9 of rounding, once."""
    hidden, weight, targets, grad = problem(torch.bfloat16, tokens=1024, device="cuda")
    total = torch.zeros(VOCAB, HIDDEN, device="cuda")
    logprobs = token_logprobs(
        hidden, weight, targets, chunk_size=32, grad_sink=lambda: total, backend=backend
    )
    logprobs.backward(grad)
    want, _, want_weight = expected(hidden, weight, targets, grad)
    assert (logprobs - want).square().mean().sqrt() <= 1e-4
    assert (total - want_weight).norm() <= 2**-8 * want_weight.norm()


def test_triton_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "nemo_selfpref.objectives.logprobs_triton"
    monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    monkeypatch.delattr("nemo_selfpref.objectives.logprobs_triton", raising=False)
    hidden, weight, targets, _ = problem()
    with pytest.raises(ConfigError, match=r"backend=triton.*expected.*install it or set"):
        token_logprobs(hidden, weight, targets, backend="triton")
    auto = token_logprobs(hidden, weight, targets, backend="auto")
    assert auto.equal(token_logprobs(hidden, weight, targets))


def test_triton_on_the_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    import nemo_selfpref.objectives as package

    compiled = SimpleNamespace(INTERPRETED=False)
    monkeypatch.setattr(package, "logprobs_triton", compiled, raising=False)
    with pytest.raises(ConfigError, match="are on cpu; expected a CUDA device; set backend=torch"):
        token_logprobs(*problem()[:3], backend="triton")


def test_an_unknown_backend() -> None:
    with pytest.raises(ConfigError, match="backend=cutlass: expected torch, triton or auto"):
        token_logprobs(*problem()[:3], backend="cutlass")


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
