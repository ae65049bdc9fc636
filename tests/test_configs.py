"""Every configuration file that ships loads, is checked and names the algorithm it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.algorithms.sgpo_variants import VARIANTS
from nemo_selfpref.config.checks import check_config
from nemo_selfpref.config.loader import load_config, to_typed
from nemo_selfpref.config.paths import conf_dir, prompts_dir

FILES = sorted(conf_dir().rglob("*.yaml"))
SCHEMAS = {name: cls.config_class for name, cls in algorithms().items()}
TARGETS = ["algorithm.targets.source=file", "algorithm.targets.path=answers.jsonl"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_config_loads_and_passes_its_checks(file: Path) -> None:
    overrides = ["data.train_path=[rows.jsonl]"]
    if "sgpo" in file.stem:
        overrides += TARGETS  # where the target answers come from is the user's to say
    cfg = to_typed(load_config(file.stem, overrides, SCHEMAS, file.parent))
    check_config(cfg)
    algorithm = algorithms()[cfg.algorithm.name](cfg.algorithm)
    algorithm.check(cfg)
    assert isinstance(cfg.algorithm, algorithm.config_class)


def test_every_algorithm_has_a_config_of_its_name() -> None:
    for name in SCHEMAS:
        cfg = load_config(name, ["data.train_path=[rows.jsonl]"], SCHEMAS)
        assert cfg.algorithm.name == cfg.name == name


ALTERNATIVES = {"judge_summary"}
"""No default, but the documented choice for another task (docs/algorithms.md)."""


@pytest.mark.parametrize("name", sorted(p.stem for p in prompts_dir().glob("*.txt")))
def test_every_prompt_has_a_use(name: str) -> None:
    defaults = {text for schema in SCHEMAS.values() for text in _texts(schema())}
    assert name in defaults | {text for c in VARIANTS.values() for text in _texts(c)} | ALTERNATIVES


def _texts(settings: object) -> Iterator[str]:
    """Every text in a dataclass and in those within it."""
    for value in vars(settings).values():
        if isinstance(value, str):
            yield value
        elif is_dataclass(value):
            yield from _texts(value)
