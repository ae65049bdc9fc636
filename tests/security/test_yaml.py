"""YAML is data: a Python tag in it is refused, wherever a file is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from configs import SCHEMAS, load
from payloads import Canary

from nemo_selfpref.config.loader import load_config
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.training.store import RunFolder

TAGS = (
    "!!python/object/apply:os.mkdir [{path}]",
    "!!python/object/apply:os.system ['mkdir {path}']",
    "!!python/object/new:os.mkdir [{path}]",
    "!!python/object/apply:subprocess.Popen [[mkdir, {path}]]",
    "!!python/name:os.system",
    "!!python/module:{module}",
)


def test_the_tags_work(canary: Canary) -> None:
    yaml.unsafe_load(TAGS[0].format(path=canary.made, module=canary.module))
    assert canary.sang


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("where", ["{}", "defaults: [dpo, _self_]\nname: {}", "defaults: {}"])
def test_a_python_tag_in_a_file(canary: Canary, tag: str, where: str, tmp_path: Path) -> None:
    made = tag.format(path=canary.made, module=canary.module)
    (tmp_path / "mine.yaml").write_text(where.format(made) + "\n")
    with pytest.raises(ConfigError, match="python/"):
        load(folder=tmp_path, name="mine")
    canary.check_silent()


@pytest.mark.parametrize("tag", TAGS)
def test_a_python_tag_in_a_file_that_is_included(canary: Canary, tag: str, tmp_path: Path) -> None:
    made = tag.format(path=canary.made, module=canary.module)
    (tmp_path / "mine.yaml").write_text("defaults: [dpo, other, _self_]\n")
    (tmp_path / "other.yaml").write_text(f"name: {made}\n")
    with pytest.raises(ConfigError):
        load(folder=tmp_path, name="mine")
    canary.check_silent()


@pytest.mark.parametrize("tag", TAGS)
def test_a_python_tag_in_a_runs_settings(canary: Canary, tag: str, tmp_path: Path) -> None:
    made = tag.format(path=canary.made, module=canary.module)
    (tmp_path / "config.yaml").write_text(f"name: {made}\n")
    cfg = load_config("dpo", ["data.train_path=[a]"], SCHEMAS)
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        RunFolder(tmp_path).open(cfg, resume=True)
    canary.check_silent()


@pytest.mark.parametrize("text", ["5", "- a", "a: [", "\x00", "[" * 5000])
def test_settings_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    cfg = load_config("dpo", ["data.train_path=[a]"], SCHEMAS)
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        RunFolder(tmp_path).open(cfg, resume=True)
