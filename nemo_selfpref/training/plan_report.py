"""How a plan is shown: tables with bars on a terminal, or JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_selfpref.training.plan import Plan, Scaled, longest_stage
from nemo_selfpref.training.plan_hardware import GIB
from nemo_selfpref.training.plan_time import StepTime
from nemo_selfpref.training.plan_weights import parameters, sizes_of

_BAR = 40


def to_json(plan: Plan) -> None:
    """The plan as one JSON object on stdout; sizes in bytes, times in seconds."""
    sys.stdout.write(json.dumps(as_json(plan), indent=2, default=str) + "\n")


def as_json(plan: Plan) -> dict[str, Any]:
    """The same as an object."""
    memory, change = plan.memory, plan.change
    return {
        "settings": _settings(plan),
        "assumed": list(plan.assumed),
        "notes": list(plan.notes),
        "rates": asdict(plan.rates),
        "memory": {
            "device": plan.device.name,
            "bytes": plan.device.memory,
            "stage": memory.stage,
            "phase": memory.worst_phase,
            "lines": memory.peak,
            "phases": {n: sum({**memory.always, **p}.values()) for n, p in memory.phases.items()},
            "total": memory.total,
            "fits": plan.fits,
        },
        "cheapest_fit": change
        and {
            "settings": {k: _plain(v) for k, v in change.settings.items()},
            "total": change.memory.total,
        },
        "host_snapshot_bytes": plan.snapshot,
        "checkpoint": {"bytes": plan.checkpoint, "seconds": plan.checkpoint_s},
        "before_s": plan.time.before_s,
        "once_s": plan.time.once_s,
        "stages": [_stage(step) for step in plan.time.stages],
        "total_s": plan.time.total_s,
        "generation_share": plan.time.generation_share,
        "scaling": [_scaling_row(plan, row) for row in plan.scaling],
    }


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _stage(step: StepTime) -> dict[str, Any]:
    seconds = {"seconds": step.seconds, "epoch_s": step.seconds * step.steps}
    return {**asdict(step), **seconds, "generation_share": step.generation_share}


def _settings(plan: Plan) -> dict[str, Any]:
    m, t = plan.cfg.model, plan.cfg.trainer
    sizes = sizes_of(m, t.devices * t.num_nodes)
    every, active = parameters(plan.arch)
    return {
        "method": plan.cfg.algorithm.name,
        "weights": every,
        "weights of layers a token passes": active,
        "layout": f"TP={sizes.tensor} PP={sizes.pipeline} VPP={sizes.virtual} CP={sizes.context} "
        f"EP={m.expert_model_parallel_size} DP={sizes.replicas}",
        "devices": f"{t.num_nodes} x {t.devices} {plan.device.name}",
        "precision": t.precision.value,
        "distributed optimizer": m.use_distributed_optimizer,
        "recompute": m.recompute_granularity.value,
        "micro-batch": f"{m.micro_batch_tokens} tokens"
        if m.micro_batch_tokens
        else f"{m.micro_batch_size} rows",
        "global batch": m.global_batch_size,
        "longest sequence": plan.cfg.data.max_length,
        "log-prob chunk": m.logprob_chunk_size,
        "rollouts": f"{plan.cfg.rollout.engine.value}, {plan.cfg.rollout.placement.value}",
    }


def _scaling_row(plan: Plan, row: Scaled) -> dict[str, Any]:
    first = plan.scaling[0]
    each = row.step.tokens / row.step.seconds / row.devices
    base = first.step.tokens / first.step.seconds / first.devices
    return {
        "devices": row.devices,
        "replicas": row.replicas,
        "batch": row.batch,
        "batch_raised": row.raised,
        "seconds": row.step.seconds,
        "compute_s": row.step.compute_s + row.step.bubble_s + row.step.tensor_s,
        "reduced_bytes": row.step.reduced,
        "gradient_s": row.step.gradient_s,
        "rollout_s": row.step.rollout_s,
        "tokens_per_second": row.step.tokens / row.step.seconds,
        "efficiency": each / base,
    }


def show(plan: Plan) -> None:
    """The plan on the terminal."""
    width = None if sys.stdout.isatty() else 120
    console = Console(file=sys.stdout, highlight=False, emoji=False, markup=False, width=width)
    settings = Table(title="Settings", show_header=False)
    for name, value in _settings(plan).items():
        counted = isinstance(value, int) and not isinstance(value, bool)
        settings.add_row(name, f"{value:,}" if counted else _text(value))
    console.print(settings)
    console.print(_memory(plan))
    for line in _verdict(plan):
        console.print(line)
    console.print(_stages(plan))
    for line in _run(plan):
        console.print(line)
    console.print(_scaling(plan))
    console.print("\nAssumed, not measured:")
    for line in (*plan.assumed, *_always_assumed(plan)):
        console.print(f"- {line}")
    for note in plan.notes:
        console.print(f"selfpref train would refuse: {note}")


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    table = Table(
        title=f"Memory of the fullest rank (pipeline stage {memory.stage}), {memory.worst_phase}"
    )
    for name in ("", "GiB", f"of {_gib(plan.device.memory)}"):
        table.add_column(name, justify="right" if name == "GiB" else "left")
    for name, size in memory.peak.items():
        table.add_row(name, _gib(size), _bar(size / plan.device.memory))
    table.add_section()
    table.add_row("total", _gib(memory.total), _bar(memory.total / plan.device.memory))
    for name, lines in memory.phases.items():
        if name != memory.worst_phase:
            total = sum({**memory.always, **lines}.values())
            table.add_row(f"({name})", _gib(total), _bar(total / plan.device.memory))
    return table


def _bar(share: float) -> str:
    whole = round(min(share, 1.0) * _BAR)
    over = " OVER" if share > 1 else ""
    return f"{'█' * whole}{'·' * (_BAR - whole)} {share:.1%}{over}"


def _verdict(plan: Plan) -> list[str]:
    memory, room = plan.memory, plan.device.memory
    lines = []
    if plan.fits:
        lines.append(f"It fits, with {_gib(room - memory.total)} GiB to spare.")
    else:
        largest = max(memory.peak, key=lambda name: memory.peak[name])
        lines.append(
            f"It does not fit: {memory.worst_phase} of stage {memory.stage} is over by "
            f"{_gib(memory.total - room)} GiB; the largest line is {largest}, "
            f"{_gib(memory.peak[largest])} GiB."
        )
        lines.append(_advice(plan))
    lines.append(
        f"Host memory of a save: {_gib(plan.snapshot)} GiB a rank of the first replica. "
        f"Checkpoint: {_gib(plan.checkpoint)} GiB, {plan.checkpoint_s:,.0f} s to write."
    )
    return lines


def _advice(plan: Plan) -> str:
    if plan.change is None:
        return "No mixture of smaller batches, recomputing and up to 64 such nodes fits."
    settings = " ".join(f"{k}={_text(v)}" for k, v in plan.change.settings.items())
    total = _gib(plan.change.memory.total)
    return f"The cheapest change that fits ({total} GiB): {settings}"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(_plain(value))


def _stages(plan: Plan) -> Table:
    table = Table(title="A step of each training stage")
    names = ("stage", "steps x epochs", "rows", "tokens", "answers", "PFLOP", "compute", "waits")
    for name in (*names, "rollouts", "step", "epoch"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for s in plan.time.stages:
        waits = s.bubble_s + s.tensor_s + s.gradient_s
        table.add_row(
            s.name,
            f"{s.steps} x {s.epochs}",
            f"{s.rows:,.0f}",
            f"{s.tokens:,.0f}",
            f"{s.answers:,.0f}",
            f"{s.model_flops / 1e15:,.2f}",
            *(_seconds(x) for x in (s.compute_s, waits, s.rollout_s, s.seconds)),
            _seconds(s.seconds * s.steps),
        )
    return table


def _run(plan: Plan) -> list[str]:
    t, first = plan.time, plan.time
    once = sum(t.once_s.values())
    return [
        f"Before training: {_seconds(first.before_s)} of answers and judgements, "
        f"{_seconds(once)} of log-probs that are scored once.",
        f"The whole run: {_seconds(t.total_s)}, {t.generation_share:.0%} of it sampling. "
        "Reading, writing and exporting models are left out.",
    ]


def _scaling(plan: Plan) -> Table:
    stage = plan.time.stages[longest_stage(plan.time)].name
    table = Table(title=f"More replicas: a step of {stage}")
    names = ("devices", "DP", "batch", "compute", "GB reduced", "reduce", "rollouts", "step")
    for name in (*names, "tokens/s", "efficiency"):
        table.add_column(name, justify="right")
    for scaled in plan.scaling:
        row = _scaling_row(plan, scaled)
        table.add_row(
            str(row["devices"]),
            str(row["replicas"]),
            f"{row['batch']}{'*' if row['batch_raised'] else ''}",
            _seconds(row["compute_s"]),
            f"{row['reduced_bytes'] / 1e9:,.2f}",
            *(_seconds(row[n]) for n in ("gradient_s", "rollout_s", "seconds")),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['efficiency']:.0%}",
        )
    table.caption = "* raised, so that every replica has a micro-batch: another run, strictly"
    return table


def _seconds(value: float) -> str:
    if value < 0.0005:
        return "0 s"
    if value < 100:
        return f"{value:.3g} s"
    hours, rest = divmod(round(value), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d} h"


def _always_assumed(plan: Plan) -> list[str]:
    d = plan.device
    return [
        "the longest micro-batch there can be (memory), sequences of the mean length (time)",
        "activations as megatron-core's own layers keep them; no padding of unlike lengths",
        f"{d.peak(plan.cfg.trainer.precision) / 1e12:,.5g} TFLOP/s of a device's data sheet or "
        "--peak-tflops",
        f"sending at {d.node_bandwidth / 1e9:g} GB/s in a node and {d.network_bandwidth / 1e9:g} "
        "GB/s between nodes, none of it hidden behind computing",
        "no row dropped; as many rows prepared as there are data rows "
        "(algorithm.improver.num_prompts and algorithm.judge.augmentation.num_pairs are not read)",
    ]
