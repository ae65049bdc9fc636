"""What `selfpref inspect` reads out of a run's folder, here one written by hand."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.data.batching import StepPlan
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError, ConfigError
from nemo_selfpref.files import write_json, write_text
from nemo_selfpref.training.inspect import inspect
from nemo_selfpref.training.inspect_facts import pair_facts, printable, run_facts, step_facts
from nemo_selfpref.training.run_files import RunFiles, saved_config
from nemo_selfpref.training.store import (
    DROPPED,
    PLAN,
    write_completions,
    write_dropped,
    write_pairs,
    write_tensors,
)
from nemo_selfpref.types import Completion, DropReport, FinishReason, PreferencePair, WeightSet

ROWS, BATCH, EPOCHS = 5, 2, 3


@dataclass
class Folder:
    path: Path
    tokenizer: ChatTokenizer

    def stage(self, name: str) -> Path:
        made = self.path / "stages" / name
        made.mkdir(parents=True, exist_ok=True)
        return made

    def pair(self, id: str, chosen: str = "yes", **provenance: Any) -> PreferencePair:
        encode = self.tokenizer.encode_text
        return PreferencePair(id, encode("why?"), encode(chosen), encode("no"), 0.75, provenance)

    def steps(self, stage: str, count: int) -> None:
        lines = [json.dumps({"step": n + 1, "loss": n / 4}) for n in range(count)]
        write_text(self.stage(stage) / "metrics.jsonl", "\n".join(lines) + "\n")

    def plan(self, stage: str, rows: int) -> StepPlan:
        """The plan of a stage, as its trainer writes it."""
        plan = StepPlan(rows, BATCH, EPOCHS, seed=7)
        write_json(self.stage(stage) / PLAN, asdict(plan))
        return plan

    def read(self) -> RunFiles:
        return RunFiles(self.path)


@pytest.fixture
def folder(tmp_path: Path, llama_folder: Path, tokenizer: ChatTokenizer) -> Folder:
    cfg = OmegaConf.structured(RunConfig)
    cfg.algorithm = algorithms()["dpo"].config_class
    cfg.name, cfg.model.restore_from_path = "run", str(llama_folder)
    cfg.model.global_batch_size, cfg.trainer.max_epochs = BATCH, EPOCHS
    cfg.data.train_path, cfg.data.max_length, cfg.data.max_prompt_length = ["x.jsonl"], 64, 32
    OmegaConf.resolve(cfg)
    write_text(tmp_path / "run" / "config.yaml", OmegaConf.to_yaml(cfg))
    return Folder(tmp_path / "run", tokenizer)


def given(folder: Folder, steps: int) -> StepPlan:
    """A stage over ROWS pairs known beforehand, so many of its steps made."""
    stage = folder.stage("01-policy")
    write_pairs(stage / "pairs.parquet", [folder.pair(f"p{n}") for n in range(ROWS)])
    sums = {"reference.chosen": torch.arange(5.0), "reference.rejected": -torch.arange(5.0)}
    write_tensors(stage / "reference.safetensors", sums)
    folder.steps("01-policy", steps)
    return folder.plan("01-policy", ROWS)


def online(folder: Folder, made: Sequence[Sequence[str]]) -> None:
    for n, ids in enumerate(made, start=1):
        path = folder.stage("01-policy") / "pairs" / f"step-{n:06d}.parquet"
        write_pairs(path, [folder.pair(id) for id in ids])
    folder.steps("01-policy", len(made))


def test_steps_of_a_given_pair_are_those_of_the_plan(folder: Folder) -> None:
    plan = given(folder, steps=8)  # of 3 epochs of 3 steps
    for row in range(ROWS):
        expected = {str(s + 1): 1 for s in range(8) if row in plan.rows_of_step(s)}
        (found,) = pair_facts(folder.read(), f"p{row}")["found"]
        assert found["steps"] == expected and len(expected) in (2, 3)
        logprobs = {"reference.chosen": float(row), "reference.rejected": -float(row)}
        assert found["logprobs"] == logprobs
    rows = [f"p{n}" for n in plan.rows_of_step(3)]
    facts = {"stage": "01-policy", "step": 4, "pairs": rows, "metrics": {"step": 4, "loss": 0.75}}
    assert step_facts(folder.read(), 4) == facts


def test_texts_counts_and_origin_of_a_pair(folder: Folder) -> None:
    stage = folder.stage("01-policy")
    pair = folder.pair("p", source="x.jsonl:1", scores=[0.5, 0.25])
    longer = replace(pair, augmented_prompt_ids=folder.tokenizer.encode_text("better: why?"))
    write_pairs(stage / "pairs.parquet", [longer])
    folder.plan("01-policy", 1)
    (found,) = pair_facts(folder.read(), "p")["found"]
    texts = {"prompt": "why?", "chosen": "yes", "rejected": "no"}
    assert {name: found[name] for name in texts} == texts
    assert found["augmented_prompt"] == "better: why?"
    assert found["tokens"]["chosen"] == len(pair.chosen_ids)
    assert (found["strength"], found["steps"]) == (0.75, {})
    assert found["provenance"] == {"source": "x.jsonl:1", "scores": [0.5, 0.25]}


def test_a_stage_of_an_earlier_version_has_no_known_plan(folder: Folder) -> None:
    given(folder, steps=4)
    (folder.stage("01-policy") / PLAN).unlink()
    (found,) = pair_facts(folder.read(), "p0")["found"]
    assert found["steps"] is None
    assert step_facts(folder.read(), 4)["pairs"] is None


def test_draws_of_a_pair_made_online(folder: Folder) -> None:
    online(folder, [["a@0", "b@0"], ["a@0", "a@0"], ["c@2", "b@0"]])
    buffered = [folder.pair(id) for id in ("a@0", "d@1")]
    kept = folder.stage("01-policy") / "checkpoints" / "step-000002" / "rollouts"
    write_pairs(kept / "pairs.parquet", buffered)
    state = {"counts": {"a@0": 3, "d@1": 0}, "pushed_steps": {"a@0": 0, "d@1": 1}}
    write_json(kept / "state.json", {"maker": state, "reports": {}})
    (drawn,) = pair_facts(folder.read(), "a@0")["found"]
    assert drawn["steps"] == {"1": 1, "2": 2}
    assert drawn["kept"] == {"checkpoint": "step-000002", "counts": 3, "pushed_steps": 0}
    (waiting,) = pair_facts(folder.read(), "d@1")["found"]
    assert waiting["steps"] == {} and waiting["kept"]["counts"] == 0
    (gone,) = pair_facts(folder.read(), "c@2")["found"]
    assert "kept" not in gone
    assert step_facts(folder.read(), 2)["pairs"] == ["a@0", "a@0"]
    with pytest.raises(ConfigError, match="not trained on at step 3"):
        pair_facts(folder.read(), "a@0", step=3)


def test_an_id_without_a_pair_says_what_is_known(folder: Folder) -> None:
    given(folder, steps=1)
    answer = Completion("q/1", (5, 2), (-1.0, -1.0), FinishReason.STOP, WeightSet.EMA, 6)
    write_completions(folder.stage("02-answers") / "completions.parquet", [answer])
    write_json(folder.path / "summary.json", [{"stage": "pairs", "kept": 5, "dropped": {"x": 2}}])
    with pytest.raises(ConfigError, match=r"Answers to that prompt are in 02-answers. .*: x 2\."):
        pair_facts(folder.read(), "q/1-0@3")
    facts = run_facts(folder.read())
    assert facts["stages"][1] == {
        "stage": "02-answers",
        "state": "begun",
        "rows": 1,
        "steps": 0,
        "weight_versions": [6],
        "sampled_by": ["ema"],
    }
    assert facts["drops"] == [{"stage": "pairs", "kept": 5, "dropped": {"x": 2}, "examples": {}}]


def test_a_run_under_way_is_read(folder: Folder) -> None:
    origin = {"id": "a", "weight_set": "policy", "weight_version": 3, "finish_reason": "stop"}
    path = folder.stage("01-policy") / "pairs" / "step-000001.parquet"
    provenance = {"chosen": origin, "rejected": origin}
    write_pairs(path, [replace(folder.pair("a"), provenance=provenance)])
    with open(folder.stage("01-policy") / "metrics.jsonl", "w", encoding="utf-8") as handle:
        handle.write('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')  # being written
    (stage,) = run_facts(folder.read())["stages"]
    assert (stage["state"], stage["rows"]) == ("at step 1", 1)
    assert (stage["weight_versions"], stage["sampled_by"]) == ([3], ["policy"])


HOSTILE = "a\x1b[2J\x07\x9b31m\u202egnp\u200b\r\x00\n\u2028b\U000e0041"


def test_nothing_that_steers_a_terminal_is_printed(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = folder.pair(HOSTILE, chosen=HOSTILE, source=HOSTILE, **{"\x1b]0;x\x07": 1})
    write_pairs(folder.stage("01-policy") / "pairs.parquet", [pair])
    folder.steps("01-policy", 1)
    for asked in ({"pair": HOSTILE}, {"step": 1}, {}):
        for as_json in (False, True):
            args = {"run": folder.path, "pair": None, "stage": None, "step": None, **asked}
            inspect(argparse.Namespace(**args, json=as_json))
    shown = capsys.readouterr().out
    assert "\\x1b[2J" in shown and "\\u202e" in shown
    assert not {c for c in shown if c != "\n"} & {*HOSTILE[1:], "\x1b", "\x07"} - {*"[2J31mgnpb"}


def test_what_is_printable_stays() -> None:
    text = "Grüße, 日本語, café 😀 \u00a0—"
    assert printable(text) == text
    assert printable("a\nb\t\x7f") == "a\\x0ab\\x09\\x7f"
    assert printable("a\nb", keep="\n") == "a\nb"


def test_colons_and_brackets_are_not_read_as_signs(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(folder.stage("01-policy") / "pairs.parquet", [folder.pair("[red]x", ":bomb:[/b]")])
    args = {"run": folder.path, "pair": "[red]x", "stage": None, "step": None, "json": False}
    inspect(argparse.Namespace(**args))
    shown = capsys.readouterr().out
    assert "pair [red]x in" in shown and ":bomb:[/b]" in shown


def test_no_run_no_stage_no_step(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run"):
        RunFiles(tmp_path)
    with pytest.raises(ConfigError, match="no step recorded"):
        step_facts(folder.read(), 1)
    given(folder, steps=2)
    with pytest.raises(ConfigError, match="recorded the steps 1 to 2"):
        step_facts(folder.read(), 3)
    with pytest.raises(ConfigError, match="There are: 01-policy"):
        pair_facts(folder.read(), "p0", "judge")
    (folder.stage("01-policy") / "pairs.parquet").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"pairs\.parquet"):
        pair_facts(folder.read(), "p0")


def test_settings_are_read_as_plain_values(folder: Folder) -> None:
    path = folder.path / "config.yaml"
    path.write_text(path.read_text() + "extra: ${oc.env:HOME}\n")
    with pytest.raises(ConfigError, match=r"extra|environment"):
        saved_config(folder.path)
    path.write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        saved_config(folder.path)


def test_a_row_that_became_no_pair_is_found_with_its_reason(folder: Folder) -> None:
    given(folder, steps=1)
    report = DropReport()
    report.drop("too_long", "/data/x.jsonl:7")
    report.drop("perplexity_outlier", "/data/x.jsonl:17")
    write_dropped(folder.path / DROPPED / "01-rows.jsonl", {"rows": report})
    with pytest.raises(
        ConfigError, match=r"Dropped: rows, too_long \(/data/x\.jsonl:7\)\. "
    ) as told:
        pair_facts(folder.read(), "x.jsonl:7")
    assert "perplexity_outlier (" not in str(told.value)
