from __future__ import annotations

from pathlib import Path

import pytest

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.loader import load_config, to_typed
from nemo_selfpref.config.model_schema import Scheduler
from nemo_selfpref.config.schema import Precision, RunConfig
from nemo_selfpref.errors import ConfigError

SCHEMAS = {name: cls.config_class for name, cls in algorithms().items()}
DATA = "data.train_path=[rows.jsonl]"


def load(name: str, *overrides: str, folder: Path | None = None) -> RunConfig:
    return to_typed(load_config(name, [DATA, *overrides], SCHEMAS, folder))


def test_values_arrive_typed() -> None:
    cfg = load(
        "dpo",
        "trainer.precision=bf16",
        "model.optim.sched.name=LinearAnnealing",
        "model.optim.lr=1e-6",
        "algorithm.beta=0.3",
        "name=mine",
    )
    assert cfg.trainer.precision is Precision.bf16
    assert cfg.model.optim.sched.name is Scheduler.LinearAnnealing
    assert cfg.model.optim.lr == 1e-6 and cfg.model.optim.sched.warmup_ratio == 0.1
    assert isinstance(cfg.algorithm, SCHEMAS["dpo"]) and cfg.algorithm.beta == 0.3
    assert cfg.data.train_path == ["rows.jsonl"]
    assert cfg.exp_manager.name == cfg.name == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.optim.learning_rate=1",
            r"unknown setting 'model\.optim\.learning_rate'",
        ),
        (
            "trainer.devises=2",
            r"unknown setting 'trainer\.devises'\. Did you mean 'trainer\.devices'\? "
            r"It came from the override 'trainer\.devises=2'",
        ),
        (
            "model.micro_batchsize=2",
            r"'model\.micro_batchsize'\. Did you mean 'model\.micro_batch_size'\?",
        ),
        ("trainer.devices=two", r"trainer\.devices: Value 'two' .* Integer"),
        ("trainer.precision=fp8", r"trainer\.precision: .*'fp8'.* \[fp32, bf16\]"),
        ("data.drop=[bad_rows]", r"data\.drop.*bad_rows"),
        ("trainer.max_epochs=null", r"trainer\.max_epochs: "),
        ("rollout.top_p=[1]", r"rollout\.top_p: "),
        ("algorithm=dpoo", r"algorithm=dpoo: expected one of cdpo, dpo, ipo, .*, sgpo, spin"),
        ("trainer", r"'trainer' missing EQUAL"),
        ("~trainer.devices", r"trainer\.devices: .* does not support deletion"),
        ("+trainer.more=1", r"unknown setting 'trainer\.more'.*'\+trainer\.more=1'"),
        ("+algorithm.lam=1", r"unknown setting 'algorithm\.lam'"),
        ("algorithm.bta=1", r"'algorithm\.bta'\. Did you mean 'algorithm\.beta'\?"),
    ],
)
def test_a_wrong_override_is_explained(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("dpo", override)


def test_a_config_that_does_not_exist() -> None:
    with pytest.raises(
        ConfigError, match=r"--config-name dpoo: no such file .* Did you mean 'dpo'"
    ):
        load("dpoo")
    with pytest.raises(ConfigError, match="There are: cdpo, dpo, ipo, orpo, osp, raft, rso, "):
        load("zzz")


def test_a_value_that_must_be_given() -> None:
    with pytest.raises(
        ConfigError, match=r"no value for data\.train_path\. Give one: data\.train_path=\.\.\."
    ):
        load_config("dpo", [], SCHEMAS)


def own_config(folder: Path, text: str) -> Path:
    (folder / "mine.yaml").write_text(text)
    return folder


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    text = "defaults: [dpo, _self_]\nname: mine\nalgorithm:\n  beta: 0.7\n"
    cfg = load("mine", folder=own_config(tmp_path, text))
    assert cfg.name == "mine" and cfg.algorithm.name == "dpo"
    assert cfg.algorithm.beta == 0.7  # type: ignore[attr-defined]


def test_an_unknown_key_in_a_file(tmp_path: Path) -> None:
    folder = own_config(tmp_path, "defaults: [dpo, _self_]\ntrainer:\n  max_epoch: 3\n")
    with pytest.raises(ConfigError, match=r"'trainer\.max_epoch'\. Did you mean 'trainer\.max_ep"):
        load("mine", folder=folder)


def test_fields_of_the_users_own_naming() -> None:
    cfg = load("dpo", "+data.columns.question=prompt")
    assert cfg.data.columns == {"question": "prompt"}


def test_a_yaml_file_may_rename_fields(tmp_path: Path) -> None:
    text = "defaults: [dpo, _self_]\ndata:\n  columns: {question: prompt}\n"
    cfg = load("mine", folder=own_config(tmp_path, text))
    assert cfg.data.columns == {"question": "prompt"}
