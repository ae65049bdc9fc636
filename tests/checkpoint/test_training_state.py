from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MakePolicy, in_precision, save_llama, with_adapters

from nemo_selfpref.checkpoint.folders import is_checkpoint
from nemo_selfpref.checkpoint.saver import save_now
from nemo_selfpref.checkpoint.seal import SEAL, problems, seal
from nemo_selfpref.checkpoint.sharded import ShardReader
from nemo_selfpref.checkpoint.training_state import (
    architecture_of,
    load_optimizer,
    load_training,
    load_weights,
    save_weights,
    take_training,
)
from nemo_selfpref.config.model_schema import LoRAConfig, OptimConfig, OptimizerName
from nemo_selfpref.config.schema import Precision
from nemo_selfpref.data.batching import collate
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import SFTObjective

LIGHTNING: dict[str, Any] = {
    "epoch": 0,
    "global_step": 2,
    "pytorch-lightning_version": "2.5",
    "loops": {"fit_loop": {"state_dict": {}}},
    "lr_schedulers": [{"last_epoch": 2}],
    "state_dict": {"dropped": 1},
}
OPTIM = OptimConfig(lr=1e-3, weight_decay=0.1)


def trainer_of(policy: Policy, name: OptimizerName = OptimizerName.adamw) -> PolicyOptimizer:
    return PolicyOptimizer(policy, replace(OPTIM, name=name), clip_grad=1.0)


def save_training(
    target: Path, policy: Policy, optimizer: PolicyOptimizer, lightning: dict[str, Any]
) -> None:
    save_now(target, take_training(policy, optimizer, lightning), torch.device("cpu"))


def step(optimizer: PolicyOptimizer, number: int) -> tuple[float, float]:
    """One step on rows of its own; the loss and the gradient norm."""
    rows = [((5, 6, 7 + number), (8, 9, 2)), ((5, 60), (8 + number, 11, 12, 2))]
    batch = collate(rows, [0, 1], paired=False)
    metrics = optimizer.policy.train_batch([batch], SFTObjective(), StepInputs(torch.ones(2)))
    optimizer.step()
    return metrics["loss"], optimizer.grad_norm


