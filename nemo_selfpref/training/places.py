"""Where a run's weights are on disk, and what of them is in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nemo_selfpref.checkpoint.sharded import TensorSource, load_state
from nemo_selfpref.checkpoint.training_state import fill_policy, weights_of
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.training.session import Start, weights_source
from nemo_selfpref.types import WeightSet


@dataclass(frozen=True)
class Seeded:
    """Weights that come from a seed and lie nowhere."""

    seed: int


class WeightPlaces:
    """Follows the policy from one stage's weights to the next, and remembers the frozen ones.

    Weights are read from disk only when something is asked of them, so a resumed run that skips
    its finished stages reads none but the last.
    """

    def __init__(self, weights: WeightSets, start: Start, seed: int) -> None:
        self.weights, self.start, self.seed = weights, start, seed
        first = (None, weights.policy.weight_version)
        self._frozen: tuple[Path | None, int] = first
        self._current: tuple[Path | None, int] = first
        self._loaded = True

    @property
    def policy_is_frozen(self) -> bool:
        """Whether no training lies between the frozen weights and the policy's."""
        return self._current == self._frozen

    def standing(self, name: WeightSet) -> Path | Seeded | None:
        """Where these weights can be read as they are; None where they are in memory alone."""
        if name not in (WeightSet.POLICY, WeightSet.FROZEN):
            return None
        folder, version = self._current if name is WeightSet.POLICY else self._frozen
        if version < 0:
            return None
        return folder or self.beginning

    @property
    def beginning(self) -> Path | Seeded:
        """Where the run's first weights come from."""
        return self.start.folder or Seeded(self.seed)

    def arrive(self, folder: Path, version: int, loaded: bool) -> None:
        """The policy is now what `folder` holds; `loaded` if it is in memory already."""
        self._current, self._loaded = (folder, version), loaded

    def leave(self) -> None:
        """Training begins: the policy is no longer what the current folder holds."""
        self._current = (Path(), -1)

    def freeze(self) -> None:
        self._frozen = self._current
        self.weights.drop(WeightSet.FROZEN)

    def reset(self) -> None:
        """The policy goes back to the frozen weights, under a version of its own."""
        (folder, _), (_, newest) = self._frozen, self._current
        self._current, self._loaded = (folder, newest + 1), False
        self._frozen = self._current
        self.weights.drop(WeightSet.FROZEN)

    def ready(self, name: WeightSet) -> None:
        """Have these weights in memory. Collective."""
        if not self._loaded:
            fill_policy(self.weights.policy, self._source(self._current[0]))
            self.weights.policy.weight_version = self._current[1]
            self._loaded = True
        if name is WeightSet.FROZEN and name not in self.weights:
            self._fill_frozen()

    def _fill_frozen(self) -> None:
        folder, version = self._frozen
        if self.policy_is_frozen:
            self.weights.take(WeightSet.FROZEN, WeightSet.POLICY)
            return
        read = partial(load_state, self._source(folder))
        self.weights.fill(WeightSet.FROZEN, read, version)

    def _source(self, folder: Path | None) -> TensorSource:
        return weights_source(self.start, self.seed) if folder is None else weights_of(folder)
