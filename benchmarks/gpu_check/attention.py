"""Both attention backends against float64, whole sequences and shared prompts; then their speed."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.gpu_check.job import Job
from benchmarks.gpu_check.models import now, release
from benchmarks.gpu_check.report import Report
from nemo_selfpref.config.model_schema import AttentionBackend
from nemo_selfpref.data.spans import Span, spans_of
from nemo_selfpref.megatron.attention import PackedCoreAttention
from nemo_selfpref.megatron.attention_layout import PackedAttention, attention_layout

_BACKENDS = (AttentionBackend.sdpa, AttentionBackend.flex)
_BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 2e-2}
"""Relative errors: tensor cores may take float32 as tf32, 11 significant bits; bfloat16 has 8."""
_HEADS = {"full": (16, 4, 128), "toy": (4, 2, 16)}


def backends(job: Job, report: Report) -> None:
    lengths = job.pick((300, 1, 129, 512, 64), (7, 1, 12))
    layouts = {
        "whole": spans_of(lengths),
        "shared": shared_spans(job.pick(((256, 100, 33), (90, 200, 1, 64)), ((5, 3, 1), (4, 2)))),
    }
    for dtype, bound in _BOUNDS.items():
        for kind, spans in layouts.items():
            for backend in _BACKENDS:
                _check(job, report, f"{kind}, {backend.value}, {dtype}", spans, backend, bound)
    release()
    spans = shared_spans([job.pick((1024, 512, 512), (8, 4, 4))] * 4)
    for backend in _BACKENDS:
        report.measure(f"shared, {backend.value}: ms of 3 passes", _speed(job, spans, backend))


def shared_spans(groups: Sequence[Sequence[int]]) -> tuple[Span, ...]:
    """Spans of prompts, each with the answers to it behind it; one token of padding at the end."""
    spans, start = [], 0
    for prompt, *answers in groups:
        first = start
        spans.append(Span(start, prompt))
        start += prompt
        for answer in answers:
            spans.append(Span(start, answer, first, prompt))
            start += answer
    return (*spans, Span(start, 1))


def exact(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span]) -> Tensor:
    """Softmax attention with the mask written out, [T, heads * dim]."""
    total, share = q.shape[0], q.shape[1] // k.shape[1]
    seen = torch.zeros(total, total, dtype=torch.bool)
    for s in spans:
        rows = slice(s.start, s.start + s.length)
        seen[rows, rows] = torch.ones(s.length, s.length, dtype=torch.bool).tril()
        seen[rows, s.context : s.context + s.context_length] = True
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen.to(q.device), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def _inputs(job: Job, total: int, dtype: torch.dtype) -> list[Tensor]:
    heads, kv_heads, dim = _HEADS["toy" if job.toy else "full"]
    generator = torch.Generator(job.device).manual_seed(total)
    shapes = [(total, heads, dim), (total, kv_heads, dim), (total, kv_heads, dim)]
    made = (torch.randn(s, generator=generator, device=job.device) for s in shapes)
    return [x.to(dtype).requires_grad_() for x in made]


def _layout(job: Job, spans: Sequence[Span], backend: AttentionBackend) -> PackedAttention:
    return attention_layout(spans, torch.device(job.device), backend=backend)


def _attend(qkv: Sequence[Tensor], layout: PackedAttention) -> Tensor:
    module = PackedCoreAttention(SimpleNamespace(), 1, None, "self")
    q, k, v = (x[:, None] for x in qkv)
    return module(q, k, v, None, packed_seq_params=layout)[:, 0]


def _check(
    job: Job,
    report: Report,
    name: str,
    spans: Sequence[Span],
    backend: AttentionBackend,
    bound: float,
) -> None:
    dtype = torch.float32 if name.endswith("float32") else torch.bfloat16
    qkv = _inputs(job, spans[-1].start + spans[-1].length, dtype)
    # torch has no backward pass of FlexAttention on a CPU.
    forward_only = backend is AttentionBackend.flex and job.device == "cpu"
    doubles = [x.detach().double().requires_grad_() for x in qkv]
    want = exact(doubles[0], doubles[1], doubles[2], spans)
    try:
        given = [x.detach() for x in qkv] if forward_only else qkv
        got = _attend(given, _layout(job, spans, backend))
        errors = [_relative(got, want)]
        if not forward_only:
            upstream = torch.randn_like(got)
            mine = torch.autograd.grad(got, qkv, upstream)
            theirs = torch.autograd.grad(want, doubles, upstream.double())
            errors += [_relative(a, b) for a, b in zip(mine, theirs, strict=True)]
    except Exception as error:
        report.note(f"{name}: {type(error).__name__}: {error}"[:1000])
        report.bar(name, None, at_most=bound, correctness=True)
        return
    what = "output" if forward_only else "output and gradients"
    report.bar(f"{name}: {what}", max(errors), at_most=bound, correctness=True)


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).detach().norm() / want.detach().norm())


def _speed(job: Job, spans: Sequence[Span], backend: AttentionBackend) -> float:
    """Milliseconds of three passes, forward and, where there is one, backward."""
    qkv = _inputs(job, spans[-1].start + spans[-1].length, torch.bfloat16)
    layout = _layout(job, spans, backend)
    forward_only = backend is AttentionBackend.flex and job.device == "cpu"
    given = [x.detach() for x in qkv] if forward_only else qkv

    def once() -> None:
        out = _attend(given, layout)
        if not forward_only:
            torch.autograd.grad(out, qkv, torch.ones_like(out))

    once()
    started = now()
    for _ in range(3):
        once()
    return (now() - started) * 1000
