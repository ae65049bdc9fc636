"""The DPO loss of step 0, whose reference is the same weights: log 2, or the two passes differ."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_check.job import Job
from benchmarks.gpu_check.models import (
    RECIPES,
    TINY,
    architecture,
    batches_of,
    build,
    dpo,
    fill,
    fp8_settings,
    no_fp8,
    own_layers,
    random_pairs,
    reference_of,
    release,
)
from benchmarks.gpu_check.report import Report, Skip
from nemo_selfpref.checkpoint.hf_weights import RandomSource
from nemo_selfpref.checkpoint.training_state import fill_policy
from nemo_selfpref.config.schema import Precision

_LOW, _HIGH = 0.69314, 0.69316
_SHAPE = {"hidden": 1024, "layers": 8, "heads": 16, "kv_heads": 8, "ffn": 2816, "vocab": 32000}


def first_loss(job: Job, report: Report) -> None:
    # Float32 tells rounding, where bf16 alone misses, from passes that differ.
    for precision in (Precision.fp32, Precision.bf16):
        for sharing in (False, True):
            name = precision.value + (", shared prompts" if sharing else "")
            found = _loss(job, report, name, {"share_prompts": sharing}, precision)
            _bar(report, name, found, True)
    why = no_fp8()
    if not why and own_layers():
        name = "bf16 without Transformer Engine"
        _bar(report, name, _loss(job, report, name, own_layers()), True)
    for recipe in RECIPES:
        try:
            settings = fp8_settings(recipe)
            if why:
                raise Skip(why)
            found = _loss(job, report, recipe, settings)
        except Skip as reason:
            report.skip(f"FP8 {recipe}", str(reason))
        except Exception as error:
            report.note(f"FP8 {recipe}: {type(error).__name__}: {error}"[:1000])
            _bar(report, f"FP8 {recipe}", None, True)
        else:
            # Delayed scales move between the two passes: a miss is told, and is no fault.
            _bar(report, f"FP8 {recipe}", found, recipe != "delayed")


def _bar(report: Report, name: str, loss: float | None, correctness: bool) -> None:
    bounds = {"at_least": _LOW, "at_most": _HIGH}
    report.bar(f"{name}: loss of step 0", loss, **bounds, correctness=correctness)


def _loss(
    job: Job,
    report: Report,
    name: str,
    settings: dict[str, Any],
    precision: Precision = Precision.bf16,
) -> float:
    longest = job.pick(768, 48)
    arch = architecture(**job.pick(_SHAPE, TINY), longest=longest)
    policy = build(arch, precision, **settings)
    if "fp8_recipe" in settings:
        # The FP8 layers may keep state beside their weights, which a source does not know.
        fill(policy)
    else:
        fill_policy(policy, RandomSource(arch, 0))
    rows = random_pairs(16, prompt=longest // 2, answer=longest // 2, vocab=arch.vocab_size)
    inputs = reference_of(policy, rows)
    metrics = policy.train_batch(batches_of(policy, rows), dpo(), inputs)
    report.measure(f"{name}: metrics of step 0", metrics)
    gradients = [getattr(p, "main_grad", None) for p in policy.module.parameters()]
    finite = all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)
    report.bar(f"{name}: gradients finite", float(finite), at_least=1, correctness=True)
    del policy
    release()
    return metrics["loss"]
