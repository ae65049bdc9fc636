"""A configuration cannot run, read or write what it was not asked for, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from configs import SCHEMAS, load
from omegaconf import OmegaConf
from payloads import Canary

from nemo_selfpref.config.checks import check_config
from nemo_selfpref.config.loader import load_config
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.rollout.endpoint_config import api_key
from nemo_selfpref.training.same_settings import read_settings
from nemo_selfpref.training.store import RunFolder

SECRET = "hf_canaryCanaryCanary0123"


def test_asserts_of_these_tests_run_without_debug_too() -> None:
    """pytest rewrites those of test modules; were they left out, this would fail under -O."""
    with pytest.raises(AssertionError):
        assert SECRET == ""


# -- names of runs, and shells --------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["name", "exp_manager.name"])
@pytest.mark.parametrize(
    "value",
    [
        "$(touch X)", "a;touch X", "`touch X`", "a b", "-a", "--wrap=x", "#SBATCH", "a\\nb", "",
        "..", ".", "../x", "a/../../x", "/tmp/x", "a/b", "a\\\\b", ".hidden", "~", "a|b", "a&b",
        "a>b", "é", "x" * 129,
    ],
)  # fmt: skip
def test_a_name_that_could_leave_its_folder_or_a_shell(setting: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?m)^{setting}=.*expected letters, digits"):
        load(f'{setting}="{value}"')


@pytest.mark.parametrize("value", ["a", "7b", "sgpo-8B_v1.2", "x" * 128])
def test_other_names_are_fine(value: str, tmp_path: Path) -> None:
    cfg = load(f"name={value}", f"exp_manager.exp_dir={tmp_path / 'any where'}")
    assert cfg.exp_manager.name == value


@pytest.mark.parametrize(
    "override",
    [
        "name=$(touch CANARY)",
        "name=`touch CANARY`",
        "name=a;touch CANARY",
        "name=a\ntouch CANARY",
        "--wrap=touch CANARY",
        "#SBATCH --wrap=touch CANARY",
        "name='a\x00b'",
        "data.system_prompt='\x1b]0;touch CANARY\x07'",
        "data.train_path=['a\x00.jsonl']",
        "+data.columns.'a\x1bb'=prompt",
    ],
)
def test_an_injection(override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as refused:
        load(override)
    assert not {"\x00", "\x1b", "\x07"} & {*str(refused.value)}
    assert not list(tmp_path.iterdir())


def test_control_characters_in_a_file(tmp_path: Path) -> None:
    text = 'defaults: [dpo, _self_]\ndata:\n  system_prompt: "a\\x1b[2J"\n'
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"'data\.system_prompt' holds control characters"):
        load(folder=tmp_path, name="mine")
    (tmp_path / "mine.yaml").write_text(text.replace("\\x1b[2J", "\\n\\tb"))
    assert load(folder=tmp_path, name="mine").data.system_prompt == "a\n\tb"


@pytest.mark.parametrize(
    "override",
    [
        "hydra.searchpath=[pkg://MODULE]",
        "+hydra.searchpath=[pkg://MODULE]",
        "hydra/launcher=basic",
        "+hydra/launcher=basic",
        "~hydra.sweeper",
        "++hydra.sweeper._target_=os.system",
        "hydra@x=y",
    ],
)
def test_hydra_itself_is_not_configured(override: str, canary: Canary) -> None:
    with pytest.raises(ConfigError, match="settings of Hydra itself"):
        load(override.replace("MODULE", canary.module))
    canary.check_silent()


def test_hydra_itself_is_not_configured_by_a_file(canary: Canary, tmp_path: Path) -> None:
    text = f"defaults: [dpo, _self_]\nhydra:\n  searchpath: ['pkg://{canary.module}']\n"
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match="a `hydra` section"):
        load(folder=tmp_path, name="mine")
    canary.check_silent()


# -- references -----------------------------------------------------------------------------------


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("CANARY_VARIABLE", SECRET)
    yield SECRET


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:CANARY_VARIABLE}",
        "x${oc.env:CANARY_VARIABLE,y}",
        "${oc.decode:${oc.env:CANARY_VARIABLE}}",
        "${${data.limit}oc.env:CANARY_VARIABLE}",
        r"\${oc.env:CANARY_VARIABLE}",
        r"\\\${oc.env:CANARY_VARIABLE}",
        "${oc.decode:\"'\\${oc.env:CANARY_VARIABLE}'\"}",
        '${oc.create:{a:"${oc.env:CANARY_VARIABLE}"}}',
        "${hydra:runtime.cwd}",
        "${nothing:here}",
    ],
)
def test_a_value_cannot_come_from_outside(value: str, secret: str, tmp_path: Path) -> None:
    content = {"defaults": ["dpo", "_self_"], "data": {"system_prompt": value}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as refused:
        load(folder=tmp_path, name="mine")
    assert secret not in str(refused.value)


def test_nor_the_choice_of_a_file(secret: str, tmp_path: Path) -> None:
    """A list of defaults is resolved by Hydra, before anybody sees the result."""
    text = "defaults: [{algorithm: '${oc.env:CANARY_VARIABLE}'}, _self_]\nname: x\n"
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(folder=tmp_path, name="mine")
    assert secret not in str(refused.value)


def test_a_refusal_says_what_to_do(secret: str) -> None:
    with pytest.raises(
        ConfigError, match=r"oc\.env:CANARY_VARIABLE.* not taken from the env.*api_k"
    ):
        load("name=${oc.env:CANARY_VARIABLE}")


def test_afterwards_omegaconf_is_as_before(secret: str) -> None:
    with pytest.raises(ConfigError):
        load("name=${oc.env:CANARY_VARIABLE}")
    load()
    assert OmegaConf.create({"a": "${oc.env:CANARY_VARIABLE}"}).a == secret


def test_settings_may_refer_to_settings() -> None:
    cfg = load("name=mine", "data.max_prompt_length=${data.limit}", "data.limit=7")
    assert cfg.exp_manager.name == "mine" and cfg.data.max_prompt_length == 7


def test_a_runs_own_settings_are_read_as_they_are_written(secret: str, tmp_path: Path) -> None:
    cfg = load_config("dpo", ["data.train_path=[a]"], SCHEMAS)
    RunFolder(tmp_path).open(cfg, resume=True)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("seed: 1234", "seed: ${oc.env:CANARY_VARIABLE}"))
    assert read_settings(path)["seed"] == "${oc.env:CANARY_VARIABLE}"
    with pytest.raises(ConfigError) as refused:
        RunFolder(tmp_path).open(cfg, resume=True)
    assert secret not in str(refused.value)


# -- where keys belong ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["sk-canary-0123456789", "Bearer x", "A=B", "1A", ""])
def test_a_key_where_the_name_of_a_variable_belongs_is_not_shown(value: str) -> None:
    with pytest.raises(ConfigError, match="no name of an environment variable") as refused:
        api_key(value)
    assert not value or value not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://u:canary@h:1", "http://h:1/?t=canary", "canary", "http://h:canary", "ftp://h"]
)
def test_a_servers_url_with_a_secret_is_not_shown(url: str) -> None:
    cfg = load()
    cfg.rollout.vllm.urls = [url]
    with pytest.raises(ConfigError, match=r"urls: entry 1 is not of the form") as refused:
        check_config(cfg)
    assert "canary" not in str(refused.value)
