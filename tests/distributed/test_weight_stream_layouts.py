"""Weights streamed out of every kind of layout are those of a single process, bit for bit, and an
error on one rank is raised by all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_llama
from tiny_mixtral import save_mixtral

from nemo_selfpref.rollout.serving.manifest import read_manifest, verify_files

WORKER = Path(__file__).parent / "stream_worker.py"
SUITES: dict[str, dict[int, tuple[str, ...]]] = {
    "untied": {
        1: ("one", "lora=1"),
        2: (
            *("tp=2", "tp=2,sp=1", "pp=2", "pp=2,vpp=2", "one", "dist=1", "cp=2"),
            *("tp=2,sp=1,lora=1", "pp=2,lora=1", "dist=1,lora=1"),
        ),
        4: ("tp=2,pp=2,sp=1", "tp=2,sp=1,dist=1", "pp=2,vpp=2,cp=2"),
    },
    "experts": {1: ("one",), 2: ("ep=2", "tp=2,sp=1", "tp=2,sp=1,ep=2", "pp=2", "ep=2,dist=1")},
    "odd": {1: ("one",), 2: ("tp=2", "pp=2"), 4: ("tp=2,pp=2",)},
}
CASES = [
    pytest.param(
        (model, processes, layout),
        id=f"{model}-{processes}-{layout}",
        marks=[pytest.mark.slow, pytest.mark.long] if processes > 2 else [],
    )
    for model, by_processes in SUITES.items()
    for processes, layouts in by_processes.items()
    for layout in layouts
    if processes > 1
]
Pair = tuple[Path, Path]
"""Folders of one process' results and of a layout's."""


def run(processes: int, *arguments: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(WORKER), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(
    llama_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int, str], Pair]:
    """Makes results when first asked; one process group serves all layouts of its size. "odd" has
    a tied embedding of 501 rows, which tensor parallelism pads."""
    out = tmp_path_factory.mktemp("streams")
    odd = save_llama(out / "odd-model", seed=1, tie_word_embeddings=True, vocab_size=501)
    folders = {"untied": llama_folder, "odd": odd, "experts": save_mixtral(out / "experts-model")}
    made: set[tuple[str, int]] = set()

    def made_by(model: str, processes: int) -> Path:
        target = out / model / str(processes)
        if (model, processes) not in made:
            run(processes, str(folders[model]), str(target), *SUITES[model][processes])
            made.add((model, processes))
        return target

    def get(model: str, processes: int, layout: str) -> Pair:
        one = made_by(model, 1) / ("lora=1" if "lora=1" in layout else "one")
        return one, made_by(model, processes) / layout

    return get


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, results: Callable[[str, int, str], Pair]) -> Pair:
    return results(*request.param)


def found(folder: Path) -> list[dict]:
    """What every rank saw, in rank order."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("found-*.json"))]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def test_every_set_is_that_of_one_process(pair: Pair) -> None:
    """The policy, a copy, and an average that the distributed optimizer splits."""
    seen = []
    for name in ("policy-3-1", "ema-3-2", "frozen-0-3", "model"):
        part = name if name == "model" else f"weights/{name}"
        ours, theirs = (tensors(folder / part) for folder in pair)
        assert ours.keys() == theirs.keys() and len(ours) > 30
        for key, tensor in ours.items():
            assert torch.equal(theirs[key], tensor), (name, key)
        seen.append(ours["model.layers.3.self_attn.v_proj.weight"])
    policy, ema, frozen, model = seen
    assert torch.equal(policy, model)
    assert not torch.equal(policy, ema) and not torch.equal(ema, frozen)


def test_stamps_and_probes(pair: Pair) -> None:
    """Every rank has the same stamp; the probe is that of one process."""
    one, *_ = found(pair[0])
    for rank in found(pair[1]):
        assert rank["stamps"] == one["stamps"] and rank["last"] == one["last"]
    for name in ("ema-3-2", "frozen-0-3"):
        ours, theirs = (read_manifest(folder / "weights" / name) for folder in pair)
        assert ours.probe is not None and theirs.probe is not None
        assert theirs.probe.logprob == pytest.approx(ours.probe.logprob, abs=2e-3)
        verify_files(pair[1] / "weights" / name, theirs)


def test_an_error_is_raised_by_every_rank(pair: Pair) -> None:
    ranks = found(pair[1])
    assert len(ranks) == int(pair[1].parent.name)
    for rank in ranks:
        errors = rank["errors"]
        assert errors == ranks[0]["errors"]
        assert "refused at the server: 3" in errors["refused"]
        assert "cannot be written" in errors["unwritable"]
        assert "not finite" in errors["not finite"]
        assert "file" in errors["model"] and errors["model"] != "no error"
    assert ranks[0]["names"][-1].startswith("policy-3-")
