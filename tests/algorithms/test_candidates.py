"""The methods that choose among several answers of their own: RAFT, RSO, Self-Rewarding."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_run import (
    CFG,
    QUALITY,
    ScriptedRun,
    carry_out,
    configured,
    four_answers,
    preference,
    prefers,
    question,
    texts_of,
)

from nemo_selfpref.algorithms.base import Reference, TrainSettings
from nemo_selfpref.algorithms.judge import AugmentationConfig, JudgeConfig
from nemo_selfpref.config.schema import DataConfig, RefMode, RunConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import DPOObjective, SFTObjective
from nemo_selfpref.types import Demonstration, PreferencePair, WeightSet

FROZEN = TrainSettings(reference=Reference(RefMode.frozen))


@pytest.fixture
def run(tokenizer: ChatTokenizer) -> ScriptedRun:
    """Two prompts; of the answers a0 to a3 to each, a1 is the best and a3 the worst."""
    made = ScriptedRun(CFG, tokenizer, demos=[question(tokenizer, id) for id in ("r1", "r2")])
    found = four_answers("r1", "r2")
    made.replies = dict.fromkeys(("answers", "answers-0", "answers-1"), found)
    made.verdict = prefers(QUALITY)
    return made


def responses(run: ScriptedRun, training: int = 0) -> list[tuple[str, str]]:
    rows = [row for row in run.trained[training].rows if isinstance(row, Demonstration)]
    return [(row.id, row.response) for row in rows]


# -- RAFT ---------------------------------------------------------------------------------------


def test_raft_imitates_the_best_answer(run: ScriptedRun) -> None:
    (training,) = carry_out("raft", run, num_samples=4)
    assert run.stages == ["answers-0", "scores-0", "policy"]
    assert run.weights == {"answers-0": WeightSet.POLICY, "scores-0": WeightSet.FROZEN}
    assert responses(run) == [("r1", "a1"), ("r2", "a1")]
    row = training.rows[0]
    assert row.prompt_ids == run.demos[0].prompt_ids
    end = run.tokenizer.end_of_turn_id
    assert row.response_ids == (*run.tokenizer.encode_text("a1"), end)
    assert (training.objective, training.settings) == (SFTObjective(), TrainSettings())


def test_every_answer_is_judged_against_the_blank_one_in_both_orders(run: ScriptedRun) -> None:
    carry_out("raft", run, num_samples=4)
    assert len(run.judged["scores-0"]) == 2 * 4 * 2
    assert "RESPONSE A:a0\n\nRESPONSE B:\n" in run.judged["scores-0"][0]
    assert "RESPONSE A:\n\nRESPONSE B:a0\n" in run.judged["scores-0"][1]
    assert all("question r2" in text for text in run.judged["scores-0"][8:])


def test_raft_goes_on_from_what_it_trained(run: ScriptedRun) -> None:
    carry_out("raft", run, num_samples=4, iterations=2)
    assert [name for name in run.stages if name.startswith("p")] == ["policy-0", "policy"]
    assert run.weights["answers-1"] is WeightSet.POLICY
    assert run.weights["scores-1"] is WeightSet.FROZEN


@pytest.mark.parametrize(("drop", "kept"), [(True, ["r2"]), (False, ["r1", "r2"])])
def test_an_answer_that_was_cut_off_is_not_imitated(
    run: ScriptedRun, drop: bool, kept: list[str]
) -> None:
    run.truncated = frozenset({"r1/1"})
    carry_out("raft", run, num_samples=4, drop_truncated=drop)
    assert [id for id, _ in responses(run)] == kept
    assert run.notes["best answers"].dropped == ({"truncated": 1} if drop else {})


def test_an_empty_answer_is_not_imitated(run: ScriptedRun) -> None:
    run.replies = {"answers-0": {**four_answers("r1", "r2"), "r1/1": ""}}
    run.verdict = prefers({**QUALITY, "a0": -1.0, "a2": -1.0})
    carry_out("raft", run, num_samples=4)
    assert responses(run) == [("r2", "a1")]
    assert run.notes["best answers"].dropped == {"empty_response": 1}


def test_an_answer_too_long_to_train_on_is_not_imitated(run: ScriptedRun) -> None:
    run.cfg = RunConfig(name="test", data=DataConfig(train_path=[], max_length=60))
    run.replies = {"answers-0": {**four_answers("r1", "r2"), "r1/1": "w " * 60}}
    run.verdict = prefers({**QUALITY, "w " * 60: 3.0})
    carry_out("raft", run, num_samples=4)
    assert responses(run) == [("r2", "a1")]
    assert run.notes["best answers"].dropped == {"too_long": 1}


# -- RSO ----------------------------------------------------------------------------------------


def test_rso_pairs_the_accepted_answers_by_rank(run: ScriptedRun) -> None:
    # At temperature 0 the best are accepted: a1, a2 of four.
    (training,) = carry_out("rso", run, num_samples=4, num_accepted=2, reward_beta=0.0)
    assert run.stages == ["answers", "scores", "policy"]
    assert run.weights["scores"] is WeightSet.FROZEN
    assert texts_of(run.tokenizer, training.rows) == [("a1", "a2")] * 2
    assert (training.objective, training.settings) == (DPOObjective(0.05), FROZEN)
    first = training.rows[0]
    assert isinstance(first, PreferencePair)
    assert first.provenance["scores"] == pytest.approx([0.9, 0.75])
    assert first.provenance["chosen"]["id"] == "r1/1"


@pytest.mark.parametrize(
    ("temperature", "accepted"),
    [
        # Rewards 0, ln 9, ln 3, -ln 3; draws of r1: 0.126, 0.079, 0.049, 0.276.
        # Accepted below (e^r / 9)^2 = 0.012, 1, 0.111, 0.001: the second and the third.
        (0.5, ("a1", "a2")),
        # Below (e^r / 9)^0.2 = 0.644, 1: the first and the second, the better one chosen.
        (5.0, ("a1", "a0")),
    ],
)
def test_rso_accepts_with_a_probability(
    run: ScriptedRun, temperature: float, accepted: tuple[str, str]
) -> None:
    run.demos = run.demos[:1]
    (training,) = carry_out("rso", run, num_samples=4, num_accepted=2, reward_beta=temperature)
    assert texts_of(run.tokenizer, training.rows) == [accepted]


def test_rso_makes_half_as_many_pairs_as_it_accepts(run: ScriptedRun) -> None:
    (training,) = carry_out("rso", run, num_samples=4, num_accepted=4)
    assert texts_of(run.tokenizer, training.rows) == [("a1", "a3"), ("a2", "a0")] * 2


# -- Self-Rewarding -----------------------------------------------------------------------------


def test_self_rewarding_sets_the_best_over_the_worst(run: ScriptedRun) -> None:
    trained = carry_out("self_rewarding", run)
    assert run.stages == [
        *("answers-0", "scores-0", "policy-0"),
        *("answers-1", "scores-1", "policy"),
    ]
    assert set(run.weights.values()) == {WeightSet.POLICY}  # it judges itself as it is
    for training in trained:
        assert texts_of(run.tokenizer, training.rows) == [("a1", "a3")] * 2
        assert (training.objective, training.settings) == (DPOObjective(0.1), FROZEN)
    assert [row.id for row in trained[1].rows] == ["r1/1-3@1", "r2/1-3@1"]


@pytest.mark.parametrize(("drop", "kept"), [(True, 1), (False, 2)])
def test_a_chosen_answer_that_was_cut_off(run: ScriptedRun, drop: bool, kept: int) -> None:
    run.truncated = frozenset({"r1/1"})
    settings = {"iterations": 1, "drop_truncated_chosen": drop}
    (training,) = carry_out("self_rewarding", run, **settings)
    assert len(training.rows) == kept
    assert run.notes["pairs"].dropped == ({"truncated_chosen": 1} if drop else {})


def test_answers_found_equally_good_make_no_pair(run: ScriptedRun) -> None:
    run.replies["answers-0"] = {**four_answers("r2"), **{f"r1/{k}": "a2" for k in range(4)}}
    (training,) = carry_out("self_rewarding", run, iterations=1)
    assert [row.id for row in training.rows] == ["r2/1-3@0"]


def test_answers_found_equally_good_are_counted(run: ScriptedRun) -> None:
    run.verdict = lambda prompt: (-1.0, -1.0)
    carry_out("self_rewarding", run, iterations=1)
    assert run.notes["pairs"].dropped == {"equal_scores": 2}


# -- what they share ----------------------------------------------------------------------------

METHODS = {
    "raft": {"num_samples": 4},
    "rso": {"num_samples": 4, "num_accepted": 2},
    "self_rewarding": {"iterations": 1},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_with_an_answer_too_long_to_judge_is_left_out(run: ScriptedRun, name: str) -> None:
    long = {**four_answers("r1", "r2"), "r1/2": "w " * 400}
    run.replies = {"answers": long, "answers-0": long}
    run.longest_prompt = 400
    (training,) = carry_out(name, run, **METHODS[name])
    assert {row.id.split("/")[0] for row in training.rows} == {"r2"}
    assert run.notes["judged prompts"].dropped == {"judge_prompt_too_long": 1}
    assert run.notes["judged prompts"].kept == 1


@pytest.mark.parametrize("name", ["rso", "self_rewarding"])
def test_pairs_of_no_use_are_counted(run: ScriptedRun, name: str) -> None:
    run.cfg = RunConfig(name="test", data=DataConfig(train_path=[], max_length=60))
    long = {**four_answers("r1", "r2"), "r1/3": "w " * 60}
    run.replies = {"answers": long, "answers-0": long}
    run.verdict = prefers({**QUALITY, "w " * 60: -2.0})
    settings = {**METHODS[name], **({"num_accepted": 4} if name == "rso" else {})}
    (training,) = carry_out(name, run, **settings)
    assert run.notes["pairs"].dropped == {"too_long": 1}
    assert run.notes["pairs"].kept == len(training.rows)


@pytest.mark.parametrize("name", METHODS)
def test_the_datas_answers_are_not_read(run: ScriptedRun, name: str) -> None:
    carry_out(name, run, **METHODS[name])
    assert run.sources == ["prompts"]


@pytest.mark.parametrize("name", METHODS)
def test_the_judge_may_be_taught_first(run: ScriptedRun, name: str) -> None:
    run.pairs = [preference(run.tokenizer, "p", "good", "bad")]
    judge = JudgeConfig(augmentation=AugmentationConfig(num_pairs=1))
    carry_out(name, run, judge=judge, **METHODS[name])
    assert run.stages[:2] == ["judge", "(freeze)"] and run.stages[-1] == "policy"
    assert "judge" not in run.stages[2:]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("raft", {"iterations": 0}, r"algorithm\.iterations=0: expected a positive number"),
        ("raft", {"num_samples": 1}, r"algorithm\.num_samples=1: expected at least 2 answers"),
        ("rso", {"beta": 0.0}, r"algorithm\.beta=0\.0: expected a positive number"),
        ("rso", {"num_samples": 3}, r"algorithm\.num_samples=3: expected at least 4 answers"),
        ("rso", {"num_accepted": 1}, r"algorithm\.num_accepted=1: expected at least 2"),
        ("rso", {"reward_beta": -1.0}, r"algorithm\.reward_beta=-1\.0: expected 0 or more"),
        ("self_rewarding", {"iterations": 0}, r"algorithm\.iterations=0: expected a positive"),
        ("self_rewarding", {"beta": 0.0}, r"algorithm\.beta=0\.0: expected a positive number"),
        ("self_rewarding", {"num_samples": 0}, r"algorithm\.num_samples=0: expected a positive"),
        ("self_rewarding", {"judge": JudgeConfig(opening="")}, r"judge\.opening is empty"),
    ],
)
def test_settings_out_of_range(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(name, **settings).check(CFG)
