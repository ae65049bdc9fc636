"""Adapters under every kind of layout against one process: where they start, loss, scores,
gradients, the clipped step, decoding after it, and what each layout reads of another's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_selfpref.checkpoint.sharded import ShardReader

WORKER = Path(__file__).parent / "lora_worker.py"
LAYOUTS = ("tp=2", "tp=2,sp=1", "pp=2", "tp=2,sp=1,recompute=1", "pp=2,vpp=2", "cp=2")
LORA_B = "decoder.layers.1.mlp.linear_fc1.lora_b"


def run(processes: int, *arguments: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(WORKER), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each layout's results; one process group serves all two-process layouts."""
    out = tmp_path_factory.mktemp("adapters")
    run(1, str(llama_folder), str(out / "one"), "one")
    run(2, str(llama_folder), str(out / "two"), *LAYOUTS)
    return {"one": out / "one" / "one", **{name: out / "two" / name for name in LAYOUTS}}


def found(folder: Path) -> dict:
    return json.loads((folder / "found.json").read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All global tensors of a folder of shards."""
    reader = ShardReader(folder)
    shapes = {name: reader.global_shape(name) for name in reader.names()}
    return {name: reader.read(name, (0,) * len(s), s) for name, s in shapes.items()}


def assert_close(ours: Path, theirs: Path, tolerance: float) -> None:
    one, two = tensors(ours), tensors(theirs)
    assert one.keys() == two.keys()
    for name in one:
        # Beyond 500 rows is the padding of a split vocabulary.
        got, want = two[name][:500], one[name][:500]
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_from_the_same_adapters(results: dict[str, Path], layout: str) -> None:
    assert_close(results["one"] / "fresh", results[layout] / "fresh", 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_scores(results: dict[str, Path], layout: str) -> None:
    ours, theirs = found(results["one"]), found(results[layout])
    assert theirs["metrics"] == pytest.approx(ours["metrics"], abs=2e-4, rel=1e-5)
    for name in ("scores", "frozen"):
        assert theirs[name] == pytest.approx(ours[name], abs=2e-4)
    assert ours["frozen"] == pytest.approx(ours["scores"], abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_the_adapters(results: dict[str, Path], layout: str) -> None:
    assert_close(results["one"] / "gradients", results[layout] / "gradients", 2e-5)
    gradients = tensors(results[layout] / "gradients")
    assert len(gradients) == 4 * 4 * 2  # layers, targets, A and B
    assert all(float(g.abs().max()) > 1e-4 for g in gradients.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_clipped_step_and_decoding_after_it(results: dict[str, Path], layout: str) -> None:
    one, other = results["one"], results[layout]
    assert found(other)["norm"] == pytest.approx(found(one)["norm"], rel=1e-4)
    assert_close(one / "stepped", other / "stepped", 1e-5)
    moved = tensors(one / "stepped")[LORA_B] - tensors(one / "fresh")[LORA_B]
    assert float(moved.abs().max()) > 1e-2
    ours, theirs = (json.loads((f / "logits.json").read_text()) for f in (one, other))
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=0, atol=5e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_reads_what_another_wrote(results: dict[str, Path], layout: str) -> None:
    wrote = results[LAYOUTS[0]]
    assert_close(wrote / "stepped", results[layout] / "read", 0.0)
    assert_close(wrote / "gradients", results[layout] / "gradients-read", 0.0)
