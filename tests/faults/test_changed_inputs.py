"""A run's own folder damaged by a flipped bit, a cut, a deletion: what goes on names the file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.loader import load_config
from nemo_selfpref.errors import CheckpointError, ConfigError, SelfPrefError
from nemo_selfpref.files import write_json
from nemo_selfpref.training import stage_files, store
from nemo_selfpref.training.store import (
    RunFolder,
    done_facts,
    is_done,
    mark_done,
    read_tensors,
    write_completions,
    write_label_scores,
    write_pairs,
    write_tensors,
)
from nemo_selfpref.types import Completion, FinishReason, LabelScores, PreferencePair, WeightSet

SCHEMAS = {name: cls.config_class for name, cls in algorithms().items()}
PAIR = PreferencePair("a", (1, 2), (3,), (4, 5))
ANSWER = Completion("a", (5, 2), (-0.5, -2.5), FinishReason.STOP, WeightSet.POLICY, 7)
LOGPS = {"reference.chosen": torch.tensor([-1.5, -2.5]), "reference.rejected": torch.zeros(2)}
METRICS = "".join(json.dumps({"step": n, "loss": 0.5, "tokens": 7}) + "\n" for n in (1, 2, 3))


@cache
def config() -> DictConfig:
    return load_config("dpo", ["data.train_path=[rows.jsonl]"], SCHEMAS)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a finished stage of each kind, and a training stage under way."""
    run = tmp_path / "run"
    RunFolder(run).open(config(), resume=True)
    stages = run / "stages"
    write_completions(stages / "01-answer" / "completions.parquet", [ANSWER])
    write_label_scores(stages / "02-score" / "labels.parquet", [LabelScores((-0.5, -1.0), -0.25)])
    write_json(stages / "03-targets" / "answers.json", {"a": "yes"})
    write_tensors(stages / "04-perplexity" / "logprobs.safetensors", {"sums": torch.ones(3)})
    for name in ("05-first", "06-policy"):
        write_pairs(stages / name / "pairs.parquet", [PAIR])
        write_tensors(stages / name / "reference.safetensors", LOGPS)
        (stages / name / "metrics.jsonl").write_text(METRICS)
    write_pairs(stages / "05-first" / "pairs" / "step-000001.parquet", [PAIR])
    for stage in sorted(stages.iterdir())[:-1]:
        mark_done(stage, {"stage": stage.name[3:], "answers": 3})
    return run


def reopen(run: Path) -> list[str]:
    return RunFolder(run).open(config(), resume=True)


