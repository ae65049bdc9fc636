"""Steps that are not made: counted, written down, and the end of the run if there are too many."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from nemo_selfpref.errors import TrainingError
from nemo_selfpref.megatron.nonfinite import Fault, FaultKind
from nemo_selfpref.models.nonfinite import NonFiniteSteps, refuse_nonfinite
from nemo_selfpref.models.preference_model import _finite
from nemo_selfpref.types import PreferencePair

ROWS = [PreferencePair(f"r{n}", (5,), (6, 2), (7, 2)) for n in range(12)]
IN_LOSS = Fault(FaultKind.LOSS, rows=(3,), micro_batches=((1, 0),), ranks=(1,))
OVERFLOW = Fault(FaultKind.GRADIENT)
IN_WEIGHTS = Fault(FaultKind.WEIGHTS, tensors=("embedding",), ranks=(0,))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_and_a_word_for_each_step(tmp_path: Path) -> None:
    said: list[str] = []
    steps = NonFiniteSteps(most=2, path=tmp_path / "stage" / "nonfinite.jsonl", say=said.append)
    steps.skip("policy", 7, IN_LOSS, ROWS)
    assert (steps.in_a_row, steps.total) == (1, 1)
    assert lines(tmp_path / "stage" / "nonfinite.jsonl") == [
        {
            "step": 7,
            "kind": "loss",
            "rows": ["r3"],
            "micro_batches": [{"replica": 1, "number": 0}],
            "passes": {},
            "tensors": [],
            "ranks": [1],
            "action": "skip",
        }
    ]
    assert said == [
        "warning: stage policy, step 7: the loss is not finite (rows: r3; micro-batches: 0 of "
        "replica 1; ranks: 1). The step is skipped, number 1 in a row of at most 2 "
        "(trainer.max_nonfinite_steps); the weights are as before it."
    ]


def test_only_steps_in_a_row_count() -> None:
    steps = NonFiniteSteps(most=2)
    for _ in range(3):
        steps.skip("policy", 1, IN_LOSS, ROWS)
        steps.skip("policy", 2, OVERFLOW, ROWS)
        steps.finite()
    assert (steps.in_a_row, steps.total) == (0, 6)
    steps.skip("policy", 10, IN_LOSS, ROWS)
    steps.skip("policy", 11, IN_LOSS, ROWS)
    with pytest.raises(TrainingError, match=r"step 12: the gradient .*\(no row or micro-batch"):
        steps.skip("policy", 12, OVERFLOW, ROWS)


def test_the_count_is_taken_back(tmp_path: Path) -> None:
    steps = NonFiniteSteps(most=1)
    steps.skip("policy", 1, IN_LOSS, ROWS)
    again = NonFiniteSteps(most=1)
    again.load_state(json.loads(json.dumps(steps.state())))
    assert (again.in_a_row, again.total) == (1, 1)
    with pytest.raises(TrainingError, match="1 steps in a row were skipped before"):
        again.skip("policy", 2, IN_LOSS, ROWS)
    fresh = NonFiniteSteps()
    fresh.load_state({})  # of a checkpoint that knows no such count
    assert (fresh.in_a_row, fresh.total) == (0, 0)


def test_halt(tmp_path: Path) -> None:
    steps = NonFiniteSteps(halt=True, path=tmp_path / "nonfinite.jsonl")
    with pytest.raises(TrainingError, match=r"trainer\.nonfinite=skip leaves such steps out"):
        steps.skip("policy", 1, IN_LOSS, ROWS)
    assert [line["action"] for line in lines(tmp_path / "nonfinite.jsonl")] == ["halt"]
    assert steps.total == 0


def test_weights_end_the_run_at_once() -> None:
    steps = NonFiniteSteps(most=100)
    with pytest.raises(TrainingError, match=r"\(weights: embedding; ranks: 0\)") as found:
        steps.skip("policy", 1, IN_WEIGHTS, ROWS)
    assert "Go on from a checkpoint of before" in str(found.value)


def test_lines_of_steps_to_come_go(tmp_path: Path) -> None:
    path = tmp_path / "nonfinite.jsonl"
    steps = NonFiniteSteps(most=9, path=path)
    steps.begin(0)  # there is no file yet
    for step in (2, 5, 6):
        steps.skip("policy", step, OVERFLOW, ROWS)
    with open(path, "a") as handle:
        handle.write('{"step": 7, "ki')  # cut short
    steps.begin(5)
    assert [line["step"] for line in lines(path)] == [2, 5]


def test_a_message_names_some_and_the_file_all(tmp_path: Path) -> None:
    said: list[str] = []
    steps = NonFiniteSteps(path=tmp_path / "nonfinite.jsonl", say=said.append)
    steps.skip("policy", 1, Fault(FaultKind.LOSS, rows=tuple(range(12))), ROWS)
    assert "(rows: r0, r1, r2, r3, r4, r5, r6, r7 and 4 more)" in said[0]
    assert lines(tmp_path / "nonfinite.jsonl")[0]["rows"] == [row.id for row in ROWS]


def test_passes_are_named_with_their_rows(tmp_path: Path) -> None:
    fault = Fault(FaultKind.PASSES, rows=(0, 4), passes=(("reference", (0,)), ("refined", (0, 4))))
    said: list[str] = []
    steps = NonFiniteSteps(path=tmp_path / "nonfinite.jsonl", say=said.append)
    steps.skip("policy", 1, fault, ROWS)
    (line,) = lines(tmp_path / "nonfinite.jsonl")
    assert line["passes"] == {"reference": ["r0"], "refined": ["r0", "r4"]}
    assert "(passes: reference, refined; rows: r0, r4)" in said[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_probs_scored_before_training(value: float) -> None:
    chosen, rejected = torch.zeros(12), torch.zeros(12)
    refuse_nonfinite("policy", {"reference.chosen": chosen, "reference.rejected": rejected}, ROWS)
    rejected[4] = value
    scored = {"reference.chosen": chosen, "reference.rejected": rejected}
    with pytest.raises(TrainingError, match=re.escape("(passes: reference; rows: r4)")):
        refuse_nonfinite("policy", scored, ROWS)


def test_measurements_that_are_not_finite_are_counted() -> None:
    assert _finite({"a": 1.0, "b": 0.0}) == {"a": 1.0, "b": 0.0}
    assert _finite({"a": 1.0, "b": math.nan, "c": -math.inf}) == {"a": 1.0, "nonfinite_metrics": 2}
