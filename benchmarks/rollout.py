"""What rollouts cost: our server over vLLM itself, new weights, steps ahead, a judge, embedded.

    make bench-rollout
    python benchmarks/rollout.py --only server sync

Both sides of a ratio run in the same benchmark, their rounds in turn (A B A B) after one that is
not counted; a ratio is the median of the rounds' ratios. Needs vLLM's environment (make
rollout-env). Fails where variants that should make equally many tokens do not.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import BenchmarkError, child_environment, machine, versions
from rollout_ahead import ahead
from rollout_embedded import embedded
from rollout_engines import version_of_vllm
from rollout_kit import SIZES, Bench, threads
from rollout_parts import judge, server
from rollout_sync import sync
from steps import report
from steps_kit import Part

from nemo_selfpref.errors import SelfPrefError
from nemo_selfpref.files import write_json
from nemo_selfpref.megatron import parallel
from nemo_selfpref.monitor.console import Console

PARTS: dict[str, Callable[[Bench], Part]] = {
    "server": server,
    "sync": sync,
    "ahead": ahead,
    "judge": judge,
    "embedded": embedded,
}
_PACKAGES = ["nemo-selfpref", "torch", "transformers", "megatron-core", "httpx"]
_TOY = {
    "threads": 1,
    "runs": 1,
    "sync_runs": 1,
    "concurrent": 4,
    "new_tokens": 8,
    "server_sizes": ["tiny"],
    "embedded_sizes": ["tiny"],
    "large": "tiny",
    "samples": 2,
    "methods": ["SAPO"],
    "ahead_steps": 1,
    "sapo_prompts": 2,
    "osp_prompts": 1,
    "judged_prompts": 1,
}
_COUNTS = ("runs", "sync_runs", "concurrent", "new_tokens", "threads", "lr", "seed")


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What all numbers depend on."""
    return {
        **{name: getattr(args, name) for name in _COUNTS},
        "toy": args.toy,
        "models": {name: asdict(size) for name, size in SIZES.items()},
        "machine": machine(),
        "load_before": os.getloadavg()[0],
        "versions": {**versions(_PACKAGES), "vllm": version_of_vllm(args.rollout_python)},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add, sizes = parser.add_argument, list(SIZES)
    add("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="these parts")
    add("--runs", type=int, default=3, help="measured rounds of each variant")
    add("--sync-runs", type=int, default=7, help="sync: measured rounds of each variant")
    add("--concurrent", type=int, default=64, help="server, embedded: answers at a time")
    add("--new-tokens", type=int, default=64, help="of every answer")
    add("--server-sizes", nargs="+", choices=sizes, default=["tiny", "middle"])
    add("--embedded-sizes", nargs="+", choices=sizes, default=["tiny", "middle"])
    add("--large", choices=sizes, default="300 MB", help="sync: the model held against a copy")
    add("--methods", nargs="+", choices=["SAPO", "OSP"], default=["SAPO", "OSP"], help="ahead")
    add("--samples", type=int, default=7, help="ahead: OSP's answers to a prompt")
    add("--ahead-steps", type=int, default=4, help="ahead: steps of a round")
    add("--sapo-prompts", type=int, default=16, help="ahead: prompts of a SAPO step")
    add("--osp-prompts", type=int, default=2, help="ahead: prompts of an OSP step")
    add("--judged-prompts", type=int, default=4, help="judge: prompts of an OSP step")
    add("--lr", type=float, default=1e-5)
    add("--seed", type=int, default=7)
    add("--threads", type=int, default=2, help="of either side; ahead takes one a side")
    add("--limit", type=float, default=600, help="seconds a child may take to answer")
    add("--rollout-python", type=Path, default=Path(".venv-rollout/bin/python"))
    add("--work", type=Path, default=Path("runs/bench/rollout"), help="folder for everything")
    add("--json", type=Path, default=Path("runs/bench/rollout.json"))
    add("--toy", action="store_true", help="as small as it gets: does everything run?")
    args = parser.parse_args()
    if args.runs < 1 or args.sync_runs < 1:
        parser.error("--runs, --sync-runs: expected 1 or more")
    # Not resolved: an environment's interpreter is a link, which must keep its name.
    args.rollout_python = args.rollout_python.absolute()
    if not args.rollout_python.exists():
        parser.error(f"{args.rollout_python} does not exist: make rollout-env makes it")
    if args.toy:
        vars(args).update(_TOY)
    args.work = args.work.resolve()
    return args


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The parts asked for, each reported and written as soon as it is done."""
    args.work.mkdir(parents=True, exist_ok=True)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else args.work
    found = about(args)
    with (
        tempfile.TemporaryDirectory(dir=args.work) as scratch,
        tempfile.TemporaryDirectory(dir=memory, prefix="selfpref-bench-") as shared,
        threads(args.threads),
    ):
        bench = Bench(args, Path(scratch), Path(shared))
        for name in args.only:
            print(f"{name}:", flush=True)
            part = PARTS[name](bench)
            report(part, console)
            found[name] = part.as_json()
            write_json(args.json, found)
    return found


def main() -> None:
    args = arguments()
    os.environ.update(child_environment(args.threads, args.work))
    logging.disable(logging.WARNING)
    console = Console(bars=False)
    try:
        found = measure(args, console)
    except (BenchmarkError, SelfPrefError) as error:
        sys.exit(f"error: {error}")
    finally:
        parallel.shutdown()
    sizes = ", ".join(f"{n}: hidden {s.hidden}, {s.layers} layers" for n, s in SIZES.items())
    console.say(f"median of {args.runs} rounds ({args.sync_runs} of sync), {args.threads} threads")
    console.say(f"fp32; models {sizes}")
    console.say(", ".join(f"{n} {v}" for n, v in found["versions"].items()))
    machine_ = found["machine"]
    console.say(f"{machine_['cpu']}, {machine_['cores']} cores, load {found['load_before']:.1f}")


if __name__ == "__main__":
    main()
