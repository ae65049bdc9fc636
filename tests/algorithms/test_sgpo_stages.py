from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted_run import ScriptedRun, demonstration, question

from nemo_selfpref.algorithms.base import TrainSettings, instruction_text
from nemo_selfpref.algorithms.improver import ImproverConfig
from nemo_selfpref.algorithms.sgpo import SGPO
from nemo_selfpref.algorithms.sgpo_variants import SGPOConfig
from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.config.schema import DataConfig, RunConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.objectives.objective import DPOObjective, SFTObjective
from nemo_selfpref.rollout.targets import TargetsConfig, TargetSource
from nemo_selfpref.types import Demonstration, PreferencePair

IDS = ["r1", "r2", "r3", "r4"]
CFG = RunConfig(name="test", data=DataConfig(train_path=[], max_length=2048))


@pytest.fixture
def demos(tokenizer: ChatTokenizer) -> list[Demonstration]:
    return [question(tokenizer, id) for id in IDS]


@pytest.fixture
def run(tokenizer: ChatTokenizer, demos: list[Demonstration]) -> ScriptedRun:
    return ScriptedRun(CFG, tokenizer, demos=demos)


def method(folder: Path, answers: dict[str, str] | None = None, **settings: object) -> SGPO:
    """SGPO whose external model's answers lie in a file."""
    found = {f"{id}/{kind}": f"target {kind} {id}" for id in IDS for kind in ("improve", "answer")}
    lines = [json.dumps({"id": k, "answer": v}) for k, v in {**found, **(answers or {})}.items()]
    path = folder / "answers.jsonl"
    path.write_text("\n".join(lines))
    targets = TargetsConfig(source=TargetSource.file, path=str(path))
    return SGPO(SGPOConfig(targets=targets, **settings))  # type: ignore[arg-type]


def test_stages_in_order(run: ScriptedRun, tmp_path: Path) -> None:
    sgpo = method(tmp_path)
    sgpo.check(CFG)
    sgpo.run(run)
    assert run.stages == [
        "draft",
        "targets",
        "perplexity-improve",
        "perplexity-answer",
        "improver",
        "answer",
        "improve",
        "policy",
    ]


def test_the_improver_learns_from_both_sets_of_targets(run: ScriptedRun, tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e-4)
    improver = ImproverConfig(max_epochs=2, global_batch_size=8, optim=optim)
    method(tmp_path, improver=improver).run(run)
    training = run.trained[0]
    assert (training.name, training.objective) == ("improver", SFTObjective())
    assert training.settings == TrainSettings(2, 8, optim)
    rows = {row.id: row.response for row in training.rows if isinstance(row, Demonstration)}
    assert rows == {
        f"{id}/{kind}": f"target {kind} {id}" for id in IDS for kind in ("improve", "answer")
    }


def test_the_reference_is_in_the_questions_but_never_in_the_improvers_prompt(
    run: ScriptedRun, tmp_path: Path
) -> None:
    method(tmp_path).run(run)
    asked = {request.id: request.prompt for request in run.asked}
    assert list(asked)[:2] == ["r1/improve", "r1/answer"]
    for part in ("question r1", "draft answer to r1", "reference r1"):
        assert part in asked["r1/improve"]
    assert asked["r1/answer"] == "question r1"
    for row in run.trained[0].rows:
        prompt = run.tokenizer.decode(row.prompt_ids)
        id = row.id.split("/")[0]
        assert f"question {id}" in prompt and f"draft answer to {id}" in prompt
        assert f"reference {id}" not in prompt


def test_targets_are_scored_on_the_plain_prompt(run: ScriptedRun, tmp_path: Path) -> None:
    method(tmp_path).run(run)
    plain = run.tokenizer.decode(run.demos[0].prompt_ids)
    assert run.scored[0] == (plain, "target improve r1")
    assert run.scored[4] == (plain, "target answer r1")


