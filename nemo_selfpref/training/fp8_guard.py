"""Watches that FP8's rounding stays small beside the margins a run learns from.

Every so many steps the step's pairs are scored in FP8 and in bfloat16. With m = log pi(chosen) -
log pi(rejected), the noise is the root mean square of m in one less m in the other; the margin is
the median |h|, h being m less the reference's. Where noise > limit * margin, what is learnt is
rounding, and the run goes on in bfloat16, warns or stops, as model.fp8_fallback says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from nemo_selfpref.checkpoint.snapshot import Snapshot
from nemo_selfpref.config.model_schema import Fp8Fallback, ModelConfig
from nemo_selfpref.data.batching import sequences_of
from nemo_selfpref.errors import TrainingError
from nemo_selfpref.files import read_json
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.models.stage import Step, StepsAround, StepSource
from nemo_selfpref.objectives.objective import Pass
from nemo_selfpref.types import PreferencePair

_ROWS = 64
"""Pairs of a step that are looked at; the noise of their median is far below the limit."""
_STATE = "fp8.json"


@dataclass(frozen=True)
class Noise:
    """FP8's error of m and the median |h|, both in nats."""

    noise: float
    margin: float

    @property
    def share(self) -> float:
        """noise / margin; infinite where there is noise and no margin at all."""
        if self.margin:
            return self.noise / self.margin
        return float("inf") if self.noise else 0.0


def measure_noise(fp8: Tensor, bf16: Tensor, reference: Tensor) -> Noise:
    """Of m [B] under the policy in FP8 and in bfloat16, and under the reference."""
    return Noise(
        noise=float((fp8 - bf16).pow(2).mean().sqrt()),
        margin=median((fp8 - reference).abs().tolist()),
    )


class GuardedSteps(StepsAround):
    """A StepSource whose pairs are checked while the policy multiplies in FP8."""

    def __init__(
        self, steps: StepSource, policy: Policy, config: ModelConfig, say: Callable[[str], None]
    ) -> None:
        super().__init__(steps)
        self.policy, self.config, self._say = policy, config, say
        self._last: Step | None = None
        self._found: dict[str, float] = {}

    def step(self, number: int) -> Step:
        self._last = self.steps.step(number)
        found, self._found = self._found, {}
        return replace(self._last, metrics={**self._last.metrics, **found})

    def after_step(self, done: int) -> None:
        self.steps.after_step(done)
        if self.policy.in_fp8 and done % self.config.fp8_check_every == 0:
            self._check(done)

    def _check(self, done: int) -> None:
        assert self._last is not None
        pairs = [row for row in self._last.rows[:_ROWS] if isinstance(row, PreferencePair)]
        reference = self._last.inputs.passes.get(Pass.REFERENCE)
        if not pairs:
            return
        fp8 = self._margins(pairs)
        with self.policy.without_fp8():
            bf16 = self._margins(pairs)
        of_reference = torch.zeros_like(fp8)
        if reference is not None:
            both = reference.chosen - reference.rejected
            of_reference = both[: len(pairs)].to(fp8.dtype)
        found = measure_noise(fp8, bf16, of_reference)
        self._found = {"fp8/noise": found.noise, "fp8/margin": found.margin}
        if found.share > self.config.fp8_max_noise:
            self._fall_back(done, found)

    def _margins(self, pairs: list[PreferencePair]) -> Tensor:
        chosen, rejected = self.policy.score(sequences_of(pairs, paired=True)).sums.chunk(2)
        return chosen - rejected

    def _fall_back(self, done: int, found: Noise) -> None:
        what = (
            f"after step {done} FP8 changes the log-prob margin of a pair by {found.noise:.3g} "
            f"nats (root mean square), {found.share:.2f} of the median margin {found.margin:.3g}; "
            f"model.fp8_max_noise={self.config.fp8_max_noise:g}"
        )
        if self.config.fp8_fallback is Fp8Fallback.stop:
            raise TrainingError(
                f"{what}. Set model.fp8_recipe=null, or model.fp8_fallback=bf16 to go on without."
            )
        if self.config.fp8_fallback is Fp8Fallback.bf16:
            self.policy.leave_fp8()
            what += ". Going on in bfloat16"
        self._say(what)

    def save(self, snapshot: Snapshot) -> None:
        self.steps.save(snapshot)
        snapshot.add_json(_STATE, {"in_fp8": self.policy.in_fp8})

    def load(self, folder: Path) -> None:
        self.steps.load(folder)
        if not read_json(folder / _STATE)["in_fp8"]:
            self.policy.leave_fp8()
