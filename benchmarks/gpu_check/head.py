"""The log-prob head at a large model's size: speed by chunk, memory, errors, and Liger beside it.

TFLOP/s of a backward pass count the products that were computed, the logits' second time included;
"useful" ones the three products that the loss needs (logits, dH, dW) over both passes, so that
Liger, which makes its gradients in the forward pass, can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_check.job import Job, module_in
from benchmarks.gpu_check.models import now, release
from benchmarks.gpu_check.report import Report

_CHUNKS = (1024, 2048, 4096)
_LONG = 65536
_BAR, _AIM = 510.0, 700.0
_SHARE, _SHARE_AIM = 0.26, 0.10
"""Peak over that of materialised logits: what Liger reports of its ORPO loss, and what we want."""
_LOGPROB_ERROR, _GRADIENT_ERROR = 1e-3, 1e-2
"""bfloat16 inputs, exact products, float32 sums; the gradient's factors are rounded to bfloat16."""


def head(job: Job, report: Report) -> None:
    bench = module_in("benchmarks", "logprob_head")
    case = bench.Case(
        variant="ours torch",
        device=job.device,
        dtype="bfloat16",
        tokens=job.pick(8192, 128),
        vocab=job.pick(131072, 512),
        hidden=job.pick(4096, 64),
        chunk_size=job.pick(1024, 32),
        repeats=job.pick(5, 1),
    )
    variants = ["ours torch"]
    if job.device == "cuda" and find_spec("triton") is not None:
        variants.append("ours triton")
    else:
        report.skip("triton", "needs a CUDA device and triton")
    best = _speeds(bench, case, variants, job.pick(_CHUNKS, (32, 64)), report)
    for variant in variants:
        _errors(bench, replace(case, variant=variant), report)
    _memory(bench, best, job, report)
    _liger(bench, case, job, report)


def _speeds(
    bench: Any, case: Any, variants: list[str], chunks: tuple[int, ...], report: Report
) -> Any:
    """Every variant at every chunk size; the case of the fastest backward pass."""
    found = {}
    for variant in variants:
        for chunk in chunks:
            tried = replace(case, variant=variant, chunk_size=chunk)
            found[tried] = _measure(bench, tried)
            report.measure(f"{variant}, chunks of {chunk}", found[tried])
    best = max(found, key=lambda tried: found[tried]["backward_tflops"])
    fastest = found[best]["backward_tflops"]
    name = f"backward TFLOP/s, {best.variant}, chunks of {best.chunk_size}"
    report.bar(name, fastest, at_least=_BAR, aim=_AIM)
    return best


def _measure(bench: Any, case: Any) -> dict[str, float]:
    release()
    found = bench.measure(case)
    flops = 2 * case.tokens * case.vocab * case.hidden
    both = found["seconds_forward"] + found["seconds_backward"]
    return {
        **found,
        "forward_tflops": flops / found["seconds_forward"] / 1e12,
        "useful_tflops": 3 * flops / both / 1e12,
    }


def _errors(bench: Any, case: Any, report: Report) -> None:
    release()
    found = bench.errors(case)
    report.measure(f"{case.variant}, errors", found)
    for name, most in (("logprob_rms", _LOGPROB_ERROR), ("grad_weight", _GRADIENT_ERROR)):
        report.bar(f"{case.variant}: {name}", found[name], at_most=most, correctness=True)


def _memory(bench: Any, best: Any, job: Job, report: Report) -> None:
    """Peak at many tokens over that of materialised logits, which grows with the tokens and is
    taken at fewer: the long one would not fit."""
    whole = replace(best, variant=bench._MATERIALISED, repeats=1)
    materialised = _measure(bench, whole)
    report.measure("materialised", materialised)
    long = replace(best, tokens=job.pick(_LONG, 512), repeats=1)
    ours = _measure(bench, long)
    report.measure(f"{long.tokens} tokens", ours)
    scaled = materialised["peak_bytes"] * long.tokens / whole.tokens
    name = f"peak at {long.tokens} tokens over materialised"
    report.bar(name, ours["peak_bytes"] / scaled, at_most=_SHARE, aim=_SHARE_AIM)
    report.measure("peak over one float32 array of logits", ours["peak_bytes"] / long.logits_bytes)


def _liger(bench: Any, case: Any, job: Job, report: Report) -> None:
    if job.device == "cpu" or find_spec("liger_kernel") is None:
        report.skip("Liger", "needs a CUDA device and liger-kernel")
        return
    for name, make in {"cross-entropy": _cross_entropy, "DPO": _liger_dpo}.items():
        release()
        try:
            report.measure(f"Liger, {name}", _rival(bench, case, make))
        except Exception as error:
            report.skip(f"Liger, {name}", f"{type(error).__name__}: {error}"[:300])


def _rival(bench: Any, case: Any, make: Callable[[Any, Any], Any]) -> dict[str, float]:
    """Seconds and TFLOP/s of one of Liger's losses and its gradients."""
    x = bench.make_inputs(case)
    loss, times = make(case, x), []
    loss().backward()
    release()
    before = torch.cuda.memory_allocated()
    for _ in range(case.repeats):
        x.hidden.grad = x.weight.grad = None
        started = now()
        loss().backward()
        times.append(now() - started)
    flops = 6 * case.tokens * case.vocab * case.hidden
    return {
        "seconds": median(times),
        "useful_tflops": flops / median(times) / 1e12,
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
    }


def _cross_entropy(case: Any, x: Any) -> Callable[[], Any]:
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(x.weight, x.hidden, x.targets)


def _liger_dpo(case: Any, x: Any) -> Callable[[], Any]:
    from liger_kernel.chunked_loss import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearDPOLoss,
    )

    loss = LigerFusedLinearDPOLoss(use_ref_model=False)
    sequences = 16
    targets = x.targets.view(sequences, -1)

    def once() -> Any:
        found = loss(x.weight, x.hidden.view(sequences, -1, case.hidden), targets)
        return found[0] if isinstance(found, tuple) else found

    return once
