"""Pairs a second of DPO on the same weights and token ids: ours packed, TRL's with Liger.

Neither side's first step counts, since kernels are compiled in it. TRL runs twice: with float32
weights under autocast, as we keep float32 main weights, and with bfloat16 weights alone, which is
faster and trains worse. The bar is against the faster.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.job import Job, module_in
from benchmarks.gpu_check.models import (
    BETA,
    batches_of,
    build,
    dpo,
    now,
    reference_of,
    release,
)
from benchmarks.gpu_check.report import Report, write
from nemo_selfpref.checkpoint.hf_config import read_architecture
from nemo_selfpref.checkpoint.hf_weights import HuggingFaceSource
from nemo_selfpref.checkpoint.training_state import fill_policy
from nemo_selfpref.config.model_schema import OptimConfig, TokenizerConfig
from nemo_selfpref.config.schema import DataConfig, Precision
from nemo_selfpref.data.dataset import load_preferences
from nemo_selfpref.data.tokenizer import load_tokenizer
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.objectives.inputs import PassLogps, StepInputs
from nemo_selfpref.objectives.objective import Pass
from nemo_selfpref.types import PreferencePair

_LLAMA = {"hidden": 1024, "layers": 24, "heads": 16, "kv_heads": 8, "ffn": 4096}
_TINY = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 64}
_SEED, _LR = 7, 1e-6
_RTOL = 0.02
"""How far losses may be apart that two programs compute in bfloat16."""
_TRL_SECONDS = 60.0


def against_trl(job: Job, report: Report) -> None:
    folder = Path(job.scratch)
    facts = _material(job, folder)
    report.measure("material", facts)
    ours = _ours(job, folder, facts)
    report.measure("ours", _figures(ours, facts))
    release()
    theirs = {}
    for name, settings in _rivals(job, report).items():
        try:
            result = _trl(job, folder, facts, name, settings)
        except Exception as error:
            report.skip(name, f"{type(error).__name__}: {error}"[-1500:])
            continue
        theirs[name] = result
        report.measure(name, _figures(result, facts))
    if theirs:
        _compare(report, ours, theirs, facts)


def _compare(
    report: Report, ours: dict[str, Any], theirs: dict[str, Any], facts: dict[str, Any]
) -> None:
    """Ours over the faster, once it is clear that all did the same work."""
    bench = module_in("benchmarks", "dpo_vs_trl")
    for name, result in theirs.items():
        try:
            apart = bench.check_same_work(ours, result, name, _RTOL)
        except bench.BenchmarkError as error:
            report.note(f"{name}: not the same work, so no comparison: {error}")
            report.bar(f"{name}: losses, relative difference", None, at_most=_RTOL)
        else:
            report.bar(f"{name}: losses, relative difference", apart, at_most=_RTOL)
    speeds = {name: _figures(result, facts) for name, result in theirs.items()}
    mine = _figures(ours, facts)
    for kind in ("steps alone, pairs a second", "with reference, pairs a second"):
        best = max(speeds, key=lambda name: speeds[name][kind])
        ratio = mine[kind] / speeds[best][kind]
        report.bar(f"ours over {best}: {kind.split(',')[0]}", ratio, at_least=bench.BAR)


def _material(job: Job, folder: Path) -> dict[str, Any]:
    """Pairs, tokenizer and weights, made as for the comparison on a CPU."""
    material = module_in("benchmarks", "material")
    size = material.ModelSize(
        **job.pick(_LLAMA, _TINY),
        vocabulary=job.pick(32000, 512),
        max_length=job.pick(1024, 512),
    )
    count, global_batch = job.pick((512, 64), (8, 4))
    invented = material.synthetic_pairs(2 * count, _SEED)
    tokenizer = material.make_tokenizer(invented, size.vocabulary)
    usable = material.fitting(invented, tokenizer, size.max_length)[:count]
    count = len(usable) // global_batch * global_batch
    material.write_pairs(folder / "pairs.jsonl", usable[:count])
    material.save_model(folder / "model", size, tokenizer, _SEED)
    return {"pairs": count, "global_batch": global_batch, "max_length": size.max_length}


def _rows(folder: Path, facts: dict[str, Any]) -> list[PreferencePair]:
    longest = facts["max_length"]
    data = DataConfig(
        train_path=[str(folder / "pairs.jsonl")],
        max_length=longest,
        max_prompt_length=longest - 1,
        shuffle=False,
    )
    return load_preferences(data, load_tokenizer(TokenizerConfig(), str(folder / "model")))[0]


def _ours(job: Job, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    rows, size = _rows(folder, facts), facts["global_batch"]
    arch = read_architecture(folder / "model")
    tokens = job.pick(16384, 2 * arch.max_position_embeddings)
    policy = build(arch, Precision.bf16, share_prompts=True, micro_batch_tokens=tokens)
    fill_policy(policy, HuggingFaceSource(folder / "model", arch))
    reference_of(policy, rows[:size])  # compiles
    started = now()
    inputs = reference_of(policy, rows)
    reference = now() - started
    optimizer = PolicyOptimizer(policy, OptimConfig(lr=_LR), clip_grad=1.0)
    ends, losses = [], []
    for first in range(0, len(rows), size):
        step = rows[first : first + size]
        metrics = policy.train_batch(batches_of(policy, step), dpo(), _part(inputs, first, size))
        optimizer.step()
        ends.append(now())
        losses.append(metrics["loss"])
    path = folder / "ours-tokens.json"
    write(path, [[list(r.prompt_ids), list(r.chosen_ids), list(r.rejected_ids)] for r in rows])
    return {
        "step_ends": ends,
        "losses": losses,
        "parts": {"reference": reference},
        "tokens_file": str(path),
    }


def _part(inputs: StepInputs, first: int, size: int) -> StepInputs:
    """The inputs of one step's rows."""
    here = slice(first, first + size)
    passes = {n: PassLogps(p.chosen[here], p.rejected[here]) for n, p in inputs.passes.items()}
    assert passes.keys() == {Pass.REFERENCE}
    return StepInputs(inputs.strength[here], passes)


