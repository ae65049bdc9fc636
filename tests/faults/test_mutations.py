"""Two hundred damages to a run's folder, drawn from a seed: each is found and its file named."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import Damage, break_file, damages_of
from broken_runs import CHECKPOINTS, HF, WEIGHTS, Saved, break_all, files_below
from tiny import save_llama

from nemo_selfpref import cli
from nemo_selfpref.algorithms.base import Averaging, Reference, algorithms
from nemo_selfpref.checkpoint.export import export_checkpoint
from nemo_selfpref.checkpoint.saver import save_now
from nemo_selfpref.checkpoint.seal import problems, seal
from nemo_selfpref.checkpoint.sharded import ShardWriter, write_index
from nemo_selfpref.checkpoint.snapshot import Snapshot
from nemo_selfpref.checkpoint.training_state import save_weights, take_training
from nemo_selfpref.config.loader import load_config
from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.config.schema import CheckpointParams, RefMode
from nemo_selfpref.files import sha256_of
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.pairing.replay import ReplayBuffer
from nemo_selfpref.training.checkpoints import StageCheckpoints
from nemo_selfpref.training.convert import single_process_policy
from nemo_selfpref.training.copies import StageCopies
from nemo_selfpref.training.reference_segments import Segments
from nemo_selfpref.training.run_files import saved_config
from nemo_selfpref.training.store import (
    RunFolder,
    mark_done,
    write_completions,
    write_label_scores,
    write_pairs,
    write_tensors,
)
from nemo_selfpref.types import Completion, FinishReason, LabelScores, PreferencePair, WeightSet

CPU = torch.device("cpu")
LIGHTNING: dict[str, Any] = {
    "epoch": 0,
    "global_step": 0,
    "pytorch-lightning_version": "2.5",
    "loops": {"fit_loop": {"state_dict": {}}},
    "lr_schedulers": [{"last_epoch": 0}],
}


# -- a run made by hand -------------------------------------------------------------------------


def pairs(start: int) -> list[PreferencePair]:
    ids = range(start, start + 30)
    return [PreferencePair(f"p{n}", (n, 1, 2), (n, 3), (4, n, 5)) for n in ids]


def buffer_of(step: int) -> ReplayBuffer:
    buffer = ReplayBuffer(50)
    buffer.push(pairs(100 * step), step)
    buffer.draw(8, step, step)
    return buffer


def rollouts(snapshot: Snapshot, step: int) -> None:
    buffer = buffer_of(step)
    snapshot.add_json("rollouts/state.json", {"maker": buffer.state()})
    snapshot.add_file("rollouts/pairs.parquet", lambda path: write_pairs(path, buffer.pairs))


def checkpoint(stage: Path, policy: Policy, optimizer: PolicyOptimizer, step: int) -> Path:
    """A checkpoint with an average, a reference and a replay buffer."""
    copies = StageCopies(WeightSets(policy), Reference(RefMode.ema, 1), Averaging(0.5, 1))
    copies.begin(keep_reference=True)
    with torch.no_grad():
        next(iter(policy.module.parameters())).mul_(1 + step)
    copies.after_step(step)

    def more(snapshot: Snapshot) -> None:
        copies.save(snapshot)
        rollouts(snapshot, step)

    facts = {**LIGHTNING, "global_step": step}
    target = stage / "checkpoints" / f"step-{step:06d}"
    save_now(target, take_training(policy, optimizer, facts, more), CPU)
    return target


def two_shards(folder: Path) -> Path:
    """A folder as two ranks leave it: shards of one size."""
    writers = [ShardWriter(rank) for rank in range(2)]
    for rank, writer in enumerate(writers):
        writer.add("w", torch.arange(64.0).reshape(8, 8) + rank, (8 * rank, 0), (16, 8))
    written = [path for path in (writer.write(folder / "weights") for writer in writers) if path]
    entries = [entry for writer in writers for entry in writer.entries]
    write_index(folder / "weights", entries, {path.name: sha256_of(path) for path in written})
    seal(folder)
    return folder


def stages_of(run: Path) -> None:
    stages = run / "stages"
    for n, name in enumerate(("01-answer", "02-more")):
        answers = [
            Completion(f"a{k}", (k, n), (-0.5, -1.0), FinishReason.STOP, WeightSet.POLICY, n)
            for k in range(40)
        ]
        write_completions(stages / name / "completions.parquet", answers)
        scores = [LabelScores((-0.5 * k, -1.0), -0.25) for k in range(n + 9)]
        write_label_scores(stages / name / "labels.parquet", scores)
    for n, name in enumerate(("03-first", "04-policy")):
        write_pairs(stages / name / "pairs.parquet", pairs(n))
        logps = {"reference.chosen": torch.arange(2000.0) + n}
        write_tensors(stages / name / "reference.safetensors", logps)
        steps = [json.dumps({"step": k, "loss": 0.5, "tokens": 7}) + "\n" for k in (1, 2)]
        (stages / name / "metrics.jsonl").write_text("".join(steps))
    write_pairs(stages / "03-first" / "pairs" / "step-000001.parquet", pairs(5))
    for stage in sorted(stages.iterdir())[:-1]:
        mark_done(stage, {"stage": stage.name[3:], "weight_version": 3})


def cache_of(root: Path) -> Path:
    for n in range(4):
        segments = Segments(root, lambda _: None)
        segments.open(f"context-{n % 2}")
        for k in range(150):
            segments.add(bytes([n, k] * 16), (-1.5 * k, k))
        segments.flush()
    return root


@pytest.fixture(scope="module")
def by_hand(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    run = tmp_path_factory.mktemp("by-hand") / "run"
    policy, start = single_process_policy(llama_folder)
    optimizer = PolicyOptimizer(policy, OptimConfig(), clip_grad=1.0)
    schemas = {name: cls.config_class for name, cls in algorithms().items()}
    cfg = load_config("dpo", ["data.train_path=[rows.jsonl]"], schemas)
    RunFolder(run).open(cfg, resume=True)
    stages_of(run)
    steps = [checkpoint(run / "stages" / "04-policy", policy, optimizer, n) for n in (1, 2)]
    weights = [run / "stages" / "03-first" / "weights", run / "checkpoint"]
    save_weights(weights[0], policy, start.tokenizer)
    optimizer.policy.weight_version += 1
    save_weights(weights[1], policy, start.tokenizer)
    export_checkpoint(weights[1], run / "hf")
    sealed = {
        CHECKPOINTS: [*steps, two_shards(run.parent / "two-ranks")],
        WEIGHTS: weights,
        HF: [run / "hf"],
    }
    return Saved({run: cfg}, sealed, cache_of(run.parent / "cache"))


def test_a_whole_run_is_whole(by_hand: Saved) -> None:
    assert [p for f in by_hand.sealed.values() for folder in f for p in problems(folder)] == []
    assert [by_hand.told(run) for run in by_hand.runs] == [""]
    swaps = [p for p in by_hand.parts[CHECKPOINTS] if Damage.SWAPPED in damages_of(p, [p])]
    assert swaps == []
    shards = sorted(by_hand.sealed[CHECKPOINTS][-1].rglob("*.safetensors"))
    assert len({path.stat().st_size for path in shards}) == 1 and len(shards) == 2


def test_forty_damages_are_found(by_hand: Saved) -> None:
    score = break_all(by_hand, 40, seed=7)
    print(f"\n{score.table()}")
    assert score.missed == [] and score.made.total() == 40
    assert {kind for _, kind in score.made} == set(Damage)


def test_what_is_damaged_is_not_loaded(by_hand: Saved, tmp_path: Path) -> None:
    """Twelve damages to the newest checkpoint: it is put aside, and the one before it is taken."""
    draw = random.Random(3)
    stage = by_hand.sealed[CHECKPOINTS][0].parent.parent
    for number in range(12):
        copy = Path(shutil.copytree(stage, tmp_path / str(number)))
        newest = copy / "checkpoints" / "step-000002"
        files = [f for f in files_below(newest) if f.name != "checkpoint.json"]
        broken = break_file(draw.choice(files), draw.choice(list(Damage)[:4]), files, draw)
        said: list[str] = []
        found = StageCheckpoints(copy, CheckpointParams(), CPU, said.append).newest()
        assert found == copy / "checkpoints" / "step-000001"
        assert len(said) == 1 and str(broken.files[0]) in said[0], (broken, said)
        assert not newest.exists() and newest.with_name("damaged-step-000002").exists()


def test_a_checkpoint_that_has_lost_its_facts_is_told_of(by_hand: Saved, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(by_hand.sealed[CHECKPOINTS][0].parent.parent, tmp_path / "stage"))
    (copy / "checkpoints" / "step-000002" / "checkpoint.json").unlink()
    said: list[str] = []
    found = StageCheckpoints(copy, CheckpointParams(), CPU, said.append).newest()
    assert found == copy / "checkpoints" / "step-000001"
    assert len(said) == 1 and "step-000002" in said[0] and "checkpoint.json" in said[0]


# -- runs made by the command -------------------------------------------------------------------


def train(folder: Path, method: str, *more: str) -> Path:
    status = cli.main(
        [
            *("train", "--config-name", method, f"name={method}", f"exp_manager.exp_dir={folder}"),
            *(f"model.restore_from_path={folder / 'llama'}", "data.max_length=640"),
            *(f"data.train_path=[{folder / 'rows.jsonl'}]", "data.max_prompt_length=560"),
            *("model.micro_batch_size=2", "model.global_batch_size=4", "rollout.max_new_tokens=8"),
            *("exp_manager.create_tensorboard_logger=false", "trainer.enable_progress_bar=false"),
            *(
                "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
                "trainer.max_steps=3",
            ),
            *(f"model.reference_cache_dir={folder / 'cache'}", *more),
        ]
    )
    assert status == 0
    return folder / method


@pytest.fixture(scope="module")
def by_command(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """SAPO cut off within its stage, and Self-Rewarding to its end."""
    folder = tmp_path_factory.mktemp("by-command")
    save_llama(folder / "llama", max_position_embeddings=768, initializer_range=0.3)
    rows = [
        {
            "id": f"r{n}",
            "prompt": f"{n} + {n + 3}?",
            "chosen": f"It is {n}. " * 3,
            "rejected": "No.",
        }
        for n in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sapo = train(folder, "self_augmented_po", "algorithm.segment_length=6", "export.hf=false")
    judged = train(folder, "self_rewarding", "algorithm.drop_truncated_chosen=false")
    (stage,) = (sapo / "stages").iterdir()
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "weights")
    steps = [p for run in (sapo, judged) for p in run.glob("stages/*/checkpoints/step-*")]
    weights = [*judged.glob("stages/*/weights"), sapo / "checkpoint", judged / "checkpoint"]
    runs = {run: saved_config(run) for run in (sapo, judged)}
    sealed = {CHECKPOINTS: sorted(steps), WEIGHTS: weights, HF: [judged / "hf"]}
    return Saved(runs, sealed, folder / "cache")


@pytest.mark.slow
def test_two_hundred_damages_are_found(by_command: Saved) -> None:
    names = {path.name for files in by_command.parts.values() for path in files}
    assert names >= {"completions.parquet", "labels.parquet", "reference.safetensors", "done.json"}
    assert {p.parent.name for p in by_command.parts[CHECKPOINTS]} >= {"ema", "lagged", "rollouts"}
    score = break_all(by_command, 200, seed=11)
    print(f"\n{score.table()}")
    assert score.missed == [] and score.made.total() == 200
