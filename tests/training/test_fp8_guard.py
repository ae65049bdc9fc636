"""The guard's arithmetic, and what it does. FP8 itself needs a GPU: here scores in "FP8" are
those of the float32 model with an error put on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from saving import save_into
from tiny import MakePolicy

from nemo_selfpref.config.model_schema import Fp8Fallback, ModelConfig
from nemo_selfpref.data.batching import TokenSequence
from nemo_selfpref.errors import TrainingError
from nemo_selfpref.files import read_json
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.scoring import SequenceLogps
from nemo_selfpref.models.stage import Step
from nemo_selfpref.objectives.inputs import PassLogps, StepInputs
from nemo_selfpref.objectives.objective import Pass
from nemo_selfpref.training.fp8_guard import GuardedSteps, Noise, measure_noise
from nemo_selfpref.types import PreferencePair

PAIRS = [PreferencePair(str(n), (5, 6), (7, 8 + n, 2), (9, 2)) for n in range(3)]


def test_noise_by_hand() -> None:
    # Errors 3 and -4: sqrt((9 + 16) / 2). h = 8 - 2 = 6 and 2 - 0 = 2, the median is 4.
    fp8, bf16 = torch.tensor([8.0, 2.0]), torch.tensor([5.0, 6.0])
    found = measure_noise(fp8, bf16, torch.tensor([2.0, 0.0]))
    assert found.noise == pytest.approx(12.5**0.5) and found.margin == 4.0
    assert found.share == pytest.approx(12.5**0.5 / 4)


def test_noise_without_a_margin() -> None:
    assert Noise(0.0, 0.0).share == 0.0
    assert Noise(0.1, 0.0).share == float("inf")


class Rounded:
    """A policy whose scores are off by `error` for chosen answers while it is "in FP8"."""

    def __init__(self, policy: Policy, error: float) -> None:
        self.policy, self.error, self.in_fp8 = policy, error, True
        self.layout = policy.layout

    def score(self, sequences: Sequence[TokenSequence]) -> SequenceLogps:
        found = self.policy.score(sequences)
        sums = found.sums.clone()
        if self.in_fp8:
            sums[: len(sums) // 2] += self.error
        return SequenceLogps(sums, found.lengths)

    @contextmanager
    def without_fp8(self) -> Iterator[None]:
        self.in_fp8 = False
        yield
        self.in_fp8 = True

    def leave_fp8(self) -> None:
        self.in_fp8 = False


class Fixed:
    """Steps of the same pairs, whose reference gives every margin as 0."""

    num_steps = 4

    def __init__(self) -> None:
        self.done: list[int] = []

    def begin(self) -> None:
        """Nothing to begin."""

    def step(self, number: int) -> Step:
        zeros = torch.zeros(3)
        inputs = StepInputs(torch.ones(3), {Pass.REFERENCE: PassLogps(zeros, zeros)})
        return Step(PAIRS, inputs, {"mine": 1.0})

    def after_step(self, done: int) -> None:
        self.done.append(done)

    def save(self, folder: Path) -> None:
        """Nothing to save."""

    def load(self, folder: Path) -> None:
        """Nothing to load."""


def guarded(policy: Any, said: list[str], **settings: Any) -> GuardedSteps:
    return GuardedSteps(Fixed(), policy, ModelConfig(fp8_check_every=2, **settings), said.append)


def drive(steps: GuardedSteps) -> list[dict[str, float]]:
    metrics = []
    for number in range(steps.num_steps):
        metrics.append(dict(steps.step(number).metrics))
        steps.after_step(number + 1)
    return metrics


@pytest.fixture
def policy(make_policy: MakePolicy, llama_folder: Path) -> Policy:
    return make_policy(llama_folder)


def test_small_noise_is_measured_and_left_alone(policy: Policy) -> None:
    said: list[str] = []
    rounded = Rounded(policy, 1e-3)
    steps = guarded(rounded, said)
    metrics = drive(steps)
    # Checked after step 2, told with step 3.
    assert [sorted(m) for m in metrics] == [
        ["mine"],
        ["mine"],
        ["fp8/margin", "fp8/noise", "mine"],
        ["mine"],
    ]
    assert metrics[2]["fp8/noise"] == pytest.approx(1e-3, rel=1e-3)
    chosen, rejected = policy.score([((5, 6), (7, 9, 2)), ((5, 6), (9, 2))]).sums
    assert metrics[2]["fp8/margin"] == pytest.approx(abs(float(chosen - rejected)), rel=0.5)
    assert not said and rounded.in_fp8


@pytest.mark.parametrize("fallback", [Fp8Fallback.bf16, Fp8Fallback.warn])
def test_large_noise(policy: Policy, fallback: Fp8Fallback) -> None:
    said: list[str] = []
    rounded = Rounded(policy, 1e4)
    steps = guarded(rounded, said, fp8_fallback=fallback)
    drive(steps)
    leaves = fallback is Fp8Fallback.bf16
    assert rounded.in_fp8 is not leaves
    assert len(said) == (1 if leaves else 2)  # once out of FP8 there is nothing to check
    assert said[0].startswith(
        "after step 2 FP8 changes the log-prob margin of a pair by 1e+04 nats"
    )
    assert said[0].endswith("Going on in bfloat16") is leaves


def test_large_noise_can_stop_the_run(policy: Policy) -> None:
    steps = guarded(Rounded(policy, 1e4), [], fp8_fallback=Fp8Fallback.stop)
    with pytest.raises(TrainingError, match=r"max_noise=0\.5\. Set model\.fp8_recipe=null"):
        drive(steps)


def test_a_resumed_run_stays_out_of_fp8(policy: Policy, tmp_path: Path) -> None:
    rounded = Rounded(policy, 1e4)
    steps = guarded(rounded, [])
    save_into(tmp_path, steps.save)
    assert read_json(tmp_path / "fp8.json") == {"in_fp8": True}
    drive(steps)
    save_into(tmp_path, steps.save)
    again = Rounded(policy, 1e4)
    guarded(again, []).load(tmp_path)
    assert not again.in_fp8


def test_a_model_without_fp8(policy: Policy) -> None:
    assert not policy.in_fp8
    policy.module.config.fp8 = "hybrid"
    assert policy.in_fp8
    with policy.without_fp8():
        assert not policy.in_fp8
    assert policy.in_fp8
    policy.leave_fp8()
    assert not policy.in_fp8
