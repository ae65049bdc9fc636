"""The log-prob head against log-probs through materialised logits: peak memory, time and error.

    python benchmarks/logprob_head.py --json runs/logprob_head.json
    python benchmarks/logprob_head.py --device cuda --json runs/logprob_head.json

Each variant runs forward and backward in a process of its own. On the CPU, memory is the growth of
the resident set from before the first pass to its highest, inputs left out; on CUDA what the
allocator handed out. Errors are those of 64 tokens against float64. Materialised logits are run
for --materialised-tokens. `share` is a variant's peak over one float32 array of the logits of its
tokens, tokens x vocabulary x 4 bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from nemo_selfpref import __version__
from nemo_selfpref.files import write_json
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.objectives.logprobs import token_logprobs

_ERROR_TOKENS = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MATERIALISED = "materialised"


@dataclass(frozen=True)
class Case:
    """One variant at one size; travels to its process as JSON."""

    variant: str
    device: str
    dtype: str
    tokens: int
    vocab: int
    hidden: int
    chunk_size: int
    repeats: int

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.vocab * 4

    @property
    def backward_flops(self) -> int:
        """Two products for the gradients, and ours computes the logits again."""
        products = 2 if self.variant == _MATERIALISED else 3
        return 2 * products * self.tokens * self.vocab * self.hidden


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grad: Tensor
    sink: Tensor
    """float32 [V, H]: stands for Megatron's main_grad."""


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator(case.device).manual_seed(1)
    kind: dict[str, Any] = {"generator": generator, "device": case.device}
    hidden = torch.randn(case.tokens, case.hidden, **kind)
    weight = torch.randn(case.vocab, case.hidden, **kind).mul_(3 * case.hidden**-0.5)
    return Inputs(
        hidden.to(_DTYPES[case.dtype]).requires_grad_(),
        weight.to(_DTYPES[case.dtype]).requires_grad_(),
        torch.randint(case.vocab, (case.tokens,), **kind),
        torch.randn(case.tokens, **kind),
        torch.zeros(case.vocab, case.hidden, device=case.device),
    )


def forward(case: Case, x: Inputs) -> Tensor:
    if case.variant == _MATERIALISED:
        logits = (x.hidden @ x.weight.t()).float()
        return logits.log_softmax(-1).gather(1, x.targets[:, None])[:, 0]
    return token_logprobs(
        x.hidden,
        x.weight,
        x.targets,
        chunk_size=case.chunk_size,
        grad_sink=lambda: x.sink,
        backend=case.variant.removeprefix("ours "),
    )


