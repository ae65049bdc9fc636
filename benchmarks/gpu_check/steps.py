"""Training steps of ours: FP8's speed over BF16's, and memory by recompute_granularity."""

from __future__ import annotations

from typing import Any

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
    memory,
    no_fp8,
    no_reference,
    now,
    own_layers,
    random_pairs,
    release,
)
from benchmarks.gpu_check.report import Report, Skip
from nemo_selfpref.config.model_schema import OptimConfig, Recompute
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.megatron.optim import PolicyOptimizer

_PEAK = 989e12
"""Dense BF16 operations a second of an H100 or H200 (SXM)."""
_LLAMA = {"hidden": 2048, "layers": 24, "heads": 16, "kv_heads": 16, "ffn": 5504, "vocab": 32000}
_FP8_AIM = 1.4
_FP8_BAR = 1.15
"""The least that others report of a whole step."""
# Delayed scaling last: it is the one we do not advise.
_ORDER = tuple(sorted(RECIPES, key=lambda name: name == "delayed"))


def fp8_speed(job: Job, report: Report) -> None:
    plain = _step(job, {}, job.pick(5, 1))
    report.measure("bf16", plain)
    why, ratios = no_fp8(), {}
    if not why and own_layers():
        report.measure("bf16, without Transformer Engine", _step(job, own_layers(), 5))
    for recipe in _ORDER:
        try:
            settings = fp8_settings(recipe)
            if why:
                raise Skip(why)
            found = _step(job, settings, 5)
        except Skip as reason:
            report.skip(f"FP8 {recipe}", str(reason))
        except Exception as error:
            report.skip(f"FP8 {recipe}", f"{type(error).__name__}: {error}"[:500])
            release()
        else:
            ratios[recipe] = found["tokens a second"] / plain["tokens a second"]
            report.measure(f"FP8 {recipe}", {**found, "over bf16": ratios[recipe]})
    if ratios:
        best = max(ratios, key=lambda name: ratios[name])
        name = f"FP8 ({best}) over BF16, tokens/s"
        report.bar(name, ratios[best], at_least=_FP8_BAR, aim=_FP8_AIM)


def recompute(job: Job, report: Report) -> None:
    found = {}
    for kind in Recompute:
        found[kind] = _step(job, {"recompute_granularity": kind}, 1, layers=job.pick(12, 2))
        report.measure(kind.value, found[kind])
    if job.toy:
        report.skip("peak memory", "a CPU process's is not that of its tensors")
        return
    none = found[Recompute.none]["peak GiB"]
    for kind in (Recompute.selective, Recompute.full):
        report.bar(f"{kind.value} over none, peak", found[kind]["peak GiB"] / none, at_most=0.99)


def _step(
    job: Job, settings: dict[str, Any], count: int, layers: int | None = None
) -> dict[str, float]:
    """Steps of DPO (the policy's part and the optimizer's) on two micro-batches of 8,192 tokens."""
    longest = job.pick(1024, 64)
    shape = {**job.pick(_LLAMA, TINY), **({"layers": layers} if layers else {})}
    arch = architecture(**shape, longest=longest)
    release()
    before = memory()[0]
    policy = fill(build(arch, Precision.bf16, micro_batch_size=4, **settings))
    optimizer = PolicyOptimizer(policy, OptimConfig(lr=1e-6), clip_grad=1.0)
    half = longest // 2
    # Of one length: a whole number of tiles of 128 tokens, as FP8's blocks want them.
    rows = random_pairs(8, prompt=half, answer=half, vocab=arch.vocab_size, spread=False)
    batches, inputs = batches_of(policy, rows), no_reference(rows)
    parameters = sum(p.numel() for p in policy.module.parameters())
    tokens, times = 0.0, []
    for _ in range(count + 1):
        started = now()
        tokens = policy.train_batch(batches, dpo(), inputs)["tokens"]
        optimizer.step()
        times.append(now() - started)
    seconds = sum(times[1:]) / count
    found = {
        "parameters": float(parameters),
        "seconds": seconds,
        "tokens a second": tokens / seconds,
        "MFU": 6 * parameters * tokens / seconds / _PEAK,
        "peak GiB": (memory()[1] - before) / 2**30,
    }
    del policy, optimizer
    release()
    return found