def _rivals(job: Job, report: Report) -> dict[str, dict[str, Any]]:
    """TRL's ways by name; none where TRL is not there."""
    if not _has(job.trl_python, "trl"):
        report.skip("TRL", f"{job.trl_python} has no trl")
        return {}
    if job.toy:
        return {"TRL": {"bf16": False, "bf16_weights": False, "liger": False}}
    liger = _has(job.trl_python, "liger_kernel")
    if not liger:
        report.skip("Liger", f"{job.trl_python} has no liger-kernel; TRL runs without it")
    with_it = " + Liger" if liger else ""
    return {
        f"TRL{with_it}, float32 weights": {"bf16": True, "bf16_weights": False, "liger": liger},
        f"TRL{with_it}, bfloat16 weights": {"bf16": True, "bf16_weights": True, "liger": liger},
    }


def _has(python: str, module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"
    try:
        return subprocess.run([python, "-c", code], capture_output=True).returncode == 0
    except OSError:
        return False


def _trl(
    job: Job, folder: Path, facts: dict[str, Any], name: str, settings: dict[str, Any]
) -> dict[str, Any]:
    common = module_in("benchmarks", "common")
    out = folder / "trl" / ("bfloat16" if settings["bf16_weights"] else "float32")
    told = {
        "out": str(out),
        "model": str(folder / "model"),
        "pairs": str(folder / "pairs.jsonl"),
        "num_pairs": facts["pairs"],
        "micro_batch": job.pick(8, 2),
        "global_batch": facts["global_batch"],
        "max_length": facts["max_length"],
        "precompute": True,
        "threads": job.pick(8, 1),
        "seed": _SEED,
        "lr": _LR,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "beta": BETA,
        "clip": 1.0,
        "device": job.device,
        **settings,
    }
    env = common.child_environment(told["threads"], out / "scratch")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    env.pop("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        env["CUDA_VISIBLE_DEVICES"] = visible
    if job.trl_python != sys.executable:
        env.pop("PYTHONPATH", None)  # an environment of its own has packages of its own
    script = Path(__file__).with_name("trl_side.py")
    result = common.run_child(Path(job.trl_python), script, told, env, _TRL_SECONDS)
    return {**result, "tokens_file": str(out / "tokens.json")}


def _figures(result: dict[str, Any], facts: dict[str, Any]) -> dict[str, float]:
    """Pairs a second of the steps but the first, and with the reference's share of the time."""
    ends, reference = result["step_ends"], result["parts"]["reference"]
    pair = (ends[-1] - ends[0]) / ((len(ends) - 1) * facts["global_batch"])
    return {
        "steps alone, pairs a second": 1 / pair,
        "with reference, pairs a second": 1 / (pair + reference / facts["pairs"]),
        "reference seconds": reference,
        "last loss": result["losses"][-1],
    }
