"""DPO pairs per second, ours over TRL's: same weights, same token ids, same steps, two CPU threads.

    make bench PAIRS=pairs.jsonl

Runs alternate (ours, TRL, TRL with precomputed reference, ours, ...). The headline is the ratio to
the faster of TRL's two ways, round by round. Each side first gets its fastest micro batch. Fails
where the two sides did not train on the same tokens or their losses differ.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from common import (
    BenchmarkError,
    Spread,
    child_environment,
    machine,
    run_child,
    versions,
)
from material import (
    ModelSize,
    save_model,
    usable_pairs,
    write_pairs,
)

from nemo_selfpref.errors import SelfPrefError
from nemo_selfpref.files import read_json, write_json
from nemo_selfpref.monitor.console import Console

BAR = 2.0
_HERE = Path(__file__).resolve().parent
_PADDING_FREE = "padding_free: not tried, TRL 1.16 itself switches it off for DPO with a warning"


@dataclass(frozen=True)
class Side:
    """One way of training the same pairs."""

    name: str
    script: str
    precompute: bool = False

    @property
    def slug(self) -> str:
        return self.name.replace(" ", "-").replace(",", "")


OURS = Side("ours", "ours_child.py")
TRL_SIDES = (
    Side("TRL live", "trl_child.py"),
    Side("TRL precomp.", "trl_child.py", precompute=True),
)
SIDES = (OURS, *TRL_SIDES)


@dataclass
class Bench:
    """The material on disk, and how to run a side on it."""

    args: argparse.Namespace
    work: Path
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self, side: Side, name: str, micro_batch: int, num_pairs: int) -> dict[str, Any]:
        """One child process; its result with pairs a second added."""
        args = self.args
        out = self.work / "jobs" / f"{name}-{side.slug}"
        job = {
            "out": str(out),
            "model": str(self.work / "model"),
            "pairs": str(self.work / "pairs.jsonl"),
            "num_pairs": num_pairs,
            "micro_batch": micro_batch,
            "global_batch": args.global_batch,
            "max_length": args.size.max_length,
            "precompute": side.precompute,
            "threads": args.threads,
            "seed": args.seed,
            "lr": args.lr,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "beta": 0.1,
            "clip": 1.0,
        }
        if side is OURS:
            job |= {"overrides": args.ours, "profile": args.profile and str(out / "profile.txt")}
        python = Path(sys.executable) if side is OURS else args.trl_python
        env = child_environment(args.threads, out / "scratch")
        if side is not OURS:
            env.pop("PYTHONPATH", None)
        result = run_child(python, _HERE / side.script, job, env, args.limit)
        result["pairs_per_second"] = num_pairs / result["seconds"]
        result["tokens_file"] = str(out / "tokens.json")
        print(f"{name}: {side.name}, micro batch {micro_batch}: {result['seconds']:.1f} s")
        shutil.rmtree(out / "run", ignore_errors=True)
        return result


def prepare(args: argparse.Namespace) -> Bench:
    """Pairs, tokenizer and weights below args.work."""
    shutil.rmtree(args.work / "jobs", ignore_errors=True)
    tokenizer, usable = usable_pairs(args.data, "--pairs", args.pairs, args.size, args.seed)
    # The first step's loss is log 2 whatever the model: two steps show that training agrees.
    if args.pairs % args.global_batch or args.pairs < 2 * args.global_batch:
        raise BenchmarkError(
            f"--pairs {args.pairs}: expected a multiple of --global-batch {args.global_batch}, "
            "at least two of them"
        )
    write_pairs(args.work / "pairs.jsonl", usable[: args.pairs])
    save_model(args.work / "model", args.size, tokenizer, args.seed)
    source = args.data.name if args.data else "synthetic, lengths like UltraFeedback's"
    return Bench(args, args.work, {"source": source, "model": asdict(args.size)})


def fastest_micro_batch(bench: Bench, side: Side) -> int:
    """The candidate that trains some of the pairs fastest."""
    candidates = [n for n in bench.args.micro_batches if bench.args.global_batch % n == 0]
    if not candidates:
        raise BenchmarkError("no --micro-batches divides the global batch")
    if len(candidates) == 1:
        return candidates[0]
    count = min(bench.args.pairs, 2 * bench.args.global_batch)
    tried = {n: bench.run(side, f"tune-{n}", n, count)["seconds"] for n in candidates}
    bench.facts.setdefault("tuning", {})[side.name] = tried
    return min(tried, key=lambda n: tried[n])


def check_same_work(ours: dict[str, Any], other: dict[str, Any], name: str, rtol: float) -> float:
    """Largest relative difference of the losses; raises where the work was not the same."""
    mine, theirs = read_json(Path(ours["tokens_file"])), read_json(Path(other["tokens_file"]))
    if len(mine) != len(theirs):
        raise BenchmarkError(f"we trained on {len(mine)} pairs, {name} on {len(theirs)}")
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if a != b:
            part = next(i for i in range(3) if a[i] != b[i])
            raise BenchmarkError(
                f"pair {number}, {('prompt', 'chosen', 'rejected')[part]}: we trained on "
                f"{len(a[part])} tokens ending in {a[part][-8:]}, {name} on {len(b[part])} ending "
                f"in {b[part][-8:]}"
            )
    if len(ours["losses"]) != len(other["losses"]):
        raise BenchmarkError(f"{len(ours['losses'])} steps here, {len(other['losses'])} in {name}")
    differences = [
        abs(a - b) / max(abs(b), 1e-12)
        for a, b in zip(ours["losses"], other["losses"], strict=True)
    ]
    if max(differences) > rtol:
        raise BenchmarkError(
            f"losses differ by up to {max(differences):.2g} (relative; {rtol:g} allowed): ours "
            f"{ours['losses']}, {name} {other['losses']}"
        )
    return max(differences)


def measure(bench: Bench) -> dict[str, Any]:
    """Tune, run alternately, check, and gather what the table shows."""
    args = bench.args
    micro = {side.name: fastest_micro_batch(bench, side) for side in SIDES}
    runs: dict[str, list[dict[str, Any]]] = {side.name: [] for side in SIDES}
    difference = 0.0
    for number in range(1, args.runs + 1):
        for side in SIDES:
            runs[side.name].append(bench.run(side, f"run-{number}", micro[side.name], args.pairs))
        for side in TRL_SIDES:
            pair = runs[OURS.name][-1], runs[side.name][-1]
            difference = max(difference, check_same_work(*pair, side.name, args.rtol))
    ours = runs[OURS.name]
    sides = {name: summarise(ours, found, micro[name]) for name, found in runs.items()}
    best = max((s.name for s in TRL_SIDES), key=lambda n: sides[n]["pairs_per_second"]["median"])
    return {
        **bench.facts,
        "pairs": args.pairs,
        "runs": args.runs,
        "threads": args.threads,
        "global_batch": args.global_batch,
        "lr": args.lr,
        "our_overrides": args.ours,
        "tokens": count_tokens(read_json(Path(ours[0]["tokens_file"]))),
        "sides": sides,
        "headline": {
            "against": best,
            "bar": BAR,
            **sides[best]["ratio"],
            "cpu": sides[best]["cpu_ratio"],
        },
        "largest_loss_difference": difference,
        "machine": machine(),
        "versions": {OURS.name: ours[0]["versions"], "TRL": runs[best][0]["versions"]},
        "driver_versions": versions(["torch", "transformers"]),
        "notes": notes(runs, args.threads),
    }


def notes(runs: dict[str, list[dict[str, Any]]], threads: int) -> list[str]:
    """What a reader should know before trusting the numbers."""
    found = [_PADDING_FREE]
    load = max(r["load_before"] for results in runs.values() for r in results)
    # A finished run of our own accounts for as many as it had threads.
    if load > threads + 1:
        found.append(f"the machine was busy: load {load:.1f} before a run; look at CPU s too")
    return found


def summarise(
    ours: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], micro_batch: int
) -> dict[str, Any]:
    """One side's speeds, parts and losses, and how many times faster we were in the same round."""
    ratios, cpu_ratios = (
        [b[kind] / a[kind] for a, b in zip(ours, found, strict=True)]
        for kind in ("seconds", "cpu_seconds")
    )
    parts = ("reference", "train")
    return {
        "micro_batch": micro_batch,
        "pairs_per_second": asdict(Spread.of([r["pairs_per_second"] for r in found])),
        "seconds": asdict(Spread.of([r["seconds"] for r in found])),
        "cpu_seconds": asdict(Spread.of([r["cpu_seconds"] for r in found])),
        "parts": {part: median(r["parts"][part] for r in found) for part in parts},
        "ratio": asdict(Spread.of(ratios)),
        "cpu_ratio": median(cpu_ratios),
        "losses": found[0]["losses"],
        "runs": [{k: v for k, v in r.items() if k != "versions"} for r in found],
    }


