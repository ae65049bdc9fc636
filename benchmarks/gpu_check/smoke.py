"""Versions, and Transformer Engine's FP8 linear layer by each recipe."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.gpu_check.job import Job
from benchmarks.gpu_check.report import Report

_PACKAGES = (
    "torch",
    "triton",
    "transformer-engine",
    "transformer-engine-torch",
    "megatron-core",
    "transformers",
    "trl",
    "liger-kernel",
    "peft",
    "nemo-toolkit",
    "lightning",
    "omegaconf",
)
# Values round to 4 significant bits forward and, with delayed scaling, 3 backward: about 2.6 % and
# 5 % rms each, and two rounded factors meet in a product.
_FORWARD_ERROR, _BACKWARD_ERROR = 0.08, 0.15


def versions(job: Job, report: Report) -> None:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    report.measure("versions", found)
    try:
        import torch
    except ImportError as error:
        report.skip("device", str(error))
        return
    report.measure("CUDA of torch", torch.version.cuda or "none")
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        report.measure("device", facts.name)
        report.measure("memory GiB", facts.total_memory / 2**30)
        report.measure("capability", f"{facts.major}.{facts.minor}")
    else:
        report.skip("device", "torch finds no CUDA device")


def fp8_linear(job: Job, report: Report) -> None:
    """Output and gradients of te.Linear against float32 products of the same numbers."""
    import torch  # before Transformer Engine, which finds its libraries through it
    from transformer_engine.common import (  # pyright: ignore[reportMissingImports]
        recipe as recipes,
    )

    found = {
        "delayed": "DelayedScaling",
        "tensorwise": "Float8CurrentScaling",
        "blockwise": "Float8BlockScaling",
    }
    torch.manual_seed(0)
    for name, kind in found.items():
        try:
            errors = _errors(getattr(recipes, kind)())
        except Exception as error:
            report.note(f"{name}: {type(error).__name__}: {error}"[:500])
            errors = dict.fromkeys(("output", "input gradient", "weight gradient"))
        for what, value in errors.items():
            most = _FORWARD_ERROR if what == "output" else _BACKWARD_ERROR
            report.bar(f"{name}: {what}, relative error", value, at_most=most, correctness=True)


def _errors(recipe: Any) -> dict[str, float | None]:
    import torch
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    layer = te.Linear(1024, 512, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(256, 1024, **kind).requires_grad_()
    upstream = torch.randn(256, 512, **kind)
    output = x
    # Delayed scaling takes its scales from the steps before.
    for _ in range(3):
        x.grad = layer.weight.grad = None
        with _fp8(te, recipe):
            output = layer(x)
        output.backward(upstream)
    exact, weight = x.detach().float(), layer.weight.detach().float()
    return {
        "output": _relative(output, exact @ weight.t()),
        "input gradient": _relative(x.grad, upstream.float() @ weight),
        "weight gradient": _relative(layer.weight.grad, upstream.float().t() @ exact),
    }


def _fp8(te: Any, recipe: Any) -> Any:
    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=recipe)
    return te.fp8_autocast(enabled=True, fp8_recipe=recipe)  # its name before 2.9


def _relative(got: Any, want: Any) -> float:
    return float((got.detach().float() - want).norm() / want.norm())
