"""`selfpref checkpoint verify | show | diff | prune`, on a run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import MakePolicy

from nemo_selfpref.checkpoint.saver import save_now
from nemo_selfpref.checkpoint.training_state import save_weights, take_training
from nemo_selfpref.cli import main
from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.data.batching import collate
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import SFTObjective

LIGHTNING = {
    "epoch": 0,
    "global_step": 1,
    "pytorch-lightning_version": "2.5",
    "loops": {},
    "lr_schedulers": [],
}
CPU = torch.device("cpu")


@pytest.fixture
def run(
    make_policy: MakePolicy, llama_folder: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> Path:
    """A run with three step checkpoints of one stage, and its final weights."""
    policy = make_policy(llama_folder)
    optimizer = PolicyOptimizer(policy, OptimConfig(lr=1e-3), clip_grad=1.0)
    batch = collate([((5, 6, 7), (8, 9, 2))], [0], paired=False)
    folder = tmp_path / "run" / "stages" / "01-policy" / "checkpoints"
    for step in (1, 2, 3):
        policy.train_batch([batch], SFTObjective(), StepInputs(torch.ones(1)))
        optimizer.step()
        snapshot = take_training(policy, optimizer, LIGHTNING, metrics={"loss": abs(2.0 - step)})
        save_now(folder / f"step-{step:06d}", snapshot, CPU)
    save_weights(tmp_path / "run" / "checkpoint", policy, tokenizer)
    return tmp_path / "run"


def step(run: Path, number: int) -> Path:
    return run / "stages" / "01-policy" / "checkpoints" / f"step-{number:06d}"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, in one line: a table breaks its cells."""
    return capsys.readouterr().out


def test_a_whole_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert said(capsys).count("│ whole") == 4


def test_damage_is_named_and_has_a_status(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harmed = step(run, 2) / "optimizer" / "shard-00000.safetensors"
    flip(harmed)
    (step(run, 3) / "manifest.json").unlink()
    assert main(["checkpoint", "verify", str(run)]) == 1
    text = said(capsys)
    assert f"{harmed} is damaged: SHA-256" in text
    assert f"{step(run, 3) / 'manifest.json'} is missing" in text
    assert text.count("│ whole") == 2
    assert main(["checkpoint", "verify", str(step(run, 1)), str(run / "checkpoint")]) == 0


def test_nothing_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2
    assert f"{tmp_path}: no checkpoint there" in capsys.readouterr().err


def test_what_a_checkpoint_holds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "show", str(step(run, 2)), "--json"]) == 0
    facts = json.loads(said(capsys))
    assert facts["weight_version"] == 2 and facts["metrics"] == {"loss": 0.0}
    assert facts["num_layers"] == 4 and facts["precision"] == "fp32"
    files = [p for p in step(run, 2).rglob("*") if p.is_file() and p.name != "manifest.json"]
    assert facts["parts"]["all"] == sum(p.stat().st_size for p in files)
    assert (
        sum(size for name, size in facts["parts"].items() if name != "all")
        == (facts["parts"]["all"])
    )
    # float32 weights, and two moments of Adam's; indexes and headers weigh on so small a model.
    assert 4.0 <= facts["parts"]["weights"] / facts["parameters"] < 4.4
    assert 8.0 <= facts["parts"]["optimizer"] / facts["parameters"] < 8.8
    assert main(["checkpoint", "show", str(step(run, 2))]) == 0
    assert "bytes a parameter" in said(capsys)


def test_no_checkpoint_to_show(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "show", str(run)]) == 2
    assert f"{run}: no checkpoint.json there" in capsys.readouterr().err


def test_equal_and_different(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "diff", str(step(run, 1)), str(step(run, 1))]) == 0
    assert "the same, file by file" in said(capsys)
    assert main(["checkpoint", "diff", str(step(run, 1)), str(step(run, 2))]) == 1
    text = said(capsys)
    assert "weight_version" in text and "weights" in text and "optimizer" in text
    assert main(["checkpoint", "diff", str(step(run, 3)), str(run / "checkpoint")]) == 1
    lines = [line.split() for line in said(capsys).splitlines()]
    weights = next(line for line in lines if "weights" in line)
    tensors, equal = weights[3], weights[5]
    assert tensors == equal != "0"  # the same weights, one of them without an optimizer


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--keep", "1"], [3]),
        (["--keep", "2"], [2, 3]),
        (["--keep", "1", "--best", "loss"], [2, 3]),
        (["--keep", "1", "--best", "loss", "--mode", "max"], [1, 3]),
        (["--keep", "1", "--dry-run"], [1, 2, 3]),
    ],
)
def test_old_ones_are_deleted(
    run: Path, options: list[str], left: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "prune", str(run), *options]) == 0
    assert sorted(step(run, 1).parent.iterdir()) == [step(run, number) for number in left]
    assert ("would delete" in said(capsys)) == ("--dry-run" in options)


def test_not_all_of_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "prune", str(run), "--keep", "0"]) == 2
    assert "--keep 0: expected 1 or more" in capsys.readouterr().err
    assert main(["checkpoint", "prune", str(run / "stages"), "--keep", "1"]) == 2
    assert "expected a run's folder" in capsys.readouterr().err
