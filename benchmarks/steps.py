"""What a step costs: losses against SFT, packing, shared prompts, EMA, segments, cache, saving.

    make bench-steps PAIRS=pairs.jsonl
    python benchmarks/steps.py --pairs pairs.jsonl --only objectives packing

Every variant has a policy of its own at the same weights, a tiny Llama; the variants' rounds
alternate (A B A B) in one process, after one that is not counted. A ratio is the median of the
rounds' ratios. Fails where variants that should train alike do not.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import BenchmarkError, machine, versions
from material import ModelSize
from steps_kit import Bench, Part, prepare
from steps_parts import PARTS as STEP_PARTS
from steps_saving import saving

from nemo_selfpref.errors import SelfPrefError
from nemo_selfpref.files import write_json
from nemo_selfpref.megatron import parallel
from nemo_selfpref.monitor.console import Console

PARTS = {**STEP_PARTS, "saving": saving}
_PACKAGES = ["nemo-selfpref", "torch", "transformers", "megatron-core"]


def report(part: Part, console: Console) -> None:
    """A part's table, its ratios with their bars, and what one needs to read them."""
    console.table(part.title, part.columns, part.rows)
    for ratio in part.ratios:
        console.say(ratio.line())
    for note in part.notes:
        console.say(note)
    console.say("")


def about(bench: Bench) -> dict[str, Any]:
    """What all numbers depend on."""
    args = bench.args
    names = ("count", "runs", "threads", "micro_batch", "global_batch", "lr", "seed")
    return {
        **{name: getattr(args, name) for name in names},
        "source": bench.source,
        "model": asdict(args.size),
        "machine": machine(),
        "versions": versions(_PACKAGES),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="these parts")
    add("--pairs", type=Path, help="JSON lines: prompt, chosen, rejected; without it, made up")
    add("--count", type=int, default=64, help="pairs of one round")
    add("--runs", type=int, default=5, help="measured rounds of each variant")
    add("--work", type=Path, default=Path("runs/bench/steps"), help="folder for everything")
    add("--json", type=Path, default=Path("runs/bench/steps.json"))
    add("--micro-batch", type=int, default=8, help="pairs of a micro-batch")
    add("--global-batch", type=int, default=32, help="pairs of a step")
    add("--vocabulary", type=int, default=ModelSize.vocabulary)
    add("--max-length", type=int, default=ModelSize.max_length, help="longer pairs are left out")
    add("--hidden", type=int, default=ModelSize.hidden)
    add("--layers", type=int, default=ModelSize.layers)
    add("--lr", type=float, default=1e-4)
    add("--seed", type=int, default=7)
    add("--threads", type=int, default=2)
    add("--limit", type=float, default=1800, help="seconds after which a child is stopped")
    add("--answers-per-prompt", type=int, default=8, help="sharing: an even number")
    add("--prompt-tokens", type=int, default=256, help="sharing: about so many")
    add("--answer-tokens", type=int, default=64, help="sharing: about so many")
    add("--answers", type=int, default=32, help="segments: how many are regenerated")
    add("--segment-lengths", type=int, nargs="+", default=[256, 64], help="segments: tokens")
    add("--decode-batch", type=int, default=32, help="segments: answers decoded together")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error("--runs: expected 1 or more")
    if args.answers_per_prompt < 2 or args.answers_per_prompt % 2:
        parser.error("--answers-per-prompt: expected an even number")
    if args.global_batch % args.micro_batch or args.count % args.global_batch:
        parser.error("expected --count in whole --global-batch, that in whole --micro-batch")
    args.work = args.work.resolve()
    args.size = ModelSize(
        hidden=args.hidden,
        layers=args.layers,
        vocabulary=args.vocabulary,
        max_length=args.max_length,
    )
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    console = Console(bars=False)
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=args.work) as scratch:
            args.scratch = Path(scratch)
            bench = prepare(args)
            found: dict[str, Any] = about(bench)
            for name in args.only:
                print(f"{name}:", flush=True)
                part = PARTS[name](bench)
                report(part, console)
                found[name] = part.as_json()
                write_json(args.json, found)
    except (BenchmarkError, SelfPrefError) as error:
        sys.exit(f"error: {error}")
    finally:
        parallel.shutdown()
    console.say(
        f"{args.count} pairs a round ({bench.source}), median of {args.runs}, {args.threads} "
        f"threads, fp32, AdamW, " + ", ".join(f"{n} {v}" for n, v in found["model"].items())
    )
    console.say(", ".join(f"{n} {v}" for n, v in found["versions"].items()))
    console.say(f"{found['machine']['cpu']}, {found['machine']['cores']} cores")


if __name__ == "__main__":
    main()
