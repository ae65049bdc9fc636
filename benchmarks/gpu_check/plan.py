"""The checks in their order, how long each takes on an H100, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One check: `function` ("module:name") is called in a process of its own."""

    name: str
    seconds: float
    function: str
    about: str
    needs: tuple[str, ...] = ("cuda",)
    toy_needs: tuple[str, ...] | None = ()
    """What its tiny form on the CPU needs; None where there is none."""
    correctness: bool = False
    """Whether its failing says that something is wrong, rather than slow."""

    @property
    def limit(self) -> float:
        """Seconds after which it is stopped. An estimate may be out by as much again."""
        return 2 * self.seconds + 30


_HERE = "benchmarks.gpu_check."
_MODEL = ("torch", "megatron", "omegaconf")
_LLAMA = (*_MODEL, "transformers")

CHECKS = (
    Check(
        "versions",
        10,
        _HERE + "smoke:versions",
        "device and versions",
        needs=(),
    ),
    Check(
        "fp8-linear",
        25,
        _HERE + "smoke:fp8_linear",
        "Transformer Engine: an FP8 linear layer, three recipes",
        needs=("cuda", "te"),
        toy_needs=None,
        correctness=True,
    ),
    Check(
        "worker",
        60,
        _HERE + "own_tests:worker",
        "losses and gradients, CPU against CUDA",
        needs=("cuda", *_LLAMA, "pytest"),
        toy_needs=(*_LLAMA, "pytest"),
        correctness=True,
    ),
    Check(
        "first-loss",
        40,
        _HERE + "first_loss:first_loss",
        "DPO loss of step 0 is log 2: bf16, then FP8",
        needs=("cuda", *_MODEL),
        toy_needs=_MODEL,
        correctness=True,
    ),
    Check(
        "attention",
        60,
        _HERE + "attention:backends",
        "sdpa and flex against float64, shared prompts too",
        needs=("cuda", *_MODEL),
        toy_needs=_MODEL,
        correctness=True,
    ),
    Check(
        "head",
        80,
        _HERE + "head:head",
        "log-prob head: TFLOP/s, memory, errors; Liger beside it",
        needs=("cuda", "torch", "rich"),
        toy_needs=("torch", "rich"),
    ),
    Check(
        "fp8-speed",
        75,
        _HERE + "steps:fp8_speed",
        "training step of a 1.35B Llama, BF16 and FP8: tokens/s, MFU",
        needs=("cuda", *_MODEL),
        toy_needs=_MODEL,
    ),
    Check(
        "packed-dpo",
        120,
        _HERE + "packed:against_trl",
        "DPO pairs/s of a 0.5B Llama, ours and TRL with Liger",
        needs=("cuda", *_LLAMA),
        toy_needs=_LLAMA,
    ),
    Check(
        "decode",
        25,
        _HERE + "decode:speed",
        "tokens/s of the embedded engine",
        needs=("cuda", *_MODEL),
        toy_needs=_MODEL,
    ),
    Check(
        "recompute",
        35,
        _HERE + "steps:recompute",
        "peak memory of a DPO step by recompute_granularity",
        needs=("cuda", *_MODEL),
        toy_needs=_MODEL,
    ),
)


def missing(check: Check, lacks: dict[str, str], toy: bool) -> str:
    """Why a check cannot run here; empty where it can. lacks: what is absent, and why."""
    needs = check.toy_needs if toy else check.needs
    if needs is None:
        return "has no form for a CPU"
    return "; ".join(f"{name}: {lacks[name]}" for name in needs if name in lacks)
