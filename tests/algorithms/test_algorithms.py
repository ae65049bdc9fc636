from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_run import CFG, ScriptedRun, carry_out, configured

from nemo_selfpref.algorithms import base
from nemo_selfpref.algorithms.base import (
    ALIASES,
    Algorithm,
    Reference,
    RunContext,
    TrainSettings,
    algorithms,
    check_positive,
    register,
)
from nemo_selfpref.cli import _known_name
from nemo_selfpref.config.schema import AlgorithmConfig, RefMode
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import (
    DPOObjective,
    IPOObjective,
    NLLScope,
    Objective,
    ORPOObjective,
    SFTObjective,
)
from nemo_selfpref.types import Demonstration, PreferencePair

PAIR = PreferencePair("p", (1,), (2,), (3,))
DEMO = Demonstration("d", (), (1,), (2,), "x", "f:1")


@pytest.mark.parametrize(
    ("name", "settings", "objective"),
    [
        ("sft", {}, SFTObjective()),
        ("dpo", {"beta": 0.3, "label_smoothing": 0.1}, DPOObjective(0.3, 0.1)),
        ("ipo", {"beta": 0.2, "length_normalized": True}, IPOObjective(0.2, True)),
        ("orpo", {"lam": 0.5}, ORPOObjective(0.5, NLLScope.full)),
        ("orpo", {"nll": NLLScope.response}, ORPOObjective(0.1, NLLScope.response)),
        ("cdpo", {}, DPOObjective(0.1, 0.1)),
        ("cdpo", {"label_smoothing": 0.3}, DPOObjective(0.1, 0.3)),
    ],
)
def test_methods_on_given_data_are_one_training_stage(
    name: str, settings: dict[str, object], objective: Objective, tokenizer: ChatTokenizer
) -> None:
    run = ScriptedRun(CFG, tokenizer, demos=[DEMO], pairs=[PAIR])
    (training,) = carry_out(name, run, **settings)
    assert training.name == "policy" and run.stages == ["policy"]
    assert training.objective == objective
    assert training.rows == ([DEMO] if name == "sft" else [PAIR])
    frozen = TrainSettings(reference=Reference(RefMode.frozen))
    assert training.settings == (TrainSettings() if name in ("sft", "orpo") else frozen)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dpo", {"beta": 0.0}, r"algorithm\.beta=0\.0: expected a positive number"),
        ("dpo", {"label_smoothing": 0.5}, r"label_smoothing=0\.5: expected 0 <= e < 0\.5"),
        ("dpo", {"label_smoothing": -0.1}, r"label_smoothing=-0\.1: expected 0 <= e < 0\.5"),
        ("cdpo", {"beta": 0.0}, r"algorithm\.beta=0\.0: expected a positive number"),
        ("cdpo", {"label_smoothing": 0.0}, r"label_smoothing=0\.?0?: that is dpo; expected 0 < e"),
        ("cdpo", {"label_smoothing": 0.5}, r"label_smoothing=0\.5: expected 0 <= e < 0\.5"),
        ("ipo", {"beta": -1.0}, r"algorithm\.beta=-1\.0: expected a positive number"),
        ("orpo", {"lam": -0.1}, r"algorithm\.lam=-0\.1: expected 0 or more"),
        ("sgpo", {"beta": 0.0}, r"algorithm\.beta=0\.0: expected a positive number"),
        ("sgpo", {}, r"algorithm\.targets\.endpoint\.base_url is"),
    ],
)
def test_settings_out_of_range(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(name, **settings).check(CFG)


def test_check_positive() -> None:
    check_positive("x", 1e-9)
    with pytest.raises(ConfigError, match="x=0: expected a positive number"):
        check_positive("x", 0)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, type[Algorithm]]]:
    """The registry, put back afterwards."""
    algorithms()
    copy = dict(base._REGISTRY)
    monkeypatch.setattr(base, "_REGISTRY", copy)
    yield copy


class Nothing(Algorithm):
    summary, paper, config_class = "does nothing", "-", AlgorithmConfig

    def run(self, run: RunContext) -> None:
        pass


def test_an_algorithm_of_ones_own(registry: dict[str, type[Algorithm]]) -> None:
    assert register("aaa")(Nothing) is Nothing
    assert register("aaa")(Nothing) is Nothing  # a module may be imported twice
    assert next(iter(algorithms())) == "aaa"
    Nothing(AlgorithmConfig("aaa")).check(CFG)


def test_two_algorithms_of_one_name(registry: dict[str, type[Algorithm]]) -> None:
    with pytest.raises(ConfigError, match="two algorithms are called 'dpo'"):
        register("dpo")(Nothing)


def test_what_there_is() -> None:
    known = algorithms()
    assert list(known) == sorted(known)
    assert set(known) == {
        *("sft", "dpo", "cdpo", "ipo", "orpo", "sr_dpo", "sr_ipo"),
        *("raft", "rso", "spin", "self_rewarding", "osp", "self_augmented_po", "sgpo"),
    }
    for name, algorithm in known.items():
        assert algorithm.config_class().name == name
        assert algorithm.summary and algorithm.paper


def test_a_name_that_means_something_else_elsewhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert _known_name("sapo", None) == "self_augmented_po"
    assert capsys.readouterr().err == (
        "selfpref: warning: sapo is self_augmented_po here; other software calls Soft Adaptive "
        "Policy Optimization by that name\n"
    )
    assert _known_name("sapo", tmp_path) == "self_augmented_po"
    assert "warning" in capsys.readouterr().err


def test_ones_own_file_of_that_name_is_meant(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "sapo.yaml").write_text("name: mine")
    assert _known_name("sapo", tmp_path) == "sapo"
    assert _known_name("dpo", None) == "dpo"
    assert capsys.readouterr().err == ""


def test_an_alias_is_no_method_and_means_one() -> None:
    assert not set(ALIASES) & set(algorithms())
    assert {meant for meant, _ in ALIASES.values()} <= set(algorithms())
