"""Every generated pair says where it comes from, in the same words whatever the method."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_run import (
    CFG,
    QUALITY,
    ScriptedRun,
    carry_out,
    demonstration,
    four_answers,
    preference,
    prefers,
    question,
)

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.algorithms.judged import Pairing, Sampling, Target
from nemo_selfpref.algorithms.osp import SoftLoss
from nemo_selfpref.algorithms.sgpo_variants import Variant
from nemo_selfpref.config.schema import RolloutConfig, RolloutEngineName
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.rollout.targets import TargetsConfig, TargetSource
from nemo_selfpref.types import PreferencePair

IDS = ("r1", "r2", "r3", "r4", "r5")
IMITATING = {"raft", "sft"}
GIVEN = {"dpo", "cdpo", "ipo", "orpo", "sr_dpo", "sr_ipo"}
CASES: dict[str, dict[str, Any]] = {
    "spin": {"iterations": 2},
    "self_rewarding": {"iterations": 2},
    "rso": {"num_samples": 4, "num_accepted": 2},
    "osp": {"num_samples": 4},
    "osp-spin": {"num_samples": 4, "pairing": Pairing.spin},
    "osp-difference": {"num_samples": 4, "target": Target.difference},
    "osp-hard": {"num_samples": 4, "loss": SoftLoss.dpo},
    "self_augmented_po": {"segment_length": 2},
    "self_augmented_po-whole": {"segment": False},
    "sgpo": {},
    "sgpo-diamond": {"variant": Variant.diamond},
}
CFG_VLLM = replace(CFG, rollout=RolloutConfig(engine=RolloutEngineName.vllm))


def targets(folder: Path) -> TargetsConfig:
    """An external model's answers in a file."""
    answers = [{"id": f"{i}/{k}", "answer": f"{k} {i}"} for i in IDS for k in ("improve", "answer")]
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return TargetsConfig(source=TargetSource.file, path=str(path))


def pairs_of(case: str, run: ScriptedRun, folder: Path) -> list[PreferencePair]:
    method, settings = case.split("-")[0], dict(CASES[case])
    if method == "sgpo":
        settings["targets"] = targets(folder)
    trained = carry_out(method, run, **settings)
    return [row for t in trained for row in t.rows if isinstance(row, PreferencePair)]


@pytest.fixture
def run(tokenizer: ChatTokenizer) -> ScriptedRun:
    made = ScriptedRun(CFG_VLLM, tokenizer, demos=[question(tokenizer, id) for id in IDS])
    answers = four_answers(*IDS)
    made.replies = dict.fromkeys(("answers", "answers-0", "answers-1"), answers)
    references = {f"reference {id}": 1.0 for id in IDS}
    made.verdict = prefers({**QUALITY, **references})
    return made


def test_every_method_that_makes_pairs_has_a_case() -> None:
    assert {case.split("-")[0] for case in CASES} == set(algorithms()) - IMITATING - GIVEN


@pytest.mark.parametrize("case", CASES)
def test_a_pair_names_prompt_engine_weights_and_answers(
    case: str, run: ScriptedRun, tmp_path: Path
) -> None:
    pairs = pairs_of(case, run, tmp_path)
    assert pairs
    demos = {demo.id: demo for demo in run.demos}
    for pair in pairs:
        origin = json.loads(json.dumps(pair.provenance, allow_nan=False))
        demo = demos[origin["prompt"]]
        assert (origin["source"], pair.prompt_ids) == (demo.source, demo.prompt_ids)
        assert origin["engine"] == "vllm"
        sampled = [s for s in (origin["chosen"], origin["rejected"]) if s != "data"]
        assert sampled and all(s["id"].startswith(demo.id) for s in sampled)
        assert {s["weight_version"] for s in sampled} == {origin["weight_version"]}
        assert {s["weight_set"] for s in sampled} <= {w.value for w in run.weights.values()}
        averaged = sampled[0]["weight_set"] == "ema"
        assert origin.get("ema_step") == (origin["weight_version"] if averaged else None)
        assert averaged == case.startswith("self_augmented_po")


