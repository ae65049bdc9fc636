"""What a run's folder holds, read without a model: settings, stages, their pairs and steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.model_schema import TokenizerConfig
from nemo_selfpref.config.safety import check_overrides, check_values, no_environment
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer, load_tokenizer
from nemo_selfpref.errors import CheckpointError, ConfigError
from nemo_selfpref.files import read_json
from nemo_selfpref.training.same_settings import read_settings
from nemo_selfpref.training.store import done_facts, is_done, read_pairs
from nemo_selfpref.types import PreferencePair

_STEP = "step-"


def saved_config(run: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The settings a run was made with, typed, and some of them changed by `key=value`.

    Raises:
        ConfigError: no run there, or settings that this version does not know.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} is no run: it has no config.yaml. Expected a run's folder, NAME")
    check_overrides(overrides)
    if odd := [override for override in overrides if "=" not in override]:
        raise ConfigError(f"{odd[0]}: expected key=value, as trainer.devices=1")
    known, settings = algorithms(), read_settings(path)
    try:
        with no_environment():
            schema, saved = OmegaConf.structured(RunConfig), OmegaConf.create(settings)
            schema.algorithm = known[saved.algorithm.name].config_class
            cfg = OmegaConf.merge(schema, saved, OmegaConf.from_dotlist(list(overrides)))
            OmegaConf.resolve(cfg)
    except (OmegaConfBaseException, YAMLError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path}: no settings of a run that this version knows: {reason}"
        ) from error
    assert isinstance(cfg, DictConfig)
    check_values(cfg)
    return cfg


@dataclass(frozen=True)
class StageFiles:
    """One stage's folder, NN-NAME."""

    folder: Path

    @property
    def number(self) -> str:
        return self.folder.name.partition("-")[0]

    @property
    def name(self) -> str:
        return self.folder.name.partition("-")[2]

    @property
    def done(self) -> bool:
        return is_done(self.folder)

    @property
    def online(self) -> bool:
        return (self.folder / "pairs").is_dir()

    def facts(self) -> dict[str, Any]:
        """What the stage told at its end; empty before."""
        return done_facts(self.folder) if self.done else {}

    def steps(self) -> list[dict[str, float]]:
        """The metrics of each step; a line still being written is left out."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        try:
            return [json.loads(line) for line in text.split("\n")[:-1]]
        except ValueError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def measured(self, step: int) -> dict[str, float]:
        """The metrics of a step that was recorded, counted from 1."""
        found = next((metrics for metrics in self.steps() if metrics["step"] == step), None)
        if found is None:
            raise CheckpointError(f"{self.folder / 'metrics.jsonl'} has no line of step {step}")
        return found

    def given_pairs(self) -> list[PreferencePair] | None:
        """The pairs known before the first step; None where there are none."""
        path = self.folder / "pairs.parquet"
        return read_pairs(path) if path.is_file() else None

    def pairs_file(self, step: int) -> Path:
        """Where an online stage keeps the pairs of a step, counted from 1."""
        return self.folder / "pairs" / f"{_STEP}{step:06d}.parquet"

    def pairs_of(self, step: int) -> list[PreferencePair]:
        """The pairs an online stage trained on in a step, counted from 1."""
        return read_pairs(self.pairs_file(step))

    def buffered(self) -> tuple[str, list[PreferencePair], dict[str, Any]] | None:
        """The newest checkpoint's name, the pairs that the stage's maker kept for later steps, and
        its state; None where there is no checkpoint with any."""
        found = sorted(self.folder.glob(f"checkpoints/{_STEP}*/rollouts/pairs.parquet"))
        if not found:
            return None
        state = read_json(found[-1].with_name("state.json"))
        return found[-1].parent.parent.name, read_pairs(found[-1]), state.get("maker", {})

    def made_pairs(self) -> Iterator[tuple[int, list[PreferencePair]]]:
        """(step, its pairs) of an online stage, in order."""
        for path in sorted((self.folder / "pairs").glob(f"{_STEP}*.parquet")):
            yield int(path.stem.removeprefix(_STEP)), read_pairs(path)


class RunFiles:
    """A run's folder, read.

    Raises:
        ConfigError: there is no run.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.cfg = path, saved_config(path)
        found = [p for p in (path / "stages").glob("[0-9]*-*") if p.is_dir()]
        self.stages = [StageFiles(p) for p in sorted(found, key=_number)]

    def summary(self) -> list[dict[str, Any]]:
        """The closing table's facts; empty for a run that has not ended."""
        path = self.path / "summary.json"
        return read_json(path) if path.is_file() else []

    def stage(self, name: str) -> StageFiles:
        """A stage by its name or its folder's.

        Raises:
            ConfigError: there is none.
        """
        found = [s for s in self.stages if name in (s.name, s.folder.name)]
        if not found:
            names = ", ".join(s.folder.name for s in self.stages) or "none yet"
            raise ConfigError(f"--stage {name}: no such stage in {self.path}. There are: {names}")
        return found[-1]

    def trained(self, step: int | None, name: str | None = None) -> StageFiles:
        """The training stage meant: the one named, else the last one that recorded a step.

        Raises:
            ConfigError: there is none, or it did not record that step.
        """
        stages = [self.stage(name)] if name else [s for s in self.stages if s.steps()]
        if not stages or not stages[-1].steps():
            raise ConfigError(f"{self.path}: no step recorded; expected a training stage's steps")
        last = int(stages[-1].steps()[-1]["step"])
        if step is not None and not 1 <= step <= last:
            raise ConfigError(
                f"--step {step}: stage {stages[-1].folder.name} recorded the steps 1 to {last}"
            )
        return stages[-1]

    def tokenizer(self) -> ChatTokenizer:
        """The run's own: saved with its weights, else that of the model it started from.

        Raises:
            CheckpointError, DataError: none can be read.
        """
        saved = [
            *self.path.glob("checkpoint/tokenizer"),
            *self.path.glob("stages/*/weights/tokenizer"),
            *self.path.glob("stages/*/checkpoints/*/tokenizer"),
        ]
        if saved:
            return load_tokenizer(TokenizerConfig(), str(saved[0]))
        start = self.cfg.model.restore_from_path
        own: Any = OmegaConf.to_object(self.cfg.model.tokenizer)
        if start and (Path(start) / "tokenizer").is_dir():
            start = str(Path(start) / "tokenizer")
        if start is None and own == TokenizerConfig():
            raise CheckpointError(f"{self.path}: no tokenizer there, and none in its config.yaml")
        return load_tokenizer(own, start)


def _number(folder: Path) -> int:
    return int(folder.name.partition("-")[0])
