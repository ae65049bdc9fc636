"""The step times that `selfpref plan` foretells, against real steps on this machine's CPU.

    python benchmarks/plan_vs_run.py [--steps 5] [--json FILE]

One process, one thread, on a machine that does nothing else. The rate that the plan is given is
that of a large float32 product, measured here; the share of it that training reaches (MFU) is
printed, and it is what a plan has to be told. With the share of the first shape the others are
foretold, so the last column says how far one measurement carries.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from nemo_selfpref.checkpoint.hf_weights import RandomSource
from nemo_selfpref.checkpoint.training_state import fill_policy
from nemo_selfpref.cli import build_parser
from nemo_selfpref.data.packing import micro_batches
from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.platform import select_platform
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import ORPOObjective
from nemo_selfpref.training.plan import Plan, make_plan, plan_config
from nemo_selfpref.types import PreferencePair

PROMPT, ANSWER, ROWS = 96, 64, 8
SHAPES: dict[str, tuple[list[int], list[str]]] = {
    # layers, hidden, feed-forward, heads, vocabulary
    "4 x 256": ([4, 256, 704, 4, 4000], []),
    "8 x 256": ([8, 256, 704, 4, 4000], []),
    "4 x 512": ([4, 512, 1408, 8, 4000], []),
    "4 x 256, vocabulary 32000": ([4, 256, 704, 4, 32000], []),
    "4 x 256, recomputed": ([4, 256, 704, 4, 4000], ["model.recompute_granularity=full"]),
}
NAMES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")


def measured_tflops(size: int = 1024, repeats: int = 20) -> float:
    """1e12 operations a second of a float32 product, the best of some."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds) / 1e12


def planned(shape: list[int], more: list[str], tflops: float) -> Plan:
    sizes = dict(zip(NAMES, shape, strict=True))
    sizes |= {"num_query_groups": sizes["num_attention_heads"], "max_position_embeddings": 512}
    sizes |= {"kv_channels": sizes["hidden_size"] // sizes["num_attention_heads"]}
    overrides = [f"model.architecture.{name}={value}" for name, value in sizes.items()]
    overrides += [f"data.max_length={PROMPT + ANSWER}", f"data.max_prompt_length={PROMPT}"]
    overrides += ["rollout.max_new_tokens=64", f"model.global_batch_size={ROWS}", *more]
    given = ["--gpu", "cpu", "--mfu", "1", "--peak-tflops", str(tflops)]
    given += ["--prompt-tokens", str(PROMPT), "--answer-tokens", str(ANSWER)]
    args = build_parser().parse_args(["plan", "--config-name", "orpo", *given])
    return make_plan(plan_config("orpo", overrides, None), args)


def real_seconds(plan: Plan, steps: int) -> float:
    """The quickest of some steps, after one that is not counted."""
    cfg, platform = plan.cfg, select_platform(plan.cfg.trainer.accelerator)
    layout = parallel.initialize(cfg, platform)
    policy = Policy(plan.arch, cfg.model, cfg.trainer.precision, platform, layout)
    fill_policy(policy, RandomSource(plan.arch, 0))
    optimizer = PolicyOptimizer(policy, cfg.model.optim, 1.0)
    ids = torch.randint(5, plan.arch.vocab_size, (ROWS, PROMPT + 2 * ANSWER)).tolist()
    rows = [
        PreferencePair(
            str(n), tuple(r[:PROMPT]), tuple(r[PROMPT:-ANSWER]), tuple(r[PROMPT + ANSWER :])
        )
        for n, r in enumerate(ids)
    ]
    rule = policy.packing_rule(cfg.model.micro_batch_size)
    batches = micro_batches(
        rows, list(range(ROWS)), replica=0, num_replicas=1, rule=rule, paired=True
    )
    inputs, seconds = StepInputs(torch.ones(ROWS), {}), []
    for _ in range(steps + 1):
        started = time.perf_counter()
        policy.train_batch(batches, ORPOObjective(0.1), inputs)
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tflops = measured_tflops()
    print(f"a product of matrices: {tflops * 1e3:.1f} GFLOP/s")
    found: list[dict[str, Any]] = []
    for name, (shape, more) in SHAPES.items():
        plan = planned(shape, more, tflops)
        (step,) = plan.time.stages
        real = real_seconds(plan, args.steps)
        mfu = step.compute_s / real
        share = found[0]["reached"] if found else mfu
        row = {"shape": name, "real_s": real, "reached": mfu, "planned_s": step.compute_s / share}
        found.append(row)
        error = row["planned_s"] / real - 1
        print(f"{name:26}  real {real:7.3f} s  reached {mfu:4.0%}  planned {error:+.0%}")
    parallel.shutdown()
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"tflops": tflops, "shapes": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
