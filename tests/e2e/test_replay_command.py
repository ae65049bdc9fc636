"""A recorded step is computed again to the last bit, and what was changed since is found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from test_methods import arguments, write_inputs

from nemo_selfpref.training.store import read_pairs, read_tensors, write_pairs, write_tensors

CASES = ("dpo", "self_augmented_po", "osp")
"""On given pairs; online with copies that move, and replay; online and judged, after a stage that
teaches the judge."""
pytestmark = pytest.mark.slow
WORKER = Path(__file__).parent / "replay_runs.py"


@dataclass
class Replays:
    """Runs of each case with a checkpoint after the second of their three steps, in FOLDER/one, and
    what later commands said: (exit status, output, errors)."""

    folder: Path

    def of(self, case: str) -> Path:
        return self.folder / "one" / case

    def changed(self, case: str, change: Callable[[Path], None]) -> Path:
        """A copy of a run, changed."""
        copy = self.folder / "changed" / f"{case}-{change.__name__}"
        shutil.copytree(self.of(case), copy, symlinks=True)
        change(copy)
        return copy

    def carry_out(self, *commands: list[Any]) -> list[tuple[int, str, str]]:
        path = self.folder / "commands.json"
        path.write_text(json.dumps([[str(a) for a in command] for command in commands]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        work = [sys.executable, str(WORKER), str(path)]
        done = subprocess.run(work, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        return [tuple(said) for said in json.loads(path.with_suffix(".out").read_text())]


@pytest.fixture(scope="module")
def replays(tmp_path_factory: pytest.TempPathFactory) -> Replays:
    folder = tmp_path_factory.mktemp("replays")
    write_inputs(folder)
    every = "exp_manager.checkpoint_callback_params.every_n_train_steps=2"
    made = Replays(folder)
    for status, out, errors in made.carry_out(*(arguments(folder, "one", c, every) for c in CASES)):
        assert status == 0, out + errors
    return made


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with the time it was written."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def pairs_file(run: Path, step: int) -> Path:
    return next(run.glob("stages/*-policy")) / "pairs" / f"step-{step:06d}.parquet"


def of_json(said: tuple[int, str, str]) -> dict[str, Any]:
    status, out, errors = said
    found = json.loads(out)
    assert status == (0 if found["equal"] else 1), errors
    return found


@pytest.fixture(scope="module")
def again(replays: Replays) -> dict[tuple[str, int, bool], dict[str, Any]]:
    """What replay found of each case, step, and with the pairs sampled again."""
    asked = [(c, step, sampled) for c in CASES for step in (1, 2, 3) for sampled in (False, True)]
    asked = [a for a in asked if a[1] != 1 and not (a[0] == "dpo" and a[2])]
    before = {case: contents(replays.of(case)) for case in CASES}
    commands = [
        ["replay", replays.of(c), "--step", step, "--json", *(["--resample"] if sampled else [])]
        for c, step, sampled in asked
    ]
    found = dict(zip(asked, map(of_json, replays.carry_out(*commands)), strict=True))
    assert {case: contents(replays.of(case)) for case in CASES} == before, "replay wrote into a run"
    return found


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_step_comes_out_the_same_bit_by_bit(again: dict, case: str, step: int) -> None:
    found = again[case, step, False]
    assert found["equal"] and found["tolerance"] == 0 and found["first_step_that_differs"] is None
    assert found["from_step"] == {2: 0, 3: 2}[step]  # without a checkpoint before it, and with one
    names = {metric["name"] for metric in found["metrics"]}
    assert {"loss", "grad_norm", "lr", "tokens", "logps/chosen"} <= names
    assert len(found["rows"]) == 4 and all(row["equal"] for row in found["rows"])
    assert found["damaged"] is None


@pytest.mark.long
@pytest.mark.parametrize("case", CASES[1:])
@pytest.mark.parametrize("step", [2, 3])
def test_sampling_comes_out_the_same_too(again: dict, case: str, step: int) -> None:
    given, sampled = again[case, step, False], again[case, step, True]
    assert given["rows_from"] == "the pairs recorded"
    assert "rollout/generated_tokens" in given["not_computed_again"]
    assert sampled["rows_from"] == "pairs sampled anew"
    assert sampled["equal"] and sampled["rows"] == given["rows"]
    names = {metric["name"] for metric in sampled["metrics"]}
    assert {"rollout/generated_tokens", "rollout/ess"} <= names
    assert ("judge/position_bias" in names) == (case == "osp")


def flip_made_pair(run: Path) -> None:
    path = pairs_file(run, 3)
    first, *others = read_pairs(path)
    flipped = replace(first, chosen_ids=first.rejected_ids, rejected_ids=first.chosen_ids)
    write_pairs(path, [flipped, *others])


def flip_given_pair(run: Path) -> None:
    path = next(run.glob("stages/*-policy")) / "pairs.parquet"
    swapped = [
        replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in read_pairs(path)
    ]
    write_pairs(path, swapped)


def change_loss(run: Path) -> None:
    """The last bit of a recorded loss."""
    path = next(run.glob("stages/*-policy")) / "metrics.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    steps[1]["loss"] *= 1 + 2**-52
    path.write_text("".join(json.dumps(step) + "\n" for step in steps))


def shift_reference(run: Path) -> None:
    """The log-probs of one side: a shift of both would cancel."""
    path = next(run.glob("stages/*-policy")) / "reference.safetensors"
    found = read_tensors(path)
    write_tensors(path, {**found, "reference.chosen": found["reference.chosen"] + 1})


def test_what_was_changed_since_is_found(replays: Replays) -> None:
    runs = [
        (replays.changed("self_augmented_po", flip_made_pair), 3),
        (replays.changed("dpo", flip_given_pair), 3),
        (replays.changed("dpo", change_loss), 2),
        (replays.changed("osp", change_loss), 2),
    ]
    commands = [["replay", run, "--step", step, "--json"] for run, step in runs]
    near = [*commands[2], "--tolerance", "1e-9"]
    said = [of_json(s) for s in replays.carry_out(*commands, near)]
    assert [found["equal"] for found in said] == [False, False, False, False, True]
    made, given, loss, _, _ = said
    wrong = [{m["name"] for m in found["metrics"] if not m["equal"]} for found in said]
    # The recorded pair is trained on, so its loss shows it ...
    assert "loss" in wrong[0] and made["first_step_that_differs"] == 3
    # ... a given one is made again, so it is the record that differs, and the numbers do not.
    assert [row["equal"] for row in given["rows"]] == [False] * 4 and wrong[1] == set()
    assert wrong[2] == wrong[3] == {"loss"} and all(row["equal"] for row in loss["rows"])
    assert all("sha256" in found["damaged"] for found in said)


def test_log_probs_scored_once_are_scored_anew_or_taken_as_recorded(replays: Replays) -> None:
    shifted = replays.changed("dpo", shift_reference)
    anew = ["replay", shifted, "--step", 2, "--json"]
    taken = [*anew, "--recorded-reference"]
    whole = ["replay", replays.of("dpo"), "--step", 2, "--json", "--recorded-reference"]
    found = [of_json(said) for said in replays.carry_out(anew, taken, whole)]
    assert [f["equal"] for f in found] == [True, False, True]
    assert found[1]["first_step_that_differs"] == 1
    assert "reference.safetensors" in found[0]["damaged"] and found[2]["damaged"] is None


def test_replay_says_what_it_compared(replays: Replays) -> None:
    bad = replays.of("dpo").parent.parent / "changed" / "dpo-change_loss"
    if not bad.exists():
        replays.changed("dpo", change_loss)
    (status, shown, _), (other, differs, _), refused, late, wrong = replays.carry_out(
        ["replay", replays.of("dpo"), "--step", 3],
        ["replay", bad, "--step", 2],
        ["replay", replays.of("dpo"), "--step", 3, "--set", "model.optim.lr=1"],
        ["replay", replays.of("dpo"), "--step", 4],
        ["replay", replays.of("osp"), "--step", 1, "--stage", "judge", "--json"],
    )
    assert status == 0 and "from checkpoint step-000002" in shown and "equal, bit by bit" in shown
    assert other == 1 and "DIFFERS" in differs and "the first step that differs is 2" in differs
    assert refused[0] == 2 and "+model.optim.lr: 1" in refused[2]
    assert late[0] == 2 and "recorded the steps 1 to 3" in late[2]
    judge = of_json(wrong)
    assert judge["equal"] and {row["equal"] for row in judge["rows"]} == {None}


def test_inspect_reads_what_runs_wrote(replays: Replays) -> None:
    run = replays.of("self_augmented_po")
    drawn = [[p.id for p in read_pairs(pairs_file(run, step))] for step in (1, 2, 3)]
    id = drawn[1][0]
    given, made, table, step = replays.carry_out(
        ["inspect", replays.of("dpo"), "--pair", "r3", "--json"],
        ["inspect", run, "--pair", id, "--json"],
        ["inspect", replays.of("osp")],
        ["inspect", run, "--step", 2, "--json"],
    )
    (row,) = json.loads(given[1])["found"]
    assert (
        row["chosen"] == "It is 9, gladly. <|im_end|>" and "How much is 3 plus 6?" in row["prompt"]
    )
    assert len(row["steps"]) == 1 and row["logprobs"]["reference.chosen"] < 0
    (pair,) = json.loads(made[1])["found"]
    counts = {str(n + 1): ids.count(id) for n, ids in enumerate(drawn) if id in ids}
    assert pair["steps"] == counts
    origin = pair["provenance"]
    assert (origin["prompt"], origin["engine"]) == (id.partition("@")[0], "embedded")
    assert origin["rejected"]["weight_set"] == "ema"
    assert origin["ema_step"] == origin["rejected"]["weight_version"] == origin["weight_version"]
    assert json.loads(step[1])["pairs"] == drawn[1]
    assert table[0] == 0 and "02-policy" in table[1] and "judged pairs" in table[1]


def test_a_judged_pair_keeps_its_verdicts(replays: Replays) -> None:
    for pair in read_pairs(pairs_file(replays.of("osp"), 2)):
        origin = pair.provenance
        assert sum(origin["judge"]["orders"]) / 2 == pytest.approx(pair.strength)
        assert origin["judge"]["weight_set"] == origin["scored_by"] == "frozen"
        assert origin["scores"][0] >= origin["scores"][1] and origin["step"] == 1
        assert origin["chosen"]["id"].startswith(f"{origin['prompt']}/")


@pytest.mark.long
def test_another_layout_differs_in_last_bits_alone(replays: Replays, selfpref: Any) -> None:
    layout = ("--set", "trainer.devices=2", "model.tensor_model_parallel_size=2")
    command = ("replay", replays.of("self_augmented_po"), "--step", "3", *layout)
    said = selfpref(*command, "--json", status=1)
    found = json.loads(said.stdout[said.stdout.index("{") :])
    assert not found["equal"] and found["from_step"] == 2
    assert len(found["rows"]) == 4 and all(row["equal"] for row in found["rows"])
    for metric in found["metrics"]:
        share = abs(metric["difference"]) / max(1.0, abs(metric["recorded"]))
        assert share < 1e-3, metric  # two processes add up in another order
