from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import scale
from torch import Tensor

from nemo_selfpref.checkpoint.training_state import save_weights
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.training.convert import single_process_policy
from nemo_selfpref.training.places import WeightPlaces
from nemo_selfpref.training.session import Start
from nemo_selfpref.types import WeightSet

POLICY, FROZEN, EMA = WeightSet.POLICY, WeightSet.FROZEN, WeightSet.EMA


class Places:
    """A run's weights, and stages that train them."""

    def __init__(self, policy: Policy, start: Start, folder: Path) -> None:
        self.policy, self.start, self.folder = policy, start, folder
        self.weights = WeightSets(policy)
        self.places = WeightPlaces(self.weights, start, seed=1)
        self.first = self.held(POLICY)

    def train(self, name: str, steps: int = 2) -> dict[str, Tensor]:
        """A stage of some steps, as Run does it; the weights it ends with."""
        self.places.ready(POLICY)
        self.places.leave()
        for _ in range(steps):
            scale(self.policy)
        save_weights(self.folder / name, self.policy, self.start.tokenizer)
        self.places.arrive(self.folder / name, self.policy.weight_version, loaded=True)
        return self.held(POLICY)

    def held(self, name: WeightSet) -> dict[str, Tensor]:
        """Weights in memory."""
        with self.weights.using(name):
            named = self.policy.module.named_parameters()
            return {key: p.detach().clone() for key, p in named}

    def frozen(self) -> tuple[dict[str, Tensor], int]:
        self.places.ready(FROZEN)
        return self.held(FROZEN), self.weights.version(FROZEN)


@pytest.fixture
def run(llama_folder: Path, tmp_path: Path) -> Places:
    """At the start of a run from llama_folder."""
    return Places(*single_process_policy(llama_folder), tmp_path)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_the_frozen_weights_are_those_of_the_start(run: Places) -> None:
    assert run.places.policy_is_frozen and FROZEN not in run.weights
    weights, version = run.frozen()
    assert same(weights, run.first) and version == 0


def test_they_stay_while_the_policy_moves(run: Places) -> None:
    run.frozen()
    trained = run.train("one")
    weights, version = run.frozen()
    assert not run.places.policy_is_frozen
    assert same(weights, run.first) and version == 0
    assert same(run.held(POLICY), trained) and run.policy.weight_version == 2


def test_they_are_read_from_the_start_once_the_policy_has_moved(run: Places) -> None:
    trained = run.train("one")
    assert FROZEN not in run.weights
    weights, version = run.frozen()
    assert same(weights, run.first) and version == 0
    assert same(run.held(POLICY), trained) and run.policy.weight_version == 2


def test_during_training_the_policy_is_at_no_place(run: Places) -> None:
    run.places.leave()
    scale(run.policy)
    assert not run.places.policy_is_frozen
    weights, version = run.frozen()
    assert same(weights, run.first) and version == 0
    assert not same(run.held(POLICY), run.first) and run.policy.weight_version == 1


def test_freeze(run: Places) -> None:
    one = run.train("one")
    run.frozen()
    run.places.freeze()
    assert run.places.policy_is_frozen and FROZEN not in run.weights
    run.train("two")
    assert not run.places.policy_is_frozen
    weights, version = run.frozen()
    assert same(weights, one) and version == 2
    assert run.policy.weight_version == 4


def test_reset_to_the_start(run: Places) -> None:
    trained = run.train("one")
    run.frozen()
    run.places.reset()
    assert run.places.policy_is_frozen
    # Nothing is read until it is asked for.
    assert same(run.held(POLICY), trained) and run.policy.weight_version == 2
    run.places.ready(POLICY)
    assert same(run.held(POLICY), run.first)


def test_reset_to_a_stage(run: Places) -> None:
    one = run.train("one")
    run.places.freeze()
    run.train("two")
    run.places.reset()
    run.places.ready(POLICY)
    assert same(run.held(POLICY), one)


def test_a_reset_policy_has_a_version_of_its_own(run: Places) -> None:
    run.train("one", steps=3)
    run.places.reset()
    weights, version = run.frozen()
    assert same(weights, run.first)
    assert run.policy.weight_version == version == 4
    run.train("two", steps=2)
    assert run.policy.weight_version == 6 and run.frozen()[1] == 4
    run.places.reset()
    run.places.reset()
    run.places.ready(POLICY)
    assert run.policy.weight_version == 8


def test_weights_are_read_when_they_are_asked_for(run: Places, tmp_path: Path) -> None:
    """Three stages were done before; only the last one's weights are still there."""
    three = run.train("three")
    resumed = Places(*single_process_policy(run.start.folder or Path()), tmp_path)
    resumed.places.arrive(tmp_path / "one", 2, loaded=False)
    resumed.places.arrive(tmp_path / "two", 4, loaded=False)
    resumed.places.arrive(tmp_path / "three", 6, loaded=False)
    assert same(resumed.held(POLICY), run.first) and resumed.policy.weight_version == 0
    resumed.places.ready(POLICY)
    assert same(resumed.held(POLICY), three) and resumed.policy.weight_version == 6
    assert same(resumed.frozen()[0], run.first)


def test_frozen_weights_of_a_stage_that_was_done_before(run: Places, tmp_path: Path) -> None:
    one = run.train("one")
    two = run.train("two")
    resumed = Places(*single_process_policy(run.start.folder or Path()), tmp_path)
    resumed.places.arrive(tmp_path / "one", 2, loaded=False)
    resumed.places.freeze()
    resumed.places.arrive(tmp_path / "two", 4, loaded=False)
    weights, version = resumed.frozen()
    assert same(weights, one) and version == 2
    assert same(resumed.held(POLICY), two) and resumed.policy.weight_version == 4


def test_a_resumed_reset_has_the_same_version(run: Places, tmp_path: Path) -> None:
    run.train("one", steps=3)
    run.places.reset()
    run.places.ready(POLICY)
    resumed = Places(*single_process_policy(run.start.folder or Path()), tmp_path)
    resumed.places.arrive(tmp_path / "one", 3, loaded=False)
    resumed.places.reset()
    resumed.places.ready(POLICY)
    assert resumed.policy.weight_version == run.policy.weight_version == 4
    assert same(resumed.held(POLICY), run.first)


def test_the_policy_is_not_read_twice(run: Places, tmp_path: Path) -> None:
    run.places.arrive(tmp_path / "gone", 2, loaded=False)
    with pytest.raises(CheckpointError, match=r"gone/checkpoint\.json is missing"):
        run.places.ready(POLICY)
    run.places.arrive(tmp_path / "gone", 2, loaded=True)
    run.places.ready(POLICY)
    run.places.ready(EMA)
    assert same(run.held(POLICY), run.first)


def test_a_run_that_starts_from_a_checkpoint(run: Places, tmp_path: Path) -> None:
    one = run.train("one", steps=5)
    later = Places(*single_process_policy(tmp_path / "one"), tmp_path / "later")
    later.train("two")
    assert later.policy.weight_version == 7
    weights, version = later.frozen()
    assert same(weights, one) and version == 5
    later.places.reset()
    later.places.ready(POLICY)
    assert same(later.held(POLICY), one) and later.policy.weight_version == 8