def test_each_set_of_targets_is_filtered_on_its_own(run: ScriptedRun, tmp_path: Path) -> None:
    # 2, 2, 2, 50 has quartiles 2 and 14 (2 + 0.25 * 48), fences -16 and 32; the other set is 40
    # throughout, which lies beyond those fences and within its own.
    run.ppl = {"target improve r4": 50.0, **{f"target answer {id}": 40.0 for id in IDS}}
    method(tmp_path).run(run)
    ids = [row.id for row in run.trained[0].rows]
    assert ids == ["r1/improve", "r2/improve", "r3/improve", *(f"{id}/answer" for id in IDS)]
    assert run.notes["targets (improve)"].dropped == {"perplexity_outlier": 1}
    assert run.notes["targets (improve)"].kept == 3
    assert run.notes["targets (answer)"].dropped == {}


def test_targets_that_are_too_long_are_counted(run: ScriptedRun, tmp_path: Path) -> None:
    answers = {"r2/improve": "word " * 3000}
    method(tmp_path, answers).run(run)
    assert run.notes["targets (improve)"].dropped == {"too_long": 1}
    assert "r2/improve" not in [row.id for row in run.trained[0].rows]


def test_the_improver_may_learn_from_the_first_rows_only(run: ScriptedRun, tmp_path: Path) -> None:
    method(tmp_path, improver=ImproverConfig(num_prompts=1)).run(run)
    assert list(run.prompts["draft"]) == ["r1"]
    assert [row.id for row in run.trained[0].rows] == ["r1/improve", "r1/answer"]
    assert list(run.prompts["answer"]) == IDS and len(run.trained[1].rows) == 4


def test_the_policy_trains_on_improved_over_its_own_answer(
    run: ScriptedRun, tmp_path: Path
) -> None:
    method(tmp_path, beta=0.05).run(run)
    training = run.trained[1]
    assert (training.name, training.objective) == ("policy", DPOObjective(0.05))
    assert training.settings == TrainSettings()
    decode = run.tokenizer.decode
    for row, demo in zip(training.rows, run.demos, strict=True):
        assert isinstance(row, PreferencePair)
        assert row.prompt_ids == demo.prompt_ids
        assert decode(row.chosen_ids) == f"improve answer to {row.id}"
        assert decode(row.rejected_ids) == f"answer answer to {row.id}"


def test_refinement_shows_the_answer_and_the_reference(run: ScriptedRun, tmp_path: Path) -> None:
    method(tmp_path).run(run)
    prompt = run.prompts["improve"]["r3"]
    for part in ("question r3", "answer answer to r3", "reference r3"):
        assert part in prompt


def test_an_answer_that_did_not_change_is_no_pair(run: ScriptedRun, tmp_path: Path) -> None:
    run.replies = {"answer": {"r2": "same"}, "improve": {"r2": "same"}}
    method(tmp_path).run(run)
    assert [row.id for row in run.trained[1].rows] == ["r1", "r3", "r4"]
    assert run.notes["pairs"].dropped == {"identical_pair": 1}


def test_a_system_message_stays_outside_the_slots(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    turns = [("system", "be brief"), ("user", "question r1"), ("assistant", "reference r1")]
    demo = demonstration(tokenizer, "r1", *turns)
    assert instruction_text(demo) == "question r1"
    run = ScriptedRun(CFG, tokenizer, demos=[demo])
    method(tmp_path).run(run)
    assert all("be brief" not in request.prompt for request in run.asked)
    # The system turn opens the improver's prompt and the refinement prompt, once.
    assert run.tokenizer.decode(run.trained[0].rows[0].prompt_ids).count("be brief") == 1
    assert run.prompts["improve"]["r1"].count("be brief") == 1


def test_a_refinement_prompt_without_room_costs_only_its_pair(
    run: ScriptedRun, tmp_path: Path
) -> None:
    run.replies["answer"] = {"r2": "word " * 1000}
    run.longest_prompt = 1000
    method(tmp_path).run(run)
    assert [row.id for row in run.trained[1].rows] == ["r1", "r3", "r4"]
    assert run.notes["pairs"].dropped == {"refinement_prompt_too_long": 1}
