from __future__ import annotations

from dataclasses import replace

import pytest
from scripted_run import CFG, ScriptedRun, carry_out, configured, question

from nemo_selfpref.algorithms.base import Reference, TrainSettings
from nemo_selfpref.config.model_schema import ModelConfig, OptimConfig
from nemo_selfpref.config.schema import RefMode
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import DPOObjective
from nemo_selfpref.types import PreferencePair, WeightSet


@pytest.fixture
def run(tokenizer: ChatTokenizer) -> ScriptedRun:
    cfg = replace(CFG, model=ModelConfig(optim=OptimConfig(lr=5e-7, weight_decay=0.01)))
    return ScriptedRun(cfg, tokenizer, demos=[question(tokenizer, id) for id in ("r1", "r2")])


def ids_of(run: ScriptedRun) -> list[list[str]]:
    return [[row.id for row in training.rows] for training in run.trained]


def test_each_iteration_samples_from_the_policy_and_trains(run: ScriptedRun) -> None:
    carry_out("spin", run, iterations=3)
    assert run.stages == ["answer-0", "policy-0", "answer-1", "policy-1", "answer-2", "policy"]
    assert set(run.weights.values()) == {WeightSet.POLICY}


def test_pairs_are_the_datas_answer_over_the_sample(run: ScriptedRun) -> None:
    carry_out("spin", run, iterations=2)
    first, second = (training.rows[-2] for training in run.trained)
    decode = run.tokenizer.decode
    for pair, sample in ((first, "answer-0 answer to r1"), (second, "answer-1 answer to r1")):
        assert isinstance(pair, PreferencePair)
        assert pair.prompt_ids == run.demos[0].prompt_ids
        assert pair.chosen_ids == run.demos[0].response_ids
        assert decode(pair.rejected_ids) == sample
        assert (pair.strength, pair.provenance["chosen"]) == (1.0, "data")


def test_an_iteration_trains_on_the_pairs_of_the_one_before_too(run: ScriptedRun) -> None:
    carry_out("spin", run, iterations=3)
    assert ids_of(run) == [
        ["r1@0", "r2@0"],
        ["r1@0", "r2@0", "r1@1", "r2@1"],
        ["r1@1", "r2@1", "r1@2", "r2@2"],
    ]


def test_without_the_pairs_of_the_one_before(run: ScriptedRun) -> None:
    carry_out("spin", run, iterations=3, keep_previous=False)
    assert ids_of(run) == [["r1@0", "r2@0"], ["r1@1", "r2@1"], ["r1@2", "r2@2"]]


def test_the_papers_betas_and_learning_rates(run: ScriptedRun) -> None:
    carry_out("spin", run)
    assert [t.objective for t in run.trained] == [DPOObjective(b) for b in (0.1, 0.1, 0.1, 5.0)]
    optims = [t.settings.optim for t in run.trained]
    assert all(optim is not None for optim in optims)
    # 5e-7 for iterations 0 and 1, then a fifth of it; nothing else of the optimizer changes.
    assert [o.lr for o in optims] == pytest.approx([5e-7, 5e-7, 1e-7, 1e-7])
    assert {o.weight_decay for o in optims} == {0.01}


@pytest.mark.parametrize(
    ("iterations", "factors", "betas", "rates"),
    [
        (1, [1.0, 1.0, 0.2], [0.1], [5e-7]),  # a single iteration is not the last of several
        (2, [0.5], [0.1, 5.0], [2.5e-7, 2.5e-7]),
    ],
)
def test_other_numbers_of_iterations(
    run: ScriptedRun,
    iterations: int,
    factors: list[float],
    betas: list[float],
    rates: list[float],
) -> None:
    trained = carry_out("spin", run, iterations=iterations, lr_factors=factors)
    assert [t.name for t in trained][-1] == "policy"
    assert [t.objective for t in trained] == [DPOObjective(b) for b in betas]
    assert [t.settings.optim.lr for t in trained] == pytest.approx(rates)


def test_the_reference_is_the_policy_as_the_iteration_begins(run: ScriptedRun) -> None:
    trained = carry_out("spin", run, iterations=2)
    for training in trained:
        assert replace(training.settings, optim=None) == TrainSettings()
        assert training.settings.reference == Reference(RefMode.last, 0)


def test_an_answer_equal_to_the_datas_is_no_pair(run: ScriptedRun) -> None:
    run.replies = {"answer-1": {"r2": "reference r2"}}
    carry_out("spin", run, iterations=2)
    assert ids_of(run) == [["r1@0", "r2@0"], ["r1@0", "r2@0", "r1@1"]]
    assert run.notes["pairs 1"].dropped == {"identical_pair": 1}
    assert run.notes["pairs 1"].kept == 1 and run.notes["pairs 0"].kept == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, r"algorithm\.iterations=0: expected a positive number"),
        ({"beta": 0.0}, r"algorithm\.beta=0\.0: expected a positive number"),
        ({"last_beta": -1.0}, r"algorithm\.last_beta=-1\.0: expected a positive number"),
        ({"lr_factors": [1.0, 0.0]}, r"algorithm\.lr_factors=0\.0: expected a positive number"),
        ({"lr_factors": []}, r"algorithm\.lr_factors=0\.0: expected a positive number"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured("spin", **settings).check(CFG)
