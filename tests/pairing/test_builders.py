from __future__ import annotations

from dataclasses import replace

import pytest

from nemo_selfpref.pairing.builders import PairLimits, improved_over_draft
from nemo_selfpref.types import Completion, Demonstration, FinishReason, WeightSet

DEMO = Demonstration("a", (), (5, 6, 7), (8, 2), "x", "rows.jsonl:1")
DRAFT = Completion("a", (10, 2), (-1.0, -2.0), FinishReason.STOP, WeightSet.POLICY, 4)
BETTER = replace(DRAFT, token_ids=(11, 12, 2), logprobs=(-1.0,) * 3, weight_version=5)
LIMITS = PairLimits(max_length=6)


def test_a_pair_is_conditioned_on_the_plain_prompt() -> None:
    (pair,), report = improved_over_draft([DEMO], [DRAFT], [BETTER], LIMITS)
    assert (pair.id, pair.prompt_ids) == ("a", (5, 6, 7))
    assert pair.chosen_ids == (11, 12, 2) and pair.rejected_ids == (10, 2)
    assert pair.strength == 1.0
    assert (report.kept, report.dropped) == (1, {})


def test_provenance_names_both_answers() -> None:
    (pair,), _ = improved_over_draft([DEMO], [DRAFT], [BETTER], LIMITS)
    origin = {"id": "a", "finish_reason": "stop", "weight_set": "policy"}
    assert pair.provenance == {
        "source": "rows.jsonl:1",
        "prompt": "a",
        "weight_version": 5,
        "chosen": {**origin, "weight_version": 5},
        "rejected": {**origin, "weight_version": 4},
    }


@pytest.mark.parametrize(
    ("better", "reason"),
    [
        (replace(BETTER, token_ids=DRAFT.token_ids), "identical_pair"),
        (replace(BETTER, finish_reason=FinishReason.LENGTH), "truncated_chosen"),
        (replace(BETTER, token_ids=(11, 12, 13, 2)), "too_long"),  # 3 + 4 > 6
        (replace(BETTER, token_ids=(2,)), "empty_response"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_left_out_is_counted(better: Completion, reason: str) -> None:
    pairs, report = improved_over_draft([DEMO], [DRAFT], [better], LIMITS)
    assert pairs == []
    assert (report.kept, report.dropped) == (0, {reason: 1})
    assert report.examples == {reason: "rows.jsonl:1"}


def test_a_long_draft_leaves_the_pair_out_too() -> None:
    draft = replace(DRAFT, token_ids=(10, 11, 12, 2))
    _, report = improved_over_draft([DEMO], [draft], [BETTER], LIMITS)
    assert report.dropped == {"too_long": 1}


def test_truncated_answers_may_be_kept() -> None:
    better = replace(BETTER, finish_reason=FinishReason.LENGTH)
    limits = PairLimits(max_length=6, drop_truncated_chosen=False)
    pairs, _ = improved_over_draft([DEMO], [DRAFT], [better], limits)
    assert [p.chosen_ids for p in pairs] == [(11, 12, 2)]


def test_a_truncated_or_empty_draft_is_a_fair_rejected_answer() -> None:
    drafts = [replace(DRAFT, finish_reason=FinishReason.LENGTH), replace(DRAFT, token_ids=(2,))]
    pairs, _ = improved_over_draft([DEMO, DEMO], drafts, [BETTER, BETTER], LIMITS)
    assert [p.rejected_ids for p in pairs] == [(10, 2), (2,)]


def test_an_answer_cut_after_one_token_is_not_empty() -> None:
    better = replace(BETTER, token_ids=(11,), finish_reason=FinishReason.LENGTH)
    limits = PairLimits(max_length=6, drop_truncated_chosen=False)
    pairs, _ = improved_over_draft([DEMO], [DRAFT], [better], limits)
    assert [p.chosen_ids for p in pairs] == [(11,)]


def test_rows_stay_in_order_and_drops_add_up() -> None:
    demos = [replace(DEMO, id=str(i), source=f"f:{i}") for i in range(4)]
    found = [BETTER, DRAFT, replace(BETTER, token_ids=(13, 2)), DRAFT]
    better = [replace(completion, id=str(i)) for i, completion in enumerate(found)]
    pairs, report = improved_over_draft(demos, [DRAFT] * 4, better, LIMITS)
    assert [p.id for p in pairs] == ["0", "2"]
    assert report.summary() == "2 kept, dropped identical_pair: 2"
    assert report.examples == {"identical_pair": "f:1"}


def test_a_row_without_refinement_is_counted() -> None:
    demos = [replace(DEMO, id=str(i), source=f"f:{i}") for i in range(2)]
    pairs, report = improved_over_draft(demos, [DRAFT] * 2, [replace(BETTER, id="1")], LIMITS)
    assert [p.id for p in pairs] == ["1"]
    assert report.examples == {"refinement_prompt_too_long": "f:0"}


def test_lists_of_unlike_length_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="shorter"):
        improved_over_draft([DEMO, DEMO], [DRAFT], [BETTER], LIMITS)
