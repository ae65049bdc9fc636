"""SAPO: rows of token ids, so that every splice is literal. Segments have 4 tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scripted_run import CFG, ScriptedRun, carry_out, configured

from nemo_selfpref.algorithms.base import Averaging, Reference, TrainSettings
from nemo_selfpref.algorithms.self_augmented_po import PairLoss, Sampler
from nemo_selfpref.algorithms.spliced import SplicedPairs
from nemo_selfpref.config.model_schema import ModelConfig
from nemo_selfpref.config.schema import DataConfig, RefMode, RolloutConfig, RunConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import DPOObjective, ORPOObjective
from nemo_selfpref.types import Demonstration, PreferencePair, TokenIds, WeightSet

EOS = 2
SMALL = RunConfig(
    name="test",
    data=DataConfig(train_path=[], max_length=40, max_prompt_length=20),
    model=ModelConfig(global_batch_size=2),
    rollout=RolloutConfig(max_new_tokens=8),
)


def row(id: str, first: int, count: int = 10) -> Demonstration:
    """Prompt (5, 6), answer first, first + 1, ... and the end token: `count` tokens in all."""
    answer = (*range(first, first + count - 1), EOS)
    return Demonstration(id, (), (5, 6), answer, "", f"rows.jsonl:{id}")


# The draws of rows a to d at step 0 are 0.378, 0.831, 0.302, 0.599. An answer of 10 tokens may
# begin its segment at 0 .. 10 - 3 - 4 = 3, at floor(4 draw): a at 1, b at 3; d is shorter than a
# segment and regenerated whole.
A, B, C, D = row("a", 11), row("b", 21), row("c", 31), row("d", 41, count=3)
NEW = (91, 92, 93, 94)


@pytest.fixture
def run(tokenizer: ChatTokenizer) -> ScriptedRun:
    return ScriptedRun(SMALL, tokenizer, demos=[A, B])


def segments(run: ScriptedRun, found: dict[str, TokenIds]) -> ScriptedRun:
    run.replies = {"segment": dict(found)}
    return run


def on_policy(run: ScriptedRun, **settings: Any) -> list[PreferencePair]:
    """The pairs of one step with no replay between making and training."""
    given = {"sampler": Sampler.policy, "ref": RefMode.frozen, "segment_length": 4, **settings}
    (training,) = carry_out("self_augmented_po", run, **given)
    return training.steps[0]


def test_the_model_continues_the_prompt_and_the_answer_before_the_segment(
    run: ScriptedRun,
) -> None:
    run.demos, run.cfg = [A, B, D], replace(SMALL, model=ModelConfig(global_batch_size=3))
    carry_out("self_augmented_po", run, segment_length=4)
    assert run.prompt_ids == {
        "a@0": (5, 6, 11),
        "b@0": (5, 6, 21, 22, 23),
        "d@0": (5, 6),
    }
    assert run.limits == {"a@0": 4, "b@0": 4, "d@0": 3}
    assert run.weights == {"segment": WeightSet.EMA}


def test_the_rejected_answer_is_the_rows_with_the_segment_in_it(run: ScriptedRun) -> None:
    first, second = on_policy(segments(run, {"a@0": NEW, "b@0": (91, EOS)}))
    assert first.prompt_ids == (5, 6) and first.chosen_ids == A.response_ids
    assert first.rejected_ids == (11, 91, 92, 93, 94, 16, 17, 18, 19, EOS)
    assert second.chosen_ids == B.response_ids
    assert second.rejected_ids == (21, 22, 23, 91, EOS)  # an end inside B' drops what follows
    assert (first.id, first.strength) == ("a@0", 1.0)
    assert first.provenance["segment"] == [1, 4] and first.provenance["step"] == 0
    assert first.provenance["chosen"] == "data"
    assert first.provenance["rejected"]["weight_set"] == "policy"


def test_a_segment_that_came_out_as_it_was_is_no_pair(run: ScriptedRun) -> None:
    (pair,) = on_policy(segments(run, {"a@0": A.response_ids[1:5], "b@0": NEW}))
    assert pair.id == "b@0"
    assert run.notes["pairs"].dropped == {"identical_pair": 1} and run.notes["pairs"].kept == 1


def test_the_whole_answer_where_segments_are_off(run: ScriptedRun) -> None:
    pairs = on_policy(segments(run, {"a@0": (91, 92, EOS), "b@0": NEW * 10}), segment=False)
    assert run.prompt_ids == {"a@0": (5, 6), "b@0": (5, 6)}
    assert run.limits == {"a@0": 8, "b@0": 8}  # rollout.max_new_tokens
    assert [pair.rejected_ids for pair in pairs] == [(91, 92, EOS)]
    assert run.notes["pairs"].dropped == {"too_long": 1}  # 2 + 40 tokens, data.max_length is 40


def test_on_policy_trains_on_each_steps_own_pairs(run: ScriptedRun) -> None:
    run.demos = [A, B, C]
    on_policy(run)
    (training,) = run.trained
    assert [[pair.id for pair in step] for step in training.steps] == [["a@0", "b@0"], ["c@1"]]
    assert run.weights == {"segment": WeightSet.POLICY}
    assert run.metrics == {}
    assert training.settings == TrainSettings(reference=Reference(RefMode.frozen))


def replayed(run: ScriptedRun, **settings: Any) -> list[list[str]]:
    run.demos = [A, B, C, row("e", 51), row("f", 61), row("g", 71)]
    (training,) = carry_out("self_augmented_po", run, segment_length=4, **settings)
    return [[pair.id for pair in step] for step in training.steps]


def test_each_step_draws_from_the_buffer(run: ScriptedRun) -> None:
    # The uniform draws, and the weights 1 / (draws so far + 1) they pick from:
    #   0.824 and 0.433 of a 1, b 1: 1.65 is b, 0.87 is a;
    #   0.745 and 0.995 of a 1/2, b 1/2, c 1, e 1: 2.23 and 2.98 are e;
    #   0.476 and 0.243 of a 1/2, b 1/2, c 1, e 1/3, f 1, g 1: 2.06 is e, 1.05 is c.
    assert replayed(run) == [["b@0", "a@0"], ["e@1", "e@1"], ["e@1", "c@1"]]
    assert run.metrics["replay/size"] == 6.0
    assert run.metrics["replay/age_max"] == 1.0


def test_the_oldest_pairs_give_way(run: ScriptedRun) -> None:
    steps = replayed(run, replay_capacity=2)
    assert [{id[-2:] for id in step} for step in steps] == [{"@0"}, {"@1"}, {"@2"}]
    assert run.metrics["replay/size"] == 2.0


def test_a_step_with_nothing_to_draw_makes_no_pairs(run: ScriptedRun) -> None:
    same = {"a@0": A.response_ids[1:5], "b@0": B.response_ids[3:7]}
    (training,) = carry_out("self_augmented_po", segments(run, same), segment_length=4)
    assert training.steps == [[]]


def test_a_restored_buffer_draws_the_same(run: ScriptedRun, tokenizer: ChatTokenizer) -> None:
    whole = replayed(run)
    again = ScriptedRun(SMALL, tokenizer, interrupted=True)
    assert replayed(again) == whole
    assert again.trained[0].rows == run.trained[0].rows


def test_what_survives_between_steps(run: ScriptedRun) -> None:
    maker = SplicedPairs(WeightSet.EMA, 4, capacity=3)
    maker.pairs(0, run, [A, B])
    kept, state = maker.kept()
    assert [pair.id for pair in kept] == ["a@0", "b@0"]
    other = SplicedPairs(WeightSet.EMA, 4, capacity=3)
    other.restore(kept, state)
    assert other.pairs(1, run, [C, D]) == maker.pairs(1, run, [C, D])
    assert other.histograms() == maker.histograms()
    assert set(maker.histograms()) == {"replay age (steps)", "replay reuse (draws)"}
    bufferless = SplicedPairs(WeightSet.POLICY, 4, capacity=None)
    assert bufferless.kept() == ((), {}) and bufferless.histograms() == {}


def test_the_papers_settings(run: ScriptedRun) -> None:
    (training,) = carry_out("self_augmented_po", run, segment_length=4)
    assert (training.name, training.objective) == ("policy", DPOObjective(0.1))
    assert training.prompts_per_step is None
    assert training.settings == TrainSettings(
        reference=Reference(RefMode.ema, 108), averaging=Averaging(0.5, 2)
    )


def test_orpo_keeps_the_average_and_no_reference(run: ScriptedRun) -> None:
    settings = {"loss": PairLoss.orpo, "ref": RefMode.none, "segment_length": 4, "ema_every": 1}
    (training,) = carry_out("self_augmented_po", run, **settings)
    assert training.objective == ORPOObjective(0.05)
    assert training.settings == TrainSettings(
        reference=Reference(RefMode.none, 0), averaging=Averaging(0.5, 1)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, r"algorithm\.beta=0\.0: expected a positive number"),
        ({"lam": 0.0}, r"algorithm\.lam=0\.0: expected a positive number"),
        ({"segment_length": 0}, r"algorithm\.segment_length=0: expected a positive number"),
        (
            {"segment_length": 600},
            r"algorithm\.segment_length=600: rollout\.max_new_tokens=512 would cut segments short",
        ),
        (
            {"sampler": Sampler.policy, "replay_capacity": 10},
            r"algorithm\.replay_capacity: sampler=policy has no replay buffer",
        ),
        ({"replay_capacity": 0}, r"algorithm\.replay_capacity=0: expected a positive number"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured("self_augmented_po", **settings).check(CFG)


def test_the_length_of_a_segment_does_not_bind_whole_answers() -> None:
    configured("self_augmented_po", segment=False, segment_length=600).check(CFG)
