"""Every parallel layout against one process: losses, metrics, every gradient, the optimizer's step,
scores, sampled tokens and averaged weights. Float32; 13 rows in micro-batches of 3, so nothing
divides evenly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_selfpref.checkpoint.sharded import ShardReader

WORKER = Path(__file__).parent / "worker.py"
ONE = "1,1,0"
LAYOUTS = {"TP=2": "2,1,0", "TP=2 SP": "2,1,1", "PP=2": "1,2,0", "DP=2": "1,1,0"}
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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module", params=["untied", "tied"])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Folder of each layout's results; one process group serves all two-process layouts."""
    folder = request.getfixturevalue("llama_folder" if request.param == "untied" else "tied_folder")
    out = tmp_path_factory.mktemp("layouts")
    run(1, str(folder), str(out / "one"), ONE)
    run(2, str(folder), str(out / "two"), *LAYOUTS.values())
    found = {name: out / "two" / text for name, text in LAYOUTS.items()}
    return {"one": out / "one" / ONE, **found}


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_metrics(results: dict[str, Path], layout: str) -> None:
    ours, theirs = found(results["one"])["losses"], found(results[layout])["losses"]
    for name in LOSSES:
        assert ours[name].keys() == theirs[name].keys()
        for metric, value in ours[name].items():
            assert theirs[name][metric] == pytest.approx(value, abs=METRIC_TOLERANCE, rel=1e-5), (
                f"{name} {metric}"
            )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(results: dict[str, Path], layout: str, loss: str) -> None:
    one, other = results["one"] / f"grad-{loss}", results[layout] / f"grad-{loss}"
    assert worst_difference(one, other) < GRADIENT_TOLERANCE * (
        10 if loss in ("ipo", "sr_ipo") else 1
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_norm_and_clipped_step(results: dict[str, Path], layout: str) -> None:
    one, other = found(results["one"])["norms"], found(results[layout])["norms"]
    assert other == pytest.approx(one, rel=1e-4)
    # Adam's first step moves every weight by lr * sign(g): where g is rounding noise the sign is
    # too, so compare the mean movement, which such weights cannot hide a wrong gradient in.
    first, second = (
        ShardReader(results["one"] / "stepped"),
        ShardReader(results[layout] / "stepped"),
    )
    for key in first.names():
        shape = first.global_shape(key)
        zero = (0,) * len(shape)
        gap = (first.read(key, zero, shape) - second.read(key, zero, shape)).abs()
        assert float((gap > 1e-4).float().mean()) < 0.02, key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_sampled_tokens(results: dict[str, Path], layout: str) -> None:
    one, other = found(results["one"]), found(results[layout])
    for name in ("scores", "labels"):  # of the policy, of the EMA
        assert torch.tensor(other[name]) == pytest.approx(torch.tensor(one[name]), abs=2e-4), name
    assert other["generated"] == one["generated"]
    assert one["generated"][0] != one["generated"][1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_averaged_weights(results: dict[str, Path], layout: str) -> None:
    """As written by each layout, and as read from what another wrote."""
    for name in ("ema", "ema-read"):
        assert worst_difference(results["one"] / "ema", results[layout] / name) == 0.0
    # (0.25 + 0.75 / 2) w = 5/8 w
    ema, stepped = ShardReader(results[layout] / "ema"), ShardReader(results[layout] / "stepped")
    key, zero = "decoder.layers.0.mlp.linear_fc1.weight", (0, 0)
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