def errors(case: Case) -> dict[str, float]:
    """Root mean square error of the log-probs, relative ones of the gradients' norms."""
    case = replace(case, tokens=_ERROR_TOKENS, chunk_size=_ERROR_TOKENS // 4)
    x = make_inputs(case)
    logprobs = forward(case, x)
    logprobs.backward(x.grad)
    assert x.hidden.grad is not None and x.weight.grad is not None
    got_weight = x.weight.grad if case.variant == _MATERIALISED else x.sink
    h, w = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
    exact = (h @ w.t()).log_softmax(-1).gather(1, x.targets[:, None])[:, 0]
    want_hidden, want_weight = torch.autograd.grad(exact, (h, w), x.grad.double())
    return {
        "logprob_rms": float((logprobs - exact).square().mean().sqrt()),
        "grad_hidden": float((x.hidden.grad - want_hidden).norm() / want_hidden.norm()),
        "grad_weight": float((got_weight - want_weight).norm() / want_weight.norm()),
    }


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _clock(device: str) -> Callable[[], float]:
    """Seconds between two calls of what is returned, the device's work done."""
    if device == "cpu":
        return time.perf_counter
    first = torch.cuda.Event(enable_timing=True)
    first.record()

    def now() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return first.elapsed_time(event) / 1000

    return now


def measure(case: Case) -> dict[str, float]:
    # Libraries load their code and threads their stacks before memory is counted.
    warm = replace(case, tokens=min(case.tokens, 32))
    small = make_inputs(warm)
    forward(warm, small).backward(small.grad)
    del small
    x = make_inputs(case)
    cpu = case.device == "cpu"
    if cpu:
        # What the warm-up freed goes back first, else the measured passes could live in it unseen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _resident("VmRSS")
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    now, times = _clock(case.device), []
    for _ in range(case.repeats):
        x.hidden.grad = x.weight.grad = None
        started = now()
        logprobs = forward(case, x)
        middle = now()
        logprobs.backward(x.grad)
        times.append((middle - started, now() - middle))
        del logprobs
    peak = _resident("VmHWM") if cpu else torch.cuda.max_memory_allocated()
    seconds_forward, seconds_backward = (median(column) for column in zip(*times, strict=True))
    return {
        "peak_bytes": peak - before,
        "seconds_forward": seconds_forward,
        "seconds_backward": seconds_backward,
        "backward_tflops": case.backward_flops / seconds_backward / 1e12,
    }


def run_child(case: Case) -> dict[str, Any]:
    """Measure `case` in a process of its own, and its errors in another."""
    found: dict[str, Any] = {}
    for task in ("measure", "errors"):
        command = [sys.executable, __file__, "--child", task, json.dumps(asdict(case))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{case.variant} ({task}) failed:\n{done.stderr[-3000:]}")
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def child(task: str, case: Case) -> None:
    print(json.dumps({"measure": measure, "errors": errors}[task](case)))


def versions(device: str) -> dict[str, Any]:
    return {
        "nemo_selfpref": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def cases(args: argparse.Namespace) -> list[Case]:
    ours = ["ours torch"]
    if args.device == "cuda" and find_spec("triton") is not None:
        ours.append("ours triton")
    sizes = {name: getattr(args, name) for name in ("tokens", "vocab", "hidden", "chunk_size")}
    shared = {"device": args.device, "dtype": args.dtype, "repeats": args.repeats, **sizes}
    found = [Case(variant=variant, **shared) for variant in ours]
    if args.materialised_tokens:
        tokens = min(args.materialised_tokens, args.tokens)
        found.append(Case(variant=_MATERIALISED, **{**shared, "tokens": tokens}))
    return found


def report(results: list[dict[str, Any]], about: dict[str, Any], full: Case) -> None:
    console = Console()
    rows = [
        [
            r["variant"],
            r["tokens"],
            f"{r['peak_bytes'] / 1e6:,.0f}",
            f"{r['share']:.3f}",
            f"{r['seconds_forward']:.3f}",
            f"{r['seconds_backward']:.3f}",
            f"{r['backward_tflops']:.3f}",
            f"{r['logprob_rms']:.1e}",
            f"{r['grad_hidden']:.1e}",
            f"{r['grad_weight']:.1e}",
        ]
        for r in results
    ]
    columns = ("variant", "tokens", "peak MB", "share", "forward s", "backward s")
    columns += ("backward TFLOP/s", "rms error", "dH error", "dW error")
    console.table("Log-prob head: peak over inputs; share of float32 logits", columns, rows)
    console.say(
        f"Vocabulary {full.vocab}, hidden {full.hidden}, {full.dtype}, chunks of "
        f"{full.chunk_size} tokens. Float32 logits of {full.tokens} tokens take "
        f"{full.logits_bytes / 1e6:,.0f} MB (computed), their gradient as much again."
    )
    if results[-1]["variant"] == _MATERIALISED:
        ratio = results[-1]["share"] / results[0]["share"]
        console.say(f"Materialised logits take {ratio:.1f} times the share of {full.variant}.")
    console.say(", ".join(f"{name} {value}" for name, value in about.items()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="float32; on cuda bfloat16")
    parser.add_argument("--tokens", type=int, help="16384; on cuda 8192")
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--hidden", type=int, help="64; on cuda 4096")
    parser.add_argument("--chunk-size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, help="passes to take the median of: 1; on cuda 5")
    parser.add_argument(
        "--materialised-tokens", type=int, help="2048; on cuda as many as --tokens; 0 for none"
    )
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    cpu = args.device == "cpu"
    defaults = {
        "dtype": "float32" if cpu else "bfloat16",
        "tokens": 16384 if cpu else 8192,
        "hidden": 64 if cpu else 4096,
        "repeats": 1 if cpu else 5,
        "materialised_tokens": 2048 if cpu else 8192,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    args = parse()
    if args.child:
        child(args.child[0], Case(**json.loads(args.child[1])))
        return
    wanted = cases(args)
    results = []
    for case in wanted:
        found = run_child(case)
        share = found["peak_bytes"] / case.logits_bytes
        results.append({**asdict(case), "logits_bytes": case.logits_bytes, "share": share, **found})
    about = versions(args.device)
    if args.json:
        write_json(args.json, {"versions": about, "results": results})
    report(results, about, wanted[0])


if __name__ == "__main__":
    main()
