"""Which checkpoint a stage goes on from, and which are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from saving import save_into

from nemo_selfpref.checkpoint.folders import FACTS, FORMAT, FORMAT_VERSION, checkpoints_of
from nemo_selfpref.checkpoint.snapshot import Snapshot
from nemo_selfpref.config.schema import CheckpointParams, DamagedCheckpoint, MonitorMode
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.training.checkpoints import StageCheckpoints


@pytest.fixture(autouse=True)
def joined(policy: Policy) -> None:
    """The process group, which the policy has joined."""


def holding(step: int, loss: float = 0.0) -> Snapshot:
    snapshot = Snapshot()
    snapshot.add_json(
        FACTS, {"format": FORMAT, "version": FORMAT_VERSION, "metrics": {"loss": loss}}
    )
    snapshot.add_json("step.json", step)
    return snapshot


class Stage:
    def __init__(self, folder: Path, **params: object) -> None:
        self.said: list[str] = []
        settings = CheckpointParams(save_top_k=2, async_save=False)
        for name, value in params.items():
            setattr(settings, name, value)
        self.checkpoints = StageCheckpoints(folder, settings, torch.device("cpu"), self.said.append)

    def save(self, steps: Sequence[int], losses: Sequence[float] = ()) -> None:
        for step, loss in zip(steps, losses or [0.0] * len(steps), strict=True):
            self.checkpoints.saver.begin(self.checkpoints.path(step), holding(step, loss))

    def names(self) -> list[str]:
        return [path.name for path in checkpoints_of(self.checkpoints.stage)]

    def newest(self) -> str | None:
        found = self.checkpoints.newest()
        return found and found.name


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def test_nothing_yet(tmp_path: Path) -> None:
    assert Stage(tmp_path).newest() is None


def test_the_newest_are_kept_and_the_last_is_named(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.save([1, 2, 10])
    assert stage.names() == ["step-000002", "step-000010"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000010\n"
    assert stage.newest() == "step-000010" and stage.said == []


def test_all_are_kept(tmp_path: Path) -> None:
    stage = Stage(tmp_path, save_top_k=-1)
    stage.save([1, 2, 3])
    assert len(stage.names()) == 3


@pytest.mark.parametrize(("mode", "best"), [(MonitorMode.min, [2, 3]), (MonitorMode.max, [1, 4])])
def test_the_best_are_kept_besides(tmp_path: Path, mode: MonitorMode, best: list[int]) -> None:
    stage = Stage(tmp_path, save_top_k=1, monitor="loss", mode=mode, save_best_k=2)
    stage.save([1, 2, 3, 4, 5], [0.9, 0.1, 0.2, 0.8, 0.5])
    assert stage.names() == [f"step-{n:06d}" for n in sorted({*best, 5})]


def test_a_metric_that_is_not_there_keeps_nothing_more(tmp_path: Path) -> None:
    stage = Stage(tmp_path, save_top_k=1, monitor="los")
    stage.save([1, 2, 3])
    assert stage.names() == ["step-000003"]


def test_a_damaged_one_is_put_aside_and_the_one_before_taken(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.save([1, 2])
    flip(stage.checkpoints.path(2) / "step.json")
    assert stage.newest() == "step-000001"
    aside = tmp_path / "checkpoints" / "damaged-step-000002"
    assert aside.is_dir() and stage.names() == ["step-000001"]
    assert len(stage.said) == 1 and "put aside as damaged-step-000002" in stage.said[0]
    assert "step-000002/step.json is damaged: SHA-256" in stage.said[0]
    stage.save([2])
    flip(stage.checkpoints.path(2) / "step.json")  # it may happen again
    assert stage.newest() == "step-000001"


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    stage = Stage(tmp_path, on_damaged=DamagedCheckpoint.refuse)
    stage.save([1, 2])
    (stage.checkpoints.path(2) / "step.json").unlink()
    with pytest.raises(CheckpointError, match=r"step\.json is missing(.|\n)*on_damaged=previous"):
        stage.newest()
    assert stage.names() == ["step-000001", "step-000002"]


def test_none_is_whole(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.save([1, 2])
    for step in (1, 2):
        flip(stage.checkpoints.path(step) / "step.json")
    assert stage.newest() is None and len(stage.said) == 2


def test_what_an_interrupted_save_left_is_cleared_away(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.save([1])
    for name in (".step-000002.tmp", ".step-000001.removed"):
        save_into(tmp_path / "checkpoints" / name, lambda snapshot: snapshot.add_json("x", 1))
    assert stage.newest() == "step-000001"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000001"]
