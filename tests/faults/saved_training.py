"""A small training whose state is known at every step, and its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_selfpref.checkpoint import training_state
from nemo_selfpref.checkpoint.snapshot import Snapshot
from nemo_selfpref.checkpoint.training_state import (
    load_optimizer,
    load_training,
    save_weights,
    take_training,
)
from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.config.schema import CheckpointParams
from nemo_selfpref.data.batching import collate
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import SFTObjective
from nemo_selfpref.training.checkpoints import StageCheckpoints
from nemo_selfpref.training.convert import single_process_policy

CPU = torch.device("cpu")
LIGHTNING: dict[str, Any] = {
    "epoch": 0,
    "global_step": 0,
    "pytorch-lightning_version": "2.5",
    "loops": {"fit_loop": {"state_dict": {}}},
    "lr_schedulers": [{"last_epoch": 0}],
}
Tensors = dict[str, Tensor]


class Training:
    """A policy in training; `states` has all tensors as they were after each step."""

    def __init__(self, folder: Path) -> None:
        self.policy = single_process_policy(folder)[0]
        self.optimizer = PolicyOptimizer(self.policy, OptimConfig(lr=1e-3), clip_grad=1.0)
        self.states: dict[int, Tensors] = {}

    def step(self, number: int) -> None:
        rows = [((5, 6, 7 + number), (8, 9, 2)), ((5, 60), (8 + number, 11, 12, 2))]
        batch = collate(rows, [0, 1], paired=False)
        self.policy.train_batch([batch], SFTObjective(), StepInputs(torch.ones(2)))
        self.optimizer.step()
        self.states[number] = {name: t.clone() for name, t in self.tensors()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.policy.module.named_parameters()
        for number, (_, state) in enumerate(self.optimizer.state.items()):
            yield from ((f"{number}.{name}", t) for name, t in state.items() if t.numel() > 1)

    def snapshot(self, step: int, epoch: int = 0) -> Snapshot:
        facts = {**LIGHTNING, "global_step": step, "epoch": epoch}
        return take_training(self.policy, self.optimizer, facts)

    def load(self, folder: Path) -> Tensors:
        """Read a checkpoint over tensors that are all wrong."""
        with torch.no_grad():
            for _, tensor in self.tensors():
                tensor.fill_(7.0)
        self.facts = load_training(folder, self.policy)
        load_optimizer(folder, self.optimizer)
        return dict(self.tensors())


def save(
    stage: Path, step: int, snapshot: Snapshot, background: bool = False, keep: int = 9
) -> None:
    """Save a snapshot among a stage's checkpoints."""
    params = CheckpointParams(async_save=background, save_top_k=keep, failed_saves_allowed=0)
    checkpoints = StageCheckpoints(stage, params, CPU, lambda _: None)
    checkpoints.saver.begin(checkpoints.path(step), snapshot)
    assert checkpoints.saver.finish()
    checkpoints.saver.close()


def weights_of(policy: Policy, tokenizer: ChatTokenizer, where: Path) -> Snapshot:
    """What save_weights writes."""
    taken: list[Snapshot] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_state, "save_now", lambda _, snapshot, __: taken.append(snapshot))
        save_weights(where, policy, tokenizer)
    return taken[0]


def equal(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())
