from __future__ import annotations

import random

import pytest

from nemo_selfpref.demo.task import corrupt, edit_distance, make_instructions, oracle, score
from nemo_selfpref.demo.teacher import reply


def test_oracle() -> None:
    words = "cat red bread wolf saw"
    assert oracle(f"Repeat these words: {words}.") == words
    assert oracle(f"Write only the animals: {words}.") == "cat wolf"
    assert oracle(f"Leave out the animals: {words}.") == "red bread saw"
    with pytest.raises(ValueError, match="not an instruction"):
        oracle("Sing these words: cat.")


def test_score_is_one_minus_the_share_of_edits() -> None:
    instruction = "Repeat these words: cat red bread wolf."
    assert score(instruction, "cat red bread wolf") == 1.0
    assert score(instruction, "cat bread wolf") == 0.75  # one of four is missing
    assert score(instruction, "well cat red bread wolf") == pytest.approx(
        0.8
    )  # one of five is extra
    assert score(instruction, "") == 0.0


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance([], ["a", "b"]) == 2


def test_instructions_differ_and_keep_clear_of_the_excluded() -> None:
    first = make_instructions(50, seed=1)
    second = make_instructions(50, seed=1, exclude=frozenset(first))
    assert len(set(first)) == 50 and not set(first) & set(second)
    assert make_instructions(50, seed=1) == first


def test_corrupt_answers_are_worse() -> None:
    rng = random.Random(0)
    for instruction in make_instructions(200, seed=2):
        assert score(instruction, corrupt(oracle(instruction), rng)) < 1.0


def test_the_teacher_improves_drafts_and_is_not_perfect() -> None:
    rng = random.Random(0)
    gains, right = [], 0
    for instruction in make_instructions(200, seed=3):
        draft = corrupt(oracle(instruction), rng)
        prompt = (
            f"<instruction>\n{instruction}\n</instruction>\n<response_b>\n{draft}\n</response_b>"
        )
        improved = reply(prompt)
        gains.append(score(instruction, improved) - score(instruction, draft))
        right += improved == oracle(instruction)
        assert reply(prompt) == improved
    assert min(gains) >= 0 and 150 < right < 200
