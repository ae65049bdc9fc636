"""Every configuration file that ships loads, is checked and names the algorithm it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.checks import check_config
from nemo_selfpref.config.loader import load_config, to_typed
from nemo_selfpref.config.paths import conf_dir, prompts_dir

FILES = sorted(conf_dir().glob("*.yaml"))
SCHEMAS = {name: cls.config_class for name, cls in algorithms().items()}
MORE = {"sgpo": ["algorithm.targets.source=file", "algorithm.targets.path=answers.jsonl"]}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_config_loads_and_passes_its_checks(file: Path) -> None:
    overrides = ["data.train_path=[rows.jsonl]", *MORE.get(file.stem, [])]
    cfg = to_typed(load_config(file.stem, overrides, SCHEMAS))
    check_config(cfg)
    algorithm = algorithms()[cfg.algorithm.name](cfg.algorithm)
    algorithm.check(cfg)
    assert isinstance(cfg.algorithm, algorithm.config_class)


def test_every_algorithm_has_a_config_and_a_group() -> None:
    assert set(SCHEMAS) <= {file.stem for file in FILES}
    groups = {file.stem for file in (conf_dir() / "algorithm").glob("*.yaml")}
    assert groups == set(SCHEMAS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_config_repeats_no_default(file: Path) -> None:
    """Every default has its one home in the schema."""
    written = {k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "defaults"}
    schema = to_typed(load_config("sft", ["data.train_path=[x]"], SCHEMAS))
    plain = type(schema)(name="", data=type(schema.data)(train_path=[]))
    assert not list(_repeated(written, plain))


def _repeated(written: dict, plain: object, prefix: str = "") -> list[str]:
    found = []
    for key, value in written.items():
        default = getattr(plain, key)
        if isinstance(value, dict):
            found += _repeated(value, default, f"{prefix}{key}.")
        elif getattr(default, "value", default) == value:
            found.append(prefix + key)
    return found


@pytest.mark.parametrize(
    "name", [p.stem for p in sorted(prompts_dir().glob("*.txt"))]
)
def test_every_prompt_is_used(name: str) -> None:
    defaults = {
        value for schema in SCHEMAS.values() for value in vars(schema()).values() if value
    if isinstance(value, str)}
    assert name in defaults
