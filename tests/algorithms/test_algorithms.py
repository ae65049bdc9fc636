from __future__ import annotations

from collections.abc import Iterator

import pytest
from scripted_run import ScriptedRun

from nemo_selfpref.algorithms import base
from nemo_selfpref.algorithms.base import (
    Algorithm,
    RunContext,
    TrainSettings,
    algorithms,
    check_positive,
    register,
)
from nemo_selfpref.config.schema import AlgorithmConfig, DataConfig, RunConfig
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
CFG = RunConfig(name="test", data=DataConfig(train_path=[]))


def configured(name: str, **settings: object) -> Algorithm:
    known = algorithms()[name]
    return known(known.config_class(**settings))


@pytest.mark.parametrize(
    ("name", "settings", "objective"),
    [
        ("sft", {}, SFTObjective()),
        ("dpo", {"beta": 0.3, "label_smoothing": 0.1}, DPOObjective(0.3, 0.1)),
        ("ipo", {"beta": 0.2, "length_normalized": True}, IPOObjective(0.2, True)),
        ("orpo", {"lam": 0.5}, ORPOObjective(0.5, NLLScope.full)),
        ("orpo", {"nll": NLLScope.response}, ORPOObjective(0.1, NLLScope.response)),
    ],
)
def test_methods_on_given_data_are_one_training_stage(
    name: str, settings: dict[str, object], objective: Objective, tokenizer: ChatTokenizer
) -> None:
    run = ScriptedRun(CFG, tokenizer, demos=[DEMO], pairs=[PAIR])
    algorithm = configured(name, **settings)
    algorithm.check(CFG)
    algorithm.run(run)
    (training,) = run.trained
    assert training.name == "policy" and run.stages == ["policy"]
    assert training.objective == objective
    assert training.rows == ([DEMO] if name == "sft" else [PAIR])
    assert training.settings == TrainSettings()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dpo", {"beta": 0.0}, r"algorithm\.beta=0\.0: expected a positive number"),
        ("dpo", {"label_smoothing": 0.5}, r"label_smoothing=0\.5: expected 0 <= e < 0\.5"),
        ("dpo", {"label_smoothing": -0.1}, r"label_smoothing=-0\.1: expected 0 <= e < 0\.5"),
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
    assert {"sft", "dpo", "ipo", "orpo", "sgpo"} <= set(known)
    for name, algorithm in known.items():
        assert algorithm.config_class().name == name
        assert algorithm.summary and algorithm.paper
