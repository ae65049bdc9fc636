"""A run that was cut off on one process goes on over two, in every kind of layout: from the same
weights, copies and replay buffer, to the same steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_methods import STEPS, arguments, measured, training_stages, work, write_inputs

from nemo_selfpref.checkpoint.sharded import ShardReader
from nemo_selfpref.files import read_json
from nemo_selfpref.training.store import read_pairs

CASE = "self_augmented_po"
LAYOUTS = {
    "tensor": ["model.tensor_model_parallel_size=2"],
    "pipeline": ["model.pipeline_model_parallel_size=2"],
    "data": [],
    "sequence": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one/: on one process; two/LAYOUT/: cut after its first step and gone on with over two; back/:
    one of those, cut again and ended on one process."""
    made = tmp_path_factory.mktemp("resharded")
    write_inputs(made)
    alone = [arguments(made, "one", CASE)]
    together, back = [], []
    for name, layout in LAYOUTS.items():
        whole, cut = made / "one" / CASE, made / name / CASE
        alone.append(["cut", str(whole), str(cut)])
        together.append(arguments(made, name, CASE, "trainer.devices=2", *layout))
    back.append(["cut", str(made / "tensor" / CASE), str(made / "back" / CASE)])
    back.append(arguments(made, "back", CASE))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for commands, how in ((alone, ()), (together, launcher), (back, ())):
        path = made / "commands.json"
        path.write_text(json.dumps(commands))
        output = work(path, *how)
        (made / "output.txt").write_text(output)
    assert (made / "back" / CASE / "summary.json").is_file(), output
    return made


def step(folder: Path, kind: str, number: int) -> Path:
    (stage,) = training_stages(folder / kind / CASE)
    return stage / "checkpoints" / f"step-{number:06d}"


def tensors(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    reader = ShardReader(checkpoint / part)
    shapes = {name: reader.global_shape(name) for name in reader.names()}
    return {name: reader.read(name, (0,) * len(shape), shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", [*LAYOUTS, "back"])
def test_the_steps_are_those_of_one_process(folder: Path, kind: str) -> None:
    (ours,) = training_stages(folder / "one" / CASE)
    (theirs,) = training_stages(folder / kind / CASE)
    assert len(measured(theirs)) == STEPS
    for one, other in zip(measured(ours), measured(theirs), strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-3)
    # The first step was not made again.
    one, other = (step(folder, k, 1) / "checkpoint.json" for k in ("one", kind))
    assert one.stat().st_mtime_ns == other.stat().st_mtime_ns


@pytest.mark.parametrize("kind", LAYOUTS)
def test_weights_optimizer_and_copies_go_on_from_where_they_were(folder: Path, kind: str) -> None:
    # Had one of them started anew, it would be off by far more than rounding two steps later.
    last, mine = step(folder, "one", STEPS), step(folder, kind, STEPS)
    for part in ("weights", "copies/ema", "copies/lagged"):
        ours, theirs = tensors(last, part), tensors(mine, part)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            rows = len(value) if value.dim() else None  # a vocabulary is padded for two ranks
            torch.testing.assert_close(
                theirs[name][:rows] if rows else theirs[name], value, rtol=1e-3, atol=2e-4
            )
    moments = tensors(mine, "optimizer")
    assert moments and all(bool(torch.isfinite(value).all()) for value in moments.values())


@pytest.mark.parametrize("kind", [*LAYOUTS, "back"])
def test_the_replay_buffer_is_the_same(folder: Path, kind: str) -> None:
    ours, theirs = (step(folder, k, STEPS) / "rollouts" for k in ("one", kind))
    ids = [[pair.id for pair in read_pairs(path / "pairs.parquet")] for path in (ours, theirs)]
    assert ids[0] == ids[1] and ids[0]
    assert read_json(ours / "state.json")["maker"] == read_json(theirs / "state.json")["maker"]