def refusal(run: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        reopen(run)
    return str(caught.value)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


FAULTS = [flip, cut, Path.unlink]
OF_FINISHED_STAGES = [
    "01-answer/completions.parquet",
    "02-score/labels.parquet",
    "03-targets/answers.json",
    "04-perplexity/logprobs.safetensors",
    "05-first/pairs.parquet",
    "05-first/pairs/step-000001.parquet",
    "05-first/reference.safetensors",
    "05-first/metrics.jsonl",
]


def test_a_whole_run_goes_on(run: Path) -> None:
    assert reopen(run) == []
    assert done_facts(run / "stages" / "01-answer") == {"stage": "answer", "answers": 3}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("name", OF_FINISHED_STAGES)
def test_a_damaged_result_is_named(run: Path, name: str, fault: Callable[[Path], None]) -> None:
    path = run / "stages" / name
    size = path.stat().st_size
    fault(path)
    lines = refusal(run).splitlines()
    assert lines[0] == f"{run} is damaged:" and len(lines) == 3
    expected = {
        flip: f"bytes {size} -> {size}",
        cut: f"bytes {size} -> {size - 3}",
        Path.unlink: f"is gone; it had {size} bytes",
    }[fault]
    assert lines[1].startswith(f"  {path}: ") and expected in lines[1]
    assert "remove the folder of this stage and those after it" in lines[2]


def test_without_the_sums_nothing_would_be_noticed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(run / "stages" / "01-answer" / "completions.parquet")
    assert "completions.parquet" in refusal(run)
    monkeypatch.setattr(store, "check_stages", lambda _: [])
    assert reopen(run) == []


def test_every_damaged_file_is_named_at_once(run: Path) -> None:
    for name in OF_FINISHED_STAGES:
        flip(run / "stages" / name)
    assert [line.split(": ")[0].strip() for line in refusal(run).splitlines()[1:-1]] == sorted(
        str(run / "stages" / name) for name in OF_FINISHED_STAGES
    )


def test_a_digit_changed_in_done_json_is_found(run: Path) -> None:
    path = run / "stages" / "01-answer" / "done.json"
    path.write_text(path.read_text().replace('"answers": 3', '"answers": 8'))
    assert f"{path} is damaged: its content has the sum" in refusal(run)
    with pytest.raises(CheckpointError, match=r"done\.json is damaged"):
        done_facts(path.parent)


@pytest.mark.parametrize("key", ["sum", "files"])
def test_a_key_of_done_json_that_is_no_longer_there_is_found(run: Path, key: str) -> None:
    path = run / "stages" / "01-answer" / "done.json"
    path.write_text(path.read_text().replace(f'"{key}"', f'"{key[:-1]}x"'))
    assert f"{path} is damaged" in refusal(run)


def test_done_json_cut_off_is_named(run: Path) -> None:
    path = run / "stages" / "02-score" / "done.json"
    cut(path)
    assert f"{path} cannot be read as JSON" in refusal(run)


def test_a_stage_without_done_json_is_done_again(run: Path) -> None:
    (run / "stages" / "02-score" / "done.json").unlink()
    assert reopen(run) == [] and not is_done(run / "stages" / "02-score")


def test_stages_of_an_earlier_version_are_told_and_read(run: Path) -> None:
    stage = run / "stages" / "01-answer"
    write_json(stage / "done.json", {"stage": "answer", "answers": 3})
    assert reopen(run) == [f"{stage} was finished by an earlier version: its files have no sums"]
    assert done_facts(stage) == {"stage": "answer", "answers": 3}


# -- a stage under way ------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [flip, cut], ids=lambda fault: fault.__name__)
def test_log_probs_scored_once_are_checked_before_they_are_used(
    run: Path, fault: Callable[[Path], None]
) -> None:
    path = run / "stages" / "06-policy" / "reference.safetensors"
    fault(path)
    text = refusal(run)
    assert f"{path} " in text and "Remove the file, and its log-probs are computed again" in text
    path.unlink()
    assert reopen(run) == []


def test_log_probs_of_other_values_are_found(run: Path) -> None:
    path = run / "stages" / "06-policy" / "reference.safetensors"
    assert read_tensors(path).keys() == LOGPS.keys()
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    changed = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(changed, path, said)  # a sound file
    assert "reference.safetensors is damaged: its values have the sum" in refusal(run)
    save_file(changed, path)
    assert "reference.safetensors has no sum: an earlier version wrote it" in refusal(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            METRICS.replace('"step": 2', '"step": 9'),
            "metrics.jsonl:3: is of step 3; expected a later one than 9",
        ),
        (METRICS.replace('"step": 2', '"stop": 2'), "metrics.jsonl:2: is no row of metrics"),
        (METRICS.replace("\n", "\0", 1), "metrics.jsonl:1: is no row of metrics"),
        (METRICS.replace('"step": 2', '"step": 1'), "metrics.jsonl:2: is of step 1; expected a"),
        ("[" * 100_000 + "\n" + METRICS, "metrics.jsonl:1: is no row of metrics"),
    ],
)
def test_damaged_metrics_are_named_with_their_line(run: Path, text: str, message: str) -> None:
    (run / "stages" / "06-policy" / "metrics.jsonl").write_text(text)
    assert message in refusal(run)


def test_a_last_line_of_metrics_cut_by_a_kill_is_no_damage(run: Path) -> None:
    cut(run / "stages" / "06-policy" / "metrics.jsonl")
    assert reopen(run) == []


