"""Every parallel layout against one process: losses, metrics, every gradient, the optimizer's step,
scores, sampled tokens and averaged weights. Float32; 13 rows in micro-batches of 3, so nothing
divides evenly. Layouts are written as worker.py reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemo_selfpref.checkpoint.sharded import ShardReader

WORKER = Path(__file__).parent / "worker.py"
ONE = "one"
DP = "one"
"""The same settings on more processes are data parallelism."""
SUITES: dict[str, dict[int, tuple[str, ...]]] = {
    "untied": {
        1: ("share=1", "tokens=128", "share=1,tokens=128", "recompute=1"),
        2: ("tp=2", "tp=2,sp=1", "pp=2", "pp=2,vpp=2", "cp=2", "cp=2,share=1", DP, "dist=1"),
    },
    "tied": {2: ("tp=2,sp=1", "pp=2", "pp=2,vpp=2", "cp=2", DP)},
    "experts": {2: ("ep=2", "tp=2,sp=1", "tp=2,sp=1,ep=2", "cp=2,ep=2", "pp=2", "ep=2,dist=1")},
}
MIXTURES: dict[str, dict[int, tuple[str, ...]]] = {
    "untied": {
        4: ("tp=2,pp=2,sp=1", "tp=2,cp=2,sp=1", "pp=2,vpp=2,cp=2", "tp=2,sp=1,dist=1"),
        8: ("tp=2,pp=2,cp=2,sp=1", "tp=2,pp=2,vpp=2,sp=1,dist=1,share=1,tokens=128"),
    },
    "experts": {4: ("ep=2,pp=2", "ep=4,dist=1"), 8: ("tp=2,pp=2,ep=2,sp=1", "cp=2,ep=4,dist=1")},
}
LOSSES = ("sft", "dpo", "cdpo", "ipo", "spce", "sr_dpo", "sr_ipo", "orpo")
# Sums over 13 rows of up to 14 tokens, each log-prob near -6: float32 keeps 1e-6 of 1e2.
METRIC_TOLERANCE = 2e-4
GRADIENT_TOLERANCE = 2e-5


def run(processes: int, *arguments: str, cuda: bool = False) -> None:
    command = [sys.executable, str(WORKER), *arguments]
    if processes > 1:
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
        command = [sys.executable, *launcher, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def cases(suites: dict[str, dict[int, tuple[str, ...]]]) -> list[tuple[str, int, str]]:
    return [
        (model, processes, layout)
        for model, by_processes in suites.items()
        for processes, layouts in by_processes.items()
        for layout in layouts
    ]


CASES = [
    *(pytest.param(case, id="-".join(map(str, case))) for case in cases(SUITES)),
    *(
        pytest.param(
            case,
            id="-".join(map(str, case)),
            marks=[pytest.mark.slow, *([pytest.mark.long] if case[1] > 2 else [])],
        )
        for case in cases(MIXTURES)
    ),
]

Pair = tuple[Path, Path]
"""Folders of one process' results and of a layout's."""


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int, str], Pair]:
    """Makes results when first asked; one process group serves all layouts of its size."""
    out = tmp_path_factory.mktemp("layouts")
    made: set[tuple[str, int, bool]] = set()

    def folder_of(model: str) -> str:
        names = {"untied": "llama_folder", "tied": "tied_folder"}
        return str(request.getfixturevalue(names[model])) if model in names else model

    def get(model: str, processes: int, layout: str) -> Pair:
        if (model, 1, False) not in made:
            run(1, folder_of(model), str(out / model / "1"), ONE, *SUITES[model].get(1, ()))
            made.add((model, 1, False))
        suite = SUITES if layout in SUITES[model].get(processes, ()) else MIXTURES
        if (model, processes, suite is MIXTURES) not in made and processes > 1:
            target = str(out / model / str(processes))
            run(processes, folder_of(model), target, *suite[model][processes])
            made.add((model, processes, suite is MIXTURES))
        return out / model / "1" / ONE, out / model / str(processes) / layout

    return get


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, results: Callable[[str, int, str], Pair]) -> Pair:
    return results(*request.param)


def found(folder: Path) -> dict:
    return json.loads((folder / "found.json").read_text())


def worst_difference(ours: Path, theirs: Path) -> float:
    one, two = ShardReader(ours), ShardReader(theirs)
    worst = 0.0
    for key in one.names():
        shape = one.global_shape(key)
        zero = (0,) * len(shape)
        difference = one.read(key, zero, shape) - two.read(key, zero, shape)
        worst = max(worst, float(difference.abs().max()))
    return worst


def test_losses_and_metrics(pair: Pair) -> None:
    ours, theirs = (found(folder)["losses"] for folder in pair)
    for name in LOSSES:
        assert ours[name].keys() == theirs[name].keys()
        for metric, value in ours[name].items():
            assert theirs[name][metric] == pytest.approx(value, abs=METRIC_TOLERANCE, rel=1e-5), (
                f"{name} {metric}"
            )


def test_every_gradient(pair: Pair) -> None:
    if "dist=1" in pair[1].name:
        pytest.skip("each replica has its share of the gradients; see the step below")
    for loss in LOSSES:
        worst = worst_difference(*(folder / f"grad-{loss}" for folder in pair))
        assert worst < GRADIENT_TOLERANCE * (10 if loss in ("ipo", "sr_ipo") else 1), loss


def test_tokens_computed(pair: Pair) -> None:
    """Padding is not counted; a shared prompt is, once."""
    one, other = (found(folder)["tokens"] for folder in pair)
    for loss, count in one.items():
        # Demonstrations have a prompt each; a pair's answers have one between them.
        shared = "share=1" in pair[1].name and loss != "sft"
        assert other[loss] < count if shared else other[loss] == count, loss


def test_gradient_norm_and_clipped_step(pair: Pair) -> None:
    one, other = (found(folder)["norms"] for folder in pair)
    assert other == pytest.approx(one, rel=1e-4)
    # Adam's first step moves every weight by lr * sign(g): where g is rounding noise the sign is
    # too, so compare the mean movement, which such weights cannot hide a wrong gradient in.
    first, second = (ShardReader(folder / "stepped") for folder in pair)
    for key in first.names():
        shape = first.global_shape(key)
        zero = (0,) * len(shape)
        gap = (first.read(key, zero, shape) - second.read(key, zero, shape)).abs()
        assert float((gap > 1e-4).float().mean()) < 0.02, key


def test_scores_and_sampled_tokens(pair: Pair) -> None:
    one, other = (found(folder) for folder in pair)
    tokens = zip(other["token_logprobs"], one["token_logprobs"], other["scores"][0], strict=True)
    for ours, expected, total in tokens:
        assert ours == pytest.approx(expected, abs=1e-4)
        assert sum(ours) == pytest.approx(total, abs=2e-4)
    for name in ("scores", "labels"):  # of the policy, of the EMA
        assert torch.tensor(other[name]) == pytest.approx(torch.tensor(one[name]), abs=2e-4), name
    assert other["generated"] == one["generated"]
    assert one["generated"][0] != one["generated"][1]


def test_averaged_weights(pair: Pair) -> None:
    """As written by each layout, and as read from what another wrote."""
    for name in ("ema", "ema-read"):
        assert worst_difference(pair[0] / "ema", pair[1] / name) == 0.0
    # (0.25 + 0.75 / 2) w = 5/8 w
    ema, stepped = ShardReader(pair[1] / "ema"), ShardReader(pair[1] / "stepped")
    key, zero = "decoder.layers.0.self_attention.linear_qkv.weight", (0, 0)
    shape = ema.global_shape(key)
    before = stepped.read(key, zero, shape)
    torch.testing.assert_close(ema.read(key, zero, shape), 0.625 * before, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none answers here")
def test_cuda_against_cpu(llama_folder: Path, tmp_path: Path) -> None:
    """The same worker on the GPU and, with the GPU hidden, on the CPU."""
    run(1, str(llama_folder), str(tmp_path / "cpu"), ONE)
    run(1, str(llama_folder), str(tmp_path / "cuda"), ONE, cuda=True)
    cpu, cuda = tmp_path / "cpu" / ONE, tmp_path / "cuda" / ONE
    for name in LOSSES:
        assert found(cuda)["losses"][name]["loss"] == pytest.approx(
            found(cpu)["losses"][name]["loss"], rel=1e-3
        )
        assert worst_difference(cpu / f"grad-{name}", cuda / f"grad-{name}") < 5e-3
    assert found(cuda)["norms"] == pytest.approx(found(cpu)["norms"], rel=5e-3)
