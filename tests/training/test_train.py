from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import DictConfig

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.loader import load_config, to_typed
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.training.train import check_before_work, pick_algorithm

SCHEMAS = {name: cls.config_class for name, cls in algorithms().items()}


def config(name: str, rows: Path, *overrides: str) -> DictConfig:
    return load_config(name, [f"data.train_path=[{rows}]", *overrides], SCHEMAS)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize("name", sorted(set(SCHEMAS) - {"sgpo"}))
def test_what_ships_passes(name: str, rows: Path) -> None:
    assert check_before_work(config(name, rows)).algorithm.name == name


def test_data_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train_path: .*gone\.jsonl does not exist"):
        check_before_work(config("dpo", tmp_path / "gone.jsonl"))


def test_settings_are_checked_before_the_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs=0"):
        check_before_work(config("dpo", tmp_path / "gone.jsonl", "trainer.max_epochs=0"))


def test_an_unknown_algorithm(rows: Path) -> None:
    cfg = to_typed(config("dpo", rows))
    cfg.algorithm.name = "dop"
    with pytest.raises(
        ConfigError, match=r"algorithm\.name='dop': expected one of cdpo, dpo, ipo, orpo"
    ):
        pick_algorithm(cfg)