@pytest.mark.parametrize(
    ("name", "split"),
    [(OptimizerName.adamw, False), (OptimizerName.adamw, True), (OptimizerName.rmsprop, False)],
)
@pytest.mark.parametrize("precision", list(Precision))
def test_resuming_is_bit_for_bit_the_same(
    policy: Policy,
    precision: Precision,
    name: OptimizerName,
    split: bool,
    llama_folder: Path,
    tmp_path: Path,
) -> None:
    """split: with the distributed optimizer."""

    def make() -> Policy:
        return in_precision(policy, precision, llama_folder, use_distributed_optimizer=split)

    straight = trainer_of(make(), name)
    for number in range(2):
        step(straight, number)
    save_training(tmp_path / "step-2", straight.policy, straight, LIGHTNING)
    want = [step(straight, number) for number in (2, 3)]

    resumed = trainer_of(make(), name)
    assert resumed.policy.weight_version == 0
    load_training(tmp_path / "step-2", resumed.policy)
    load_optimizer(tmp_path / "step-2", resumed)
    assert resumed.policy.weight_version == 2
    assert [step(resumed, number) for number in (2, 3)] == want
    pairs = zip(
        resumed.policy.module.parameters(), straight.policy.module.parameters(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", list(OptimizerName))
def test_without_the_optimizers_state_it_would_not_be(
    policy: Policy,
    make_policy: MakePolicy,
    name: OptimizerName,
    llama_folder: Path,
    tmp_path: Path,
) -> None:
    straight = trainer_of(policy, name)
    for number in range(2):
        step(straight, number)
    save_training(tmp_path / "step-2", policy, straight, LIGHTNING)
    want = [step(straight, number) for number in (2, 3)]
    fresh = trainer_of(make_policy(llama_folder), name)
    load_training(tmp_path / "step-2", fresh.policy)
    got = [step(fresh, number) for number in (2, 3)]
    assert got[0] == want[0] and got[1] != want[1]


@pytest.mark.parametrize(
    ("precision", "tensors"),
    [(Precision.fp32, {"square_avg"}), (Precision.bf16, {"square_avg", "fp32_param"})],
)
def test_state_of_rmsprop(
    policy: Policy,
    precision: Precision,
    tensors: set[str],
    llama_folder: Path,
    tmp_path: Path,
) -> None:
    made = in_precision(policy, precision, llama_folder)
    optimizer = trainer_of(made, OptimizerName.rmsprop)
    for number in range(3):
        step(optimizer, number)
    save_training(tmp_path / "step-3", made, optimizer, LIGHTNING)
    keys = {key.split(".")[2] for key in ShardReader(tmp_path / "step-3" / "optimizer").names()}
    assert keys == tensors  # optimizer.state.square_avg.decoder...

    again = trainer_of(in_precision(policy, precision, llama_folder), OptimizerName.rmsprop)
    load_optimizer(tmp_path / "step-3", again)
    states = list(zip(again.state.items(), optimizer.state.items(), strict=True))
    assert len(states) == len(list(made.module.parameters()))
    for (_, ours), (_, theirs) in states:
        assert ours.keys() == theirs.keys() == {"step", "square_avg"}
        assert ours["step"].item() == theirs["step"].item() == 3.0
        assert torch.equal(ours["square_avg"], theirs["square_avg"])


def test_state_of_the_other_optimizer_is_refused(
    policy: Policy, make_policy: MakePolicy, llama_folder: Path, tmp_path: Path
) -> None:
    optimizer = trainer_of(policy)
    step(optimizer, 0)
    save_training(tmp_path / "step-1", policy, optimizer, LIGHTNING)
    other = trainer_of(make_policy(llama_folder), OptimizerName.rmsprop)
    with pytest.raises(CheckpointError, match=r"no tensor optimizer\.state\.square_avg\."):
        load_optimizer(tmp_path / "step-1", other)


def test_what_lightning_gets_back(policy: Policy, tmp_path: Path) -> None:
    save_training(tmp_path / "step-2", policy, trainer_of(policy), LIGHTNING)
    found = load_training(tmp_path / "step-2", policy)
    kept = {k: v for k, v in LIGHTNING.items() if k != "state_dict"}
    assert found == {**kept, "state_dict": {}, "optimizer_states": [{}], "callbacks": {}}


def test_weights_with_their_tokenizer(
    policy: Policy, tokenizer: ChatTokenizer, make_policy: MakePolicy, tmp_path: Path
) -> None:
    step(trainer_of(policy), 0)
    save_weights(tmp_path / "checkpoint", policy, tokenizer)
    assert is_checkpoint(tmp_path / "checkpoint") and not is_checkpoint(tmp_path)
    assert architecture_of(tmp_path / "checkpoint") == policy.arch
    other = make_policy(tmp_path / "checkpoint")
    assert other.weight_version == 1
    pairs = zip(other.module.parameters(), policy.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_nothing_is_pickled(policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    optimizer = trainer_of(policy)
    step(optimizer, 0)
    save_training(tmp_path / "step-1", policy, optimizer, LIGHTNING)
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "step-1/checkpoint.json",
        "step-1/lightning.json",
        "step-1/manifest.json",
        "step-1/weights/common.json",
        "step-1/weights/index.json",
        "step-1/weights/shard-00000.safetensors",
        "step-1/optimizer/common.json",
        "step-1/optimizer/index.json",
        "step-1/optimizer/shard-00000.safetensors",
    }


def test_weights_of_another_architecture(
    policy: Policy, tokenizer: ChatTokenizer, make_policy: MakePolicy, tmp_path: Path
) -> None:
    save_weights(tmp_path / "checkpoint", policy, tokenizer)
    other = make_policy(save_llama(tmp_path / "small", num_hidden_layers=2))
    with pytest.raises(CheckpointError, match=r"another architecture \(num_layers: 4 .* 2 here\)"):
        load_weights(tmp_path / "checkpoint", other)


@pytest.mark.parametrize(
    "changes", [{"format": "other"}, {"version": 2}, {"version": None}], ids=str
)
def test_another_format_is_refused(
    policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path, changes: dict[str, Any]
) -> None:
    save_weights(tmp_path / "checkpoint", policy, tokenizer)
    path = tmp_path / "checkpoint" / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    (tmp_path / "checkpoint" / SEAL).unlink()
    seal(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"expected 'nemo_selfpref' version 1"):
        load_weights(tmp_path / "checkpoint", policy)


def test_a_changed_fact_is_found(policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    save_weights(tmp_path / "checkpoint", policy, tokenizer)
    path = tmp_path / "checkpoint" / "checkpoint.json"
    path.write_text(path.read_text().replace('"weight_version": 0', '"weight_version": 1'))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is damaged: SHA-256"):
        load_weights(tmp_path / "checkpoint", policy)


def test_weights_that_are_not_finite_are_not_saved(
    policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    save_weights(tmp_path / "checkpoint", policy, tokenizer)
    with torch.no_grad():
        next(iter(policy.module.parameters()))[3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"rank 0: weights holds values that are not finite"):
        save_weights(tmp_path / "checkpoint", policy, tokenizer)
    assert problems(tmp_path / "checkpoint") == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_failed_save_leaves_the_old_checkpoint(
    policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    target = tmp_path / "step-1"
    optimizer = trainer_of(policy)
    save_training(target, policy, optimizer, LIGHTNING)
    step(optimizer, 0)
    with pytest.raises(KeyError, match="loops"):
        save_training(
            target,
            policy,
            optimizer,
            {"epoch": 0, "global_step": 1, "pytorch-lightning_version": "2.5"},
        )
    load_training(target, policy)
    assert policy.weight_version == 0


@pytest.mark.parametrize("split", [False, True])
def test_resuming_adapters_is_bit_for_bit_the_same(
    split: bool, llama_folder: Path, tmp_path: Path
) -> None:
    def make() -> Policy:
        lora = LoRAConfig(rank=4)
        return with_adapters(llama_folder, lora, use_distributed_optimizer=split)

    straight = trainer_of(make())
    for number in range(2):
        step(straight, number)
    save_training(tmp_path / "step-2", straight.policy, straight, LIGHTNING)
    keys = ShardReader(tmp_path / "step-2" / "optimizer").names()
    assert keys and all(key.endswith(("lora_a", "lora_b")) for key in keys)
    want = [step(straight, number) for number in (2, 3)]
    resumed = trainer_of(make())
    load_training(tmp_path / "step-2", resumed.policy)
    load_optimizer(tmp_path / "step-2", resumed)
    assert [step(resumed, number) for number in (2, 3)] == want
