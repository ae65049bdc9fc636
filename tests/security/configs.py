"""Configurations as `selfpref train` composes and checks them."""

from __future__ import annotations

from pathlib import Path

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.checks import check_config
from nemo_selfpref.config.loader import load_config, to_typed
from nemo_selfpref.config.schema import RunConfig

SCHEMAS = {name: cls.config_class for name, cls in algorithms().items()}


def load(*overrides: str, folder: Path | None = None, name: str = "dpo") -> RunConfig:
    typed = to_typed(load_config(name, ["data.train_path=[a.jsonl]", *overrides], SCHEMAS, folder))
    check_config(typed)
    return typed