def test_what_made_it_is_told_by_step_or_iteration(run: ScriptedRun, tmp_path: Path) -> None:
    told = {case: pairs_of(case, replace_run(run), tmp_path) for case in CASES}
    for case, pairs in told.items():
        name = {"spin": "iteration", "self_rewarding": "iteration"}.get(case, "step")
        for pair in pairs:
            if "@" in pair.id:
                assert pair.id.endswith(f"@{pair.provenance[name]}"), case
    assert {p.provenance["iteration"] for p in told["spin"]} == {0, 1}


def replace_run(run: ScriptedRun) -> ScriptedRun:
    """The same script, with nothing written down yet."""
    fresh = ScriptedRun(run.cfg, run.tokenizer, demos=run.demos)
    fresh.replies, fresh.verdict = run.replies, run.verdict
    return fresh


def test_judged_pairs_keep_both_orders_and_their_scores(run: ScriptedRun, tmp_path: Path) -> None:
    """A judge that favours place A by ln 4 says A with 0.8 for answers as good."""
    run.verdict = lambda prompt: (1.3862943611198906, 0.0)
    first, *_ = pairs_of("osp", run, tmp_path)
    judge = first.provenance["judge"]
    assert judge["orders"] == pytest.approx([0.8, 0.2]) and first.strength == pytest.approx(0.5)
    assert (judge["weight_set"], judge["engine"]) == ("frozen", "vllm")
    assert first.provenance["scores"] == pytest.approx([0.5, 0.5])
    assert first.provenance["scored_by"] == "frozen"


def test_given_pairs_that_are_judged_keep_their_source(run: ScriptedRun) -> None:
    run.pairs = [preference(run.tokenizer, "p", "a1", "a3")]
    (training,) = carry_out("osp", run, sampling=Sampling.offline)
    (pair,) = training.rows
    assert isinstance(pair, PreferencePair)
    assert pair.provenance["source"] == "pairs.jsonl:p"
    assert pair.provenance["judge"]["orders"] == pytest.approx([27 / 28, 27 / 28])


def test_who_scored_is_the_one_who_was_asked(run: ScriptedRun, tmp_path: Path) -> None:
    rewarding = pairs_of("self_rewarding", replace_run(run), tmp_path)
    assert {pair.provenance["scored_by"] for pair in rewarding} == {"policy"}
    thinned = pairs_of("rso", replace_run(run), tmp_path)
    assert {pair.provenance["scored_by"] for pair in thinned} == {"frozen"}


def test_a_pair_tells_what_the_filter_found_of_its_targets(
    run: ScriptedRun, tmp_path: Path
) -> None:
    run.ppl = {f"improve {id}": value for id, value in zip(IDS, (1, 2, 3, 4, 100), strict=True)}
    pairs = {pair.id: pair.provenance["targets"] for pair in pairs_of("sgpo", run, tmp_path)}
    # Quartiles 2 and 4, so the fences lie at 2 - 3 and 4 + 3.
    inside = {"perplexity": 3, "bounds": [-1.0, 7.0], "kept": True}
    assert pairs["r3"]["improve"] == inside
    assert pairs["r5"]["improve"] == {**inside, "perplexity": 100, "kept": False}
    assert pairs["r5"]["answer"] == {"perplexity": 2.0, "bounds": [2.0, 2.0], "kept": True}


def test_bounds_that_are_infinite_are_none(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    """Fewer than four values have no fences; a perplexity too large for a float has no number."""
    row = demonstration(tokenizer, "r1", ("user", "question r1"), ("assistant", "reference r1"))
    run = ScriptedRun(CFG, tokenizer, demos=[row], ppl={"improve r1": float("inf")})
    (pair,) = pairs_of("sgpo", run, tmp_path)
    found = pair.provenance["targets"]
    assert found["improve"] == {"perplexity": None, "bounds": [None, None], "kept": False}
    assert found["answer"]["kept"] and pair.provenance["engine"] == "embedded"
