"""Which copies of the weights a stage keeps, and when they move."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from nemo_selfpref.algorithms.base import Averaging, Reference
from nemo_selfpref.checkpoint.sharded import ShardReader, load_state
from nemo_selfpref.checkpoint.snapshot import Snapshot
from nemo_selfpref.config.schema import RefMode
from nemo_selfpref.files import read_json
from nemo_selfpref.megatron.parallel import barrier
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.types import WeightSet

_COPIES = "copies"


class StageCopies:
    """The EMA and the reference of one training stage.

    After every optimizer step the EMA takes its share of the policy where that is due, and then
    the reference the EMA or the policy where that is due (SAPO, algorithm 1).
    """

    def __init__(
        self, weights: WeightSets, reference: Reference, averaging: Averaging | None
    ) -> None:
        self.weights, self.reference, self.averaging = weights, reference, averaging
        self.moves = 0
        """How often the reference has changed in this process."""

    @property
    def reference_moves(self) -> bool:
        return self.reference.mode.moves

    @property
    def reference_set(self) -> WeightSet:
        frozen = self.reference.mode is RefMode.frozen
        return WeightSet.FROZEN if frozen else WeightSet.LAGGED

    def begin(self, keep_reference: bool) -> None:
        """Start from the policy as it is; `keep_reference` where it is asked after this moment."""
        if self.averaging is not None:
            self.weights.take(WeightSet.EMA, WeightSet.POLICY)
        if keep_reference and self.reference_set is WeightSet.LAGGED:
            self.weights.take(WeightSet.LAGGED, WeightSet.POLICY)
            self.moves += 1

    def after_step(self, done: int) -> None:
        if self.averaging is not None and done % self.averaging.every == 0:
            self.weights.average(self.averaging.alpha)
        if self.reference_moves and done % self.reference.every == 0:
            ema = self.reference.mode is RefMode.ema
            self.weights.take(WeightSet.LAGGED, WeightSet.EMA if ema else WeightSet.POLICY)
            self.moves += 1

    def end(self) -> None:
        self.weights.drop(WeightSet.EMA)
        self.weights.drop(WeightSet.LAGGED)

    def save(self, snapshot: Snapshot) -> None:
        """Add the copies of this stage. Collective."""
        kept = [n for n in self.weights.held() if n in (WeightSet.EMA, WeightSet.LAGGED)]
        for name in kept:
            snapshot.add_state(f"{_COPIES}/{name.value}", self.weights.sharded_state_dict(name))
        if kept:
            versions = {name.value: self.weights.version(name) for name in kept}
            snapshot.add_json(f"{_COPIES}/versions.json", versions)

    def load(self, folder: Path) -> None:
        """Read back what save wrote. Collective."""
        if not (folder / _COPIES).is_dir():
            return
        for name, version in read_json(folder / _COPIES / "versions.json").items():
            read = partial(load_state, ShardReader(folder / _COPIES / name))
            self.weights.fill(WeightSet(name), read, int(version))
        self.moves += 1
        barrier()
