"""OSP: the judge finds answers a0 to a3 better than the blank one with 0.5, 0.9, 0.75, 0.25."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scripted_run import (
    CFG,
    QUALITY,
    Logprobs,
    ScriptedRun,
    Training,
    carry_out,
    configured,
    four_answers,
    preference,
    prefers,
    question,
    responses_of,
    texts_of,
)

from nemo_selfpref.algorithms.base import Reference, TrainSettings
from nemo_selfpref.algorithms.judge import AugmentationConfig, JudgeConfig
from nemo_selfpref.algorithms.judged import (
    JudgedConfig,
    Pairing,
    Sampling,
    Target,
    pairs_per_prompt,
)
from nemo_selfpref.algorithms.osp import SoftLoss
from nemo_selfpref.config.model_schema import ModelConfig
from nemo_selfpref.config.schema import RefMode
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import (
    DPOObjective,
    IPOObjective,
    Objective,
    SFTObjective,
    SPCEObjective,
)
from nemo_selfpref.pairing.ranking import Average
from nemo_selfpref.types import PreferencePair, WeightSet

RANKED = [("a1", "a3"), ("a2", "a0")]


@pytest.fixture
def run(tokenizer: ChatTokenizer) -> ScriptedRun:
    made = ScriptedRun(CFG, tokenizer, demos=[question(tokenizer, id) for id in ("r1", "r2")])
    made.replies = {"answers": four_answers("r1", "r2")}
    made.verdict = prefers(QUALITY)
    return made


def one_stage(run: ScriptedRun, **settings: Any) -> Training:
    (training,) = carry_out("osp", run, **{"num_samples": 4, **settings})
    return training


def strengths(training: Training) -> list[float]:
    return [row.strength for row in training.rows if isinstance(row, PreferencePair)]


def test_a_step_ranks_judges_and_learns(run: ScriptedRun) -> None:
    training = one_stage(run)
    assert run.stages == ["policy", "answers", "scores", "strengths"]
    assert run.weights == {
        "answers": WeightSet.POLICY,
        "scores": WeightSet.FROZEN,
        "strengths": WeightSet.FROZEN,
    }
    assert texts_of(run.tokenizer, training.rows) == RANKED * 2
    # Odds 9 * 3 of a1 over a3; 3 of a2 over a0.
    assert strengths(training) == pytest.approx([27 / 28, 0.75] * 2)
    assert (training.name, training.objective) == ("policy", SPCEObjective(0.1))
    assert training.settings == TrainSettings(reference=Reference(RefMode.frozen))
    assert [row.id for row in training.rows][:2] == ["r1/1-3@0", "r1/2-0@0"]
    first = training.rows[0]
    assert isinstance(first, PreferencePair)
    assert first.provenance["scores"] == pytest.approx([0.9, 0.25])


@pytest.mark.parametrize("num_samples", [2, 3, 4, 7])
def test_judge_passes_a_prompt(run: ScriptedRun, num_samples: int) -> None:
    """2 K against the blank answer and 2 floor(K / 2) for the pairs, of each of two prompts."""
    run.replies = {}
    run.verdict = lambda prompt: (-1.0, -1.0)
    one_stage(run, num_samples=num_samples)
    assert len(run.judged["scores"]) == 2 * num_samples * 2
    assert len(run.judged["strengths"]) == 2 * (num_samples // 2) * 2


def test_both_orders_of_each_pair_are_asked(run: ScriptedRun) -> None:
    run.demos = run.demos[:1]
    one_stage(run)
    assert [responses_of(text) for text in run.judged["scores"]] == [
        *[("a0", ""), ("", "a0"), ("a1", ""), ("", "a1")],
        *[("a2", ""), ("", "a2"), ("a3", ""), ("", "a3")],
    ]
    assert [responses_of(text) for text in run.judged["strengths"]] == [
        *[("a1", "a3"), ("a3", "a1"), ("a2", "a0"), ("a0", "a2")],
    ]
    assert {"judge/position_bias", "judge/blank/position_bias"} < run.metrics.keys()


@pytest.mark.parametrize(
    ("average", "strength"),
    [(Average.probability, 0.6767589549159297), (Average.logit, 0.679178699175393)],
)
def test_the_strength_of_literal_labels(
    run: ScriptedRun, average: Average, strength: float
) -> None:
    blank = prefers(QUALITY)
    literal = {("a1", "a3"): (1.2, 0.2), ("a3", "a1"): (0.4, 0.9)}

    def verdict(prompt: str) -> Logprobs:
        return literal.get(responses_of(prompt)) or blank(prompt)

    run.verdict = verdict
    training = one_stage(run, judge=JudgeConfig(average=average))
    assert strengths(training)[0] == pytest.approx(strength, abs=1e-12)


def test_a_judge_that_contradicts_its_ranking_is_not_clipped(run: ScriptedRun) -> None:
    blank, reverse = prefers(QUALITY), prefers({k: -v for k, v in QUALITY.items()})
    run.verdict = lambda p: blank(p) if "" in responses_of(p) else reverse(p)
    assert strengths(one_stage(run)) == pytest.approx([1 / 28, 0.25] * 2)


def test_the_target_from_the_difference_of_scores(run: ScriptedRun) -> None:
    training = one_stage(run, target=Target.difference)
    # sigmoid(0.9 - 0.25), sigmoid(0.75 - 0.5)
    assert strengths(training) == pytest.approx([0.6570104626734988, 0.5621765008857981] * 2)
    assert "strengths" not in run.stages


# -- other samplers, pairings and losses --------------------------------------------------------


def test_random_pairs_ask_for_no_scores(run: ScriptedRun) -> None:
    training = one_stage(run, pairing=Pairing.random)
    assert run.stages == ["policy", "answers", "strengths"]
    # Draws of r1: 0.967, 0.528, 0.968, 0.837; of r2: 0.192, 0.754, 0.495, 0.722.
    pairs = texts_of(run.tokenizer, training.rows)
    assert pairs == [("a1", "a3"), ("a0", "a2"), ("a0", "a2"), ("a3", "a1")]
    assert strengths(training) == pytest.approx([27 / 28, 0.25, 0.25, 1 / 28])


def test_random_pairs_with_the_target_from_scores(run: ScriptedRun) -> None:
    training = one_stage(run, pairing=Pairing.random, target=Target.difference)
    assert run.stages == ["policy", "answers", "scores"]
    assert strengths(training)[1] == pytest.approx(0.43782349911420193)  # sigmoid(0.5 - 0.75)


def test_raft_pairs_imitate_the_best(run: ScriptedRun) -> None:
    training = one_stage(run, pairing=Pairing.raft, loss=SoftLoss.sft, ref=RefMode.none)
    assert run.stages == ["policy", "answers", "scores"]
    assert training.objective == SFTObjective()
    assert texts_of(run.tokenizer, training.rows) == [("a1", "a3")] * 2


def test_prompts_whose_answers_are_equally_good_are_counted(run: ScriptedRun) -> None:
    run.verdict = lambda prompt: (-1.0, -1.0)
    one_stage(run, pairing=Pairing.raft, loss=SoftLoss.sft, ref=RefMode.none)
    assert run.notes["pairs"].dropped == {"equal_scores": 2}


def test_spin_pairs_set_the_datas_answer_over_each_sample(run: ScriptedRun) -> None:
    run.demos = run.demos[:1]
    run.verdict = prefers({**QUALITY, "reference r1": 0.0})
    training = one_stage(run, pairing=Pairing.spin)
    assert run.stages == ["policy", "answers", "strengths"]
    assert texts_of(run.tokenizer, training.rows) == [("reference r1", f"a{k}") for k in range(4)]
    assert strengths(training) == pytest.approx([0.5, 0.1, 0.25, 0.75])
    assert [row.id for row in training.rows] == [f"r1/{k}@0" for k in range(4)]


def test_sampling_from_the_starting_policy(run: ScriptedRun) -> None:
    training = one_stage(run, sampling=Sampling.sft)
    assert run.weights["answers"] is WeightSet.FROZEN
    assert texts_of(run.tokenizer, training.rows) == RANKED * 2


@pytest.mark.parametrize(
    ("temperature", "accepted"),
    [
        (0.0, ("a1", "a2")),  # the best
        # Rewards 0, ln 9, ln 3, -ln 3; draws of r1: 0.548, 0.808, 0.528, 0.956, then 0.461, 0.425.
        # Below (e^r / 9)^2 = 0.012, 1, 0.111, 0.001 is the second; below (e^r / 3)^2 = 0.111, 1 of
        # those left, the third.
        (0.5, ("a1", "a2")),
        # Below (e^r / 9)^0.2 = 0.644, 1 are the first and the second.
        (5.0, ("a1", "a0")),
    ],
)
def test_sampling_thinned_out_by_rejection(
    run: ScriptedRun, temperature: float, accepted: tuple[str, str]
) -> None:
    run.demos = run.demos[:1]
    training = one_stage(run, sampling=Sampling.rso, reward_beta=temperature)
    assert run.weights["answers"] is WeightSet.FROZEN
    assert texts_of(run.tokenizer, training.rows) == [accepted]
    assert len(run.judged["strengths"]) == 2


@pytest.mark.parametrize("pairing", [p for p in Pairing if p is not Pairing.raft])
def test_only_spin_pairs_need_the_datas_answers(run: ScriptedRun, pairing: Pairing) -> None:
    run.verdict = prefers({**QUALITY, "reference r1": 0.0, "reference r2": 0.0})
    one_stage(run, pairing=pairing)
    assert run.sources == ["demonstrations" if pairing is Pairing.spin else "prompts"]


def test_offline_judges_the_datas_pairs(run: ScriptedRun) -> None:
    run.pairs = [preference(run.tokenizer, f"p{n}", f"a{n}", "a3") for n in (1, 2)]
    training = one_stage(run, sampling=Sampling.offline)
    assert run.stages == ["strengths", "policy"] and training.steps == []
    assert run.weights == {"strengths": WeightSet.FROZEN}
    assert texts_of(run.tokenizer, training.rows) == [("a1", "a3"), ("a2", "a3")]
    assert strengths(training) == pytest.approx([27 / 28, 9 / 10])


@pytest.mark.parametrize(
    ("loss", "objective"),
    [(SoftLoss.dpo, DPOObjective(0.3)), (SoftLoss.ipo, IPOObjective(0.3))],
)
def test_hard_losses_take_the_better_answer_as_simply_better(
    run: ScriptedRun, loss: SoftLoss, objective: Objective
) -> None:
    training = one_stage(run, loss=loss, beta=0.3)
    assert run.stages == ["policy", "answers", "scores"]
    assert training.objective == objective and strengths(training) == [1.0] * 4


def test_hard_losses_offline_ask_no_judge(run: ScriptedRun) -> None:
    run.pairs = [preference(run.tokenizer, "p", "a1", "a3")]
    assert one_stage(run, sampling=Sampling.offline, loss=SoftLoss.dpo).rows == run.pairs
    assert run.stages == ["policy"]


# -- steps, drops and refusals ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({"num_samples": 7}, 3),
        ({"num_samples": 6, "pairing": Pairing.random}, 3),
        ({"num_samples": 7, "pairing": Pairing.raft}, 1),
        ({"num_samples": 7, "pairing": Pairing.spin}, 7),
        ({"num_samples": 9, "sampling": Sampling.rso}, 2),  # 4 of 9 are accepted
        ({"num_samples": 9, "sampling": Sampling.rso, "pairing": Pairing.spin}, 4),
    ],
)
def test_pairs_a_prompt(settings: dict[str, Any], pairs: int) -> None:
    assert pairs_per_prompt(JudgedConfig(name="x", **settings)) == pairs


@pytest.mark.parametrize(("batch", "prompts"), [(64, 21), (6, 2), (5, 1), (2, 1)])
def test_prompts_of_a_step_make_at_most_a_batch(run: ScriptedRun, batch: int, prompts: int) -> None:
    run.cfg = replace(CFG, model=ModelConfig(global_batch_size=batch))
    run.replies, run.verdict = {}, lambda prompt: (-1.0, -1.0)
    assert one_stage(run, num_samples=7).prompts_per_step == prompts  # of 3 pairs each


def test_each_step_names_its_pairs(run: ScriptedRun) -> None:
    run.cfg = replace(CFG, model=ModelConfig(global_batch_size=2))
    training = one_stage(run)
    assert [[pair.id for pair in step] for step in training.steps] == [
        ["r1/1-3@0", "r1/2-0@0"],
        ["r2/1-3@1", "r2/2-0@1"],
    ]


def test_equal_and_empty_answers_make_no_pair(run: ScriptedRun) -> None:
    found = four_answers("r1", "r2") | {"r1/1": "a3"}  # ranks a2, a0, a3, a3
    run.replies = {"answers": found | {f"r2/{k}": "" for k in range(4)}}
    training = one_stage(run)
    assert texts_of(run.tokenizer, training.rows) == [("a2", "a3"), ("a0", "a3")]
    assert run.notes["pairs"].dropped == {"identical_pair": 2}


@pytest.mark.parametrize(("drop", "kept"), [(True, 3), (False, 4)])
def test_a_better_answer_that_was_cut_off(run: ScriptedRun, drop: bool, kept: int) -> None:
    run.truncated = frozenset({"r1/1"})
    assert len(one_stage(run, drop_truncated_chosen=drop).rows) == kept
    assert run.notes["pairs"].dropped == ({"truncated_chosen": 1} if drop else {})


def test_what_is_too_long_to_judge_is_left_out_and_counted(run: ScriptedRun) -> None:
    wordy = "w " * 150
    run.replies = {"answers": four_answers("r1", "r2") | {"r1/1": wordy, "r1/3": wordy + "w"}}
    run.verdict = prefers({**QUALITY, wordy: 3.0, wordy + "w": -3.0})
    run.longest_prompt = 520  # room for one wordy answer, not for two
    training = one_stage(run)
    assert [row.id for row in training.rows] == ["r1/2-0@0", "r2/1-3@0", "r2/2-0@0"]
    assert run.notes["judged pairs"].dropped == {"judge_prompt_too_long": 1}
    run.longest_prompt = 350  # nor for one
    carry_out("osp", run, num_samples=4)
    assert run.notes["judged prompts"].dropped == {"judge_prompt_too_long": 1}


def test_a_step_without_pairs_asks_nothing_more(run: ScriptedRun) -> None:
    run.replies = {"answers": dict.fromkeys(four_answers("r1", "r2"), "a0")}
    assert one_stage(run).steps == [[]]
    assert run.notes["pairs"].dropped == {"identical_pair": 4}


def test_the_judge_is_taught_before_the_policy_is_copied(run: ScriptedRun) -> None:
    run.pairs = [preference(run.tokenizer, "p", "good", "bad")]
    judge = JudgeConfig(augmentation=AugmentationConfig(num_pairs=1, path=["pairs.jsonl"]))
    taught, trained = carry_out("osp", run, num_samples=4, judge=judge)
    assert run.stages == ["judge", "(freeze)", "policy", "answers", "scores", "strengths"]
    assert taught.objective == SFTObjective() and trained.objective == SPCEObjective(0.1)
    assert run.read == [["pairs.jsonl"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, r"algorithm\.beta=0\.0: expected a positive number"),
        ({"num_samples": 0}, r"algorithm\.num_samples=0: expected a positive number"),
        ({"num_samples": 1}, r"algorithm\.num_samples=1: expected at least 2 answers a prompt"),
        (
            {"num_samples": 3, "sampling": Sampling.rso},
            r"algorithm\.num_samples=3: expected at least 4 answers a prompt",
        ),
        ({"reward_beta": -0.5}, r"algorithm\.reward_beta=-0\.5: expected 0 or more"),
        (
            {"loss": SoftLoss.dpo, "pairing": Pairing.random},
            r"only through the strength, which this loss does not read\. Use loss=spce\.",
        ),
        (
            {"loss": SoftLoss.ipo, "target": Target.difference},
            r"only through the strength, which this loss does not read\. Use loss=spce\.",
        ),
        (
            {"target": Target.difference, "pairing": Pairing.spin},
            r"target=difference scores two samples, pairing=spin has one a pair",
        ),
        (
            {"sampling": Sampling.offline, "pairing": Pairing.random},
            r"sampling=offline takes the data's pairs as they are",
        ),
        (
            {"sampling": Sampling.offline, "target": Target.difference},
            r"sampling=offline takes the data's pairs as they are",
        ),
        ({"loss": SoftLoss.sft}, r"loss=sft and algorithm\.pairing=raft go together only"),
        ({"pairing": Pairing.raft}, r"loss=sft and algorithm\.pairing=raft go together only"),
        ({"judge": JudgeConfig(opening="")}, r"algorithm\.judge\.opening is empty"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured("osp", **settings).check(CFG)
