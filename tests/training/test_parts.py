"""A long stage's results are kept as they come, and a damaged part is made again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from nemo_selfpref.errors import RolloutCancelled, RunStopped
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.training.parts import Parts
from nemo_selfpref.training.signals import StopSignals


@pytest.fixture(autouse=True)
def joined(policy: Policy) -> None:
    """The process group, which the policy has joined."""


def write(path: Path, found: Sequence[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(found)))


def read(path: Path) -> list[int]:
    return json.loads(path.read_text())


class Stage:
    """A stage of ten results; `fails_at` names the result that cannot be made."""

    def __init__(self, folder: Path, size: int = 4, fails_at: int | None = None) -> None:
        self.signals = StopSignals()
        self.parts = Parts(folder, size, torch.device("cpu"), self.signals)
        self.made: list[int] = []
        self.progress = 0
        self.fails_at = fails_at

    def make(self, part: slice) -> list[int]:
        numbers = list(range(10))[part]
        if self.fails_at in numbers:
            raise RolloutCancelled("given up")
        self.made += numbers
        return [n * n for n in numbers]

    def collect(self) -> list[int]:
        def count(done: int, _: int) -> None:
            self.progress += done

        return self.parts.collect(10, self.make, (write, read), count)


WHOLE = [n * n for n in range(10)]


def test_all_of_it_and_nothing_left(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    assert stage.collect() == WHOLE and stage.made == list(range(10))
    names = sorted(p.name for p in (tmp_path / "parts").glob("*.parquet"))
    assert names == ["000000-000004.parquet", "000004-000008.parquet", "000008-000010.parquet"]
    stage.parts.clear()
    assert not (tmp_path / "parts").exists()


def test_a_short_stage_keeps_no_parts(tmp_path: Path) -> None:
    assert Stage(tmp_path, size=10).collect() == WHOLE
    assert not (tmp_path / "parts").exists()


def test_only_the_part_under_way_is_lost(tmp_path: Path) -> None:
    with pytest.raises(RolloutCancelled):
        Stage(tmp_path, fails_at=9).collect()
    again = Stage(tmp_path)
    assert again.collect() == WHOLE
    assert again.made == [8, 9] and again.progress == 8


@pytest.mark.parametrize("name", ["000004-000008.parquet", "000004-000008.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "lose"])
def test_a_damaged_part_is_made_again(tmp_path: Path, name: str, harm: str) -> None:
    Stage(tmp_path).collect()
    path = tmp_path / "parts" / name
    data = path.read_bytes()
    if harm == "lose":
        path.unlink()
    else:
        path.write_bytes(data[:-3] if harm == "cut" else bytes([data[0] ^ 1]) + data[1:])
    again = Stage(tmp_path)
    assert again.collect() == WHOLE and again.made == [4, 5, 6, 7]


def test_parts_of_another_size_are_not_mistaken(tmp_path: Path) -> None:
    Stage(tmp_path).collect()
    again = Stage(tmp_path, size=3)
    assert again.collect() == WHOLE and again.made == list(range(10))


def test_a_request_to_stop_ends_the_stage_between_two_parts(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.signals.received = "SIGTERM"
    with pytest.raises(RunStopped, match=r"4 results of test_a_request.* are kept"):
        stage.collect()
    assert stage.parts.stop() and stage.made == [0, 1, 2, 3]


def test_a_request_to_stop_ends_a_part(tmp_path: Path) -> None:
    stage = Stage(tmp_path, fails_at=5)
    stage.signals.received = "SIGUSR1"
    with pytest.raises(RunStopped, match="4 results"):
        stage.collect()
