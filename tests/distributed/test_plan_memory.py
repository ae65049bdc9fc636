"""What `selfpref plan` says of memory, against real tensors: weights, gradients, optimizer state
and copies to the byte; activations, and all that a step allocates, within a tenth. Small models,
one process and two; cases are written as plan_worker.py reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "plan_worker.py"
CASES = {
    1: ("one", "bf16=1", "bf16=1,recompute=2", "tied=1,rmsprop=1"),
    2: ("tp=2", "tp=2,sp=1,bf16=1", "dist=1", "dist=1,bf16=1"),
}
MORE = {
    1: ("recompute=1", "bf16=1,lora=8", "experts=1", "bias=1", "qknorm=1", "bias=1,lora=4"),
    2: (
        "pp=2",
        "pp=2,tied=1,dist=1",
        "pp=2,vpp=2",
        "cp=2",
        "ep=2,experts=1,dist=1",
        "dist=1,lora=8",
    ),
}
EXACT = ("weights", "gradients", "optimizer", "ema", "lagged")
NEAR = ("activations", "step")
TOLERANCE = 0.1
Ranks = list[dict]


def run(processes: int, out: Path, cases: tuple[str, ...]) -> None:
    command = [sys.executable, str(WORKER), str(out), *cases]
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, "-m", *launcher, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Ranks]:
    """Facts of each rank; one process group serves all cases of its size."""
    out, made = tmp_path_factory.mktemp("plan"), set()

    def get(processes: int, case: str) -> Ranks:
        suite = CASES if case in CASES[processes] else MORE
        folder = out / str(processes)
        if (processes, case) not in made:
            folder.mkdir(exist_ok=True)
            run(processes, folder, suite[processes])
            made.update((processes, name) for name in suite[processes])
        return json.loads((folder / f"{case}.json").read_text())

    return get


@pytest.fixture(
    params=[
        *(
            pytest.param((n, case), id=f"{n}-{case}")
            for n, cases in CASES.items()
            for case in cases
        ),
        *(
            pytest.param((n, case), id=f"{n}-{case}", marks=[pytest.mark.slow, pytest.mark.long])
            for n, cases in MORE.items()
            for case in cases
        ),
    ]
)
def stages(
    request: pytest.FixtureRequest, measured: Callable[[int, str], Ranks]
) -> list[tuple[dict, dict]]:
    """(the most that any rank of the stage really has, the plan's lines), by pipeline stage."""
    ranks = measured(*request.param)
    found = []
    for stage in sorted({rank["stage"] for rank in ranks}):
        own = [rank for rank in ranks if rank["stage"] == stage]
        real = {name: max(rank["real"][name] for rank in own) for name in own[0]["real"]}
        found.append((real, own[0]["plan"]))
        for name, value in real.items():
            error = own[0]["plan"][name] / value - 1
            print(f"stage {stage} {name}: {value:,} bytes, planned {error:+.2%}")
    return found


def test_what_stays_is_counted_to_the_byte(stages: list[tuple[dict, dict]]) -> None:
    for real, plan in stages:
        assert {n: plan[n] for n in EXACT} == {n: real[n] for n in EXACT}


def test_a_step_within_a_tenth(stages: list[tuple[dict, dict]]) -> None:
    """activations: what autograd keeps, at its most; step: whatever a step allocates, at its most,
    the log-prob head's logits and gradients on their way among it."""
    for real, plan in stages:
        for name in NEAR:
            assert plan[name] == pytest.approx(real[name], rel=TOLERANCE), name


def test_a_saves_copy_in_host_memory(stages: list[tuple[dict, dict]]) -> None:
    """To the byte on the first stage; the last does not save an embedding it shares with it."""
    (real, plan), *others = stages
    assert plan["snapshot"] == real["snapshot"]
    for real, plan in others:
        assert plan["snapshot"] >= real["snapshot"] > 0
