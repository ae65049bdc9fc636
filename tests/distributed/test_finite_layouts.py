"""Numbers that are not finite are found and traced alike under every layout, by all ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "nonfinite_worker.py"
ROW, WEIGHT = 8, "decoder.layers.3.mlp.linear_fc2.weight"
LAYOUTS = ("one", "dist=1", "tp=2,sp=1", "pp=2", "pp=2,vpp=2", "cp=2")
"""On two processes "one" is two replicas."""
REPLICATED = ("one", "dist=1")
LAST_STAGE = ("pp=2", "pp=2,vpp=2")
FINDERS = {"one": [0], "dist=1": [0]} | {name: [1] for name in LAST_STAGE}
"""The ranks that see row 8's loss: the replica that has it, or the stage with the loss."""


@pytest.fixture(scope="module")
def found(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What each layout found; one process group serves them all."""
    out = tmp_path_factory.mktemp("nonfinite")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(WORKER), str(llama_folder), str(out), *LAYOUTS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {name: json.loads((out / f"{name}.json").read_text()) for name in LAYOUTS}


def place(layout: str) -> list[int]:
    """Where row 8 is, in micro-batches of three: with two replicas dealt round it is the fifth row
    of replica 0 (0, 2, 4 | 6, 8, 10 | 12), with one the ninth of all (..., 6, 7, 8 | ...)."""
    return [0, 1] if layout in REPLICATED else [0, 2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_good_step_is_finite(found: dict[str, dict], layout: str) -> None:
    assert found[layout]["good"] is True and found[layout]["clean"] == []


@pytest.mark.parametrize("kind", ["passes", "loss", "gradient"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_found(found: dict[str, dict], layout: str, kind: str) -> None:
    fault = found[layout][kind]
    assert fault["finite"] is False and fault["kind"] == kind
    assert fault["rows"] == [ROW] and fault["micro_batches"] == [place(layout)]
    assert fault["tensors"] == []
    assert fault["passes"] == ([["reference", [ROW]]] if kind == "passes" else [])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_that_see_it(found: dict[str, dict], layout: str) -> None:
    assert found[layout]["loss"]["ranks"] == FINDERS.get(layout, [0, 1])
    # A gradient runs back through all stages; the chosen answer of the third row of three lies in
    # the middle of a micro-batch's six sequences, whose middle is the second context rank's.
    ranks = {"one": [0], "dist=1": [0], "cp=2": [1]}.get(layout, [0, 1])
    assert found[layout]["gradient"]["ranks"] == ranks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_is_found_by_its_name_in_a_checkpoint(found: dict[str, dict], layout: str) -> None:
    """Under a split of tensors or layers one rank alone holds it."""
    ranks = {"tp=2,sp=1": [0], **{name: [1] for name in LAST_STAGE}}.get(layout, [0, 1])
    fault = found[layout]["weights"]
    assert fault["kind"] == "weights" and fault["finite"] is False
    assert fault["tensors"] == [WEIGHT] and fault["ranks"] == ranks
