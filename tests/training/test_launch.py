from __future__ import annotations

import pytest

from nemo_selfpref.config.schema import RunConfig, TrainerConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.training.launch import needs_launch


def config(devices: int, nodes: int = 1) -> RunConfig:
    return RunConfig(name="test", trainer=TrainerConfig(devices=devices, num_nodes=nodes))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


def test_one_process_runs_in_place() -> None:
    assert not needs_launch(config(1))


def test_more_processes_are_started() -> None:
    assert needs_launch(config(2))


def test_a_launcher_has_started_them_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert not needs_launch(config(2))
    assert not needs_launch(config(2, nodes=2))


def test_other_machines_are_not_started_from_here() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes=2: start every rank with torchrun"):
        needs_launch(config(1, nodes=2))