@pytest.mark.parametrize(("text", "lost"), [(METRICS.split("\n", 1)[1], 3), (None, 5)])
def test_metrics_of_saved_steps_that_are_lost_are_told(
    run: Path, text: str | None, lost: int
) -> None:
    """A power cut may take lines that a kill leaves: the run goes on, and again after that."""
    path = run / "stages" / "06-policy" / "metrics.jsonl"
    (path.parent / "checkpoints" / "step-000005").mkdir(parents=True)
    path.write_text(text or "") if text else path.unlink()
    note = f"{path} lacks {lost} of 5 steps: the closing table's means leave them out"
    assert reopen(run) == [note]
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 6}) + "\n")
    assert reopen(run) == [note.replace("of 5", "of 6")]


# -- what steers the run ----------------------------------------------------------------------


def test_settings_changed_on_disk_are_refused(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("beta: 0.1", "beta: 0.2"))
    with pytest.raises(ConfigError, match=r"config\.yaml is not what this run wrote: sha256 "):
        reopen(run)


def test_settings_cut_off_or_gone_are_named(run: Path) -> None:
    path = run / "config.yaml"
    whole = path.read_text()
    path.write_text(whole[: whole.index("beta") + 4])
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        reopen(run)
    path.unlink()
    assert f"{path} is gone, and the stages beside it cannot be continued" in refusal(run)


@pytest.mark.parametrize("fault", [flip, cut], ids=lambda fault: fault.__name__)
def test_a_damaged_record_of_inputs_is_named(run: Path, fault: Callable[[Path], None]) -> None:
    fault(run / "inputs.json")
    assert f"{run / 'inputs.json'} " in refusal(run)


def test_no_flipped_bit_anywhere_goes_unseen_or_ends_in_a_traceback(run: Path) -> None:
    """One bit in each of 12 places of every file that steers or carries a resumed run."""
    paths = [run / "config.yaml", run / "inputs.json", *(run / "stages").glob("*/done.json")]
    paths += [run / "stages" / name for name in OF_FINISHED_STAGES]
    unseen = []
    for path in paths:
        check = reopen if path.parent == run else stage_files.check_stages
        data = path.read_bytes()
        for number in range(12):
            place = number * (len(data) - 1) // 11
            path.write_bytes(
                data[:place] + bytes([data[place] ^ 1 << number % 8]) + data[place + 1 :]
            )
            try:
                check(run)
                unseen.append((path.name, place, number % 8, data[place : place + 1]))
            except SelfPrefError as error:
                assert path.name in str(error)
        path.write_bytes(data)
    # White space of JSON decides nothing; everything else is covered by a sum.
    assert [found for found in unseen if not found[3].isspace()] == []
    assert stage_files.check_stages(run) == []


# -- as a command -----------------------------------------------------------------------------


@pytest.mark.slow
def test_train_says_what_changed_and_ends_with_status_2(llama_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n}?", "chosen": "It is so.", "rejected": "No."} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        *("train", "--config-name", "dpo", "name=run", f"exp_manager.exp_dir={tmp_path}"),
        *(f"model.restore_from_path={llama_folder}", f"data.train_path=[{data}]"),
        *("data.max_length=120", "data.max_prompt_length=80", "export.hf=false"),
        *("model.micro_batch_size=2", "model.global_batch_size=2"),
        "exp_manager.create_tensorboard_logger=false",
    ]

    def selfpref(status: int) -> str:
        command = [sys.executable, "-m", "nemo_selfpref.cli", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    selfpref(0)
    files = json.loads(next(tmp_path.glob("run/stages/*-policy/done.json")).read_text())["files"]
    assert files.keys() == {"metrics.jsonl", "pairs.parquet", "reference.safetensors"}
    whole = data.read_bytes()
    data.write_bytes(whole + whole.replace(b'?", ', b'??", '))
    refused = selfpref(2)
    assert f"{data} (data.train_path): sha256" in refused and "the cursor no longer fits" in refused
    data.write_bytes(whole)
    shutil.move(data, tmp_path / "moved.jsonl")
    assert f"{data} does not exist" in selfpref(2)