def count_tokens(tokens: Sequence[Sequence[Sequence[int]]]) -> dict[str, int]:
    """Tokens of all sequences (a prompt counts in both), and those whose log-probs count."""
    prompts, answers = (
        sum(2 * len(t[0]) for t in tokens),
        sum(len(t[1]) + len(t[2]) for t in tokens),
    )
    return {"sequences": prompts + answers, "answers": answers}


def report(found: dict[str, Any]) -> None:
    """The table, and below it what one needs to read it."""
    rows = []
    for name, side in found["sides"].items():
        speed, ratio = Spread(**side["pairs_per_second"]), Spread(**side["ratio"])
        is_ours = name == OURS.name
        rows.append(
            [
                name,
                side["micro_batch"],
                *speed.cells(),
                f"{side['seconds']['median']:.1f}",
                f"{side['cpu_seconds']['median']:.1f}",
                f"{side['parts']['reference']:.1f}" if side["parts"]["reference"] else "in steps",
                f"{side['losses'][0]:.5f}",
                f"{side['losses'][-1]:.5f}",
                *(("", "") if is_ours else ratio.cells()),
            ]
        )
    headline, tokens, machine_ = found["headline"], found["tokens"], found["machine"]
    console = Console(bars=False)
    console.table(
        f"DPO on {found['pairs']} pairs ({found['source']}), {found['threads']} threads, "
        f"median of {found['runs']}",
        (
            "side",
            "micro",
            "pairs/s",
            "range",
            "s",
            "CPU s",
            "ref. s",
            "first loss",
            "last loss",
            "ours x",
            "range",
        ),
        rows,
    )
    met = "met" if headline["median"] >= BAR else "NOT met"
    console.say(
        f"ours / {headline['against']} (the faster): {headline['median']:.2f} "
        f"({headline['min']:.2f} to {headline['max']:.2f}), in CPU time {headline['cpu']:.2f}; "
        f"bar {BAR}: {met}"
    )
    console.say(
        f"same token ids on both sides: {tokens['sequences']:,}, of answers {tokens['answers']:,}; "
        f"losses of all steps differ by at most {found['largest_loss_difference']:.1e}"
    )
    console.say(
        f"global batch {found['global_batch']}, fp32, AdamW, lr {found['lr']}, "
        + ", ".join(f"{name} {value}" for name, value in found["model"].items())
    )
    if found["our_overrides"]:
        console.say(f"our side with {' '.join(found['our_overrides'])}")
    for name, packages in found["versions"].items():
        console.say(f"{name}: " + ", ".join(f"{n} {v}" for n, v in packages.items()))
    console.say(f"{machine_['cpu']}, {machine_['cores']} cores")
    for note in found["notes"]:
        console.say(note)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--data", type=Path, help="JSON lines: prompt, chosen, rejected; without it, made up")
    add("--pairs", type=int, default=256, help="how many pairs to train on")
    add("--runs", type=int, default=5, help="measured runs of each side")
    add("--trl-python", type=Path, default=Path(".venv-bench/bin/python"))
    add("--work", type=Path, default=Path("runs/bench/dpo_vs_trl"), help="folder for everything")
    add("--json", type=Path, default=Path("runs/bench/dpo_vs_trl.json"))
    add("--micro-batches", type=int, nargs="+", default=[4, 8, 16], help="each side's candidates")
    add("--global-batch", type=int, default=32)
    add("--vocabulary", type=int, default=ModelSize.vocabulary)
    add("--max-length", type=int, default=ModelSize.max_length, help="longer pairs are left out")
    add("--lr", type=float, default=1e-4)
    add("--seed", type=int, default=7)
    add("--threads", type=int, default=2)
    add("--rtol", type=float, default=1e-3, help="largest relative difference of the losses")
    add("--limit", type=float, default=1800, help="seconds after which a child is stopped")
    add("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="more settings for our side")
    add(
        "--profile",
        action="store_true",
        help="torch's profile of our side, in its job's folder; slower",
    )
    args = parser.parse_args()
    if args.runs < 1:
        parser.error("--runs: expected 1 or more")
    args.work = args.work.resolve()
    # Not resolved: an environment's python is a link, and knows its packages by where that lies.
    args.trl_python = args.trl_python.absolute()
    args.size = ModelSize(vocabulary=args.vocabulary, max_length=args.max_length)
    return args


def main() -> None:
    args = arguments()
    try:
        found = measure(prepare(args))
    except (BenchmarkError, SelfPrefError) as error:
        sys.exit(f"error: {error}")
    write_json(args.json, found)
    report(found)


if __name__ == "__main__":
    main()
