"""python -m benchmarks.gpu_check: see the package."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.gpu_check import __doc__ as about
from benchmarks.gpu_check.job import ROOT
from benchmarks.gpu_check.plan import CHECKS
from benchmarks.gpu_check.runner import Options, exit_status, planned, probe, run_all
from benchmarks.gpu_check.show import show_outcomes, show_plan


def arguments() -> argparse.Namespace:
    names = [check.name for check in CHECKS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # A machine that hands back one folder names it so.
    out = os.environ.get("OUT") or "runs/gpu-check"
    add(
        "--out", type=Path, default=Path(out), help="folder of the results; $OUT, or runs/gpu-check"
    )
    add("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    add("--budget", type=float, default=540, help="seconds; later checks that do not fit are left")
    add("--trl-python", default=_trl_python(), help="the interpreter that has TRL")
    add("--dry-run", action="store_true", help="show the plan and stop")
    add("--toy", action="store_true", help="tiny sizes on the CPU; the timings mean nothing")
    return parser.parse_args()


def _trl_python() -> str:
    """That of the benchmarks' environment where it is there, else our own."""
    own = ROOT / ".venv-bench" / "bin" / "python"
    return str(own) if own.exists() else sys.executable


def main() -> int:
    args = arguments()
    chosen = [check for check in CHECKS if not args.only or check.name in args.only]
    plan = planned(chosen, probe(args.toy), args.toy, args.budget)
    show_plan(plan, args.budget)
    if args.dry_run:
        return 0
    options = Options(args.out.resolve(), args.toy, args.budget, args.trl_python)
    outcomes = run_all(
        plan,
        options,
        lambda o: print(f"{o.check.name}: {o.status}, {o.seconds:.0f} s", flush=True),
    )
    show_outcomes(outcomes)
    print(f"results: {options.out / 'summary.json'}")
    return exit_status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
