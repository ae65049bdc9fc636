"""A run: it offers algorithms their stages, and remembers what is done.

Nothing here knows a method. Each call an algorithm makes (sample, label_scores, perplexities, ask,
train) is a stage with a folder of its own; when a run is started again, finished stages are read
back instead of being computed, and a training stage continues from its newest checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from nemo_selfpref.algorithms.base import PairMaker, TrainSettings
from nemo_selfpref.checkpoint.saver import problems_together
from nemo_selfpref.checkpoint.seal import FileSum, read_seal
from nemo_selfpref.checkpoint.training_state import WEIGHTS, save_weights
from nemo_selfpref.config.loader import to_typed
from nemo_selfpref.config.schema import RolloutEngineName
from nemo_selfpref.data.dataset import load_demonstrations, load_preferences, load_prompt_rows
from nemo_selfpref.data.templates import PromptTemplate
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.megatron.parallel import any_of
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.models.preference_model import MegatronGPTPreferenceModel
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.objectives.objective import Objective
from nemo_selfpref.pairing.filters import perplexity
from nemo_selfpref.rollout.engine import RolloutEngine
from nemo_selfpref.rollout.teacher import Teacher, TeacherRequest
from nemo_selfpref.training.ask import ask_teacher
from nemo_selfpref.training.parts import Parts
from nemo_selfpref.training.places import WeightPlaces
from nemo_selfpref.training.rollout_check import RolloutCheck, Sampled, spread
from nemo_selfpref.training.rollouts import EngineRollouts
from nemo_selfpref.training.session import Start, embedded_engine
from nemo_selfpref.training.signals import StopSignals
from nemo_selfpref.training.stages import Stages
from nemo_selfpref.training.store import (
    RunFolder,
    is_done,
    read_completions,
    read_label_scores,
    read_tensors,
    write_completions,
    write_label_scores,
    write_tensors,
)
from nemo_selfpref.training.trainer import StageTrainer
from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    LabelScores,
    PreferencePair,
    TokenIds,
    TrainingRow,
    WeightSet,
)

if TYPE_CHECKING:
    from nemo_selfpref.training.service import RolloutService


_COMPLETIONS = (write_completions, read_completions)
_LABEL_SCORES = (write_label_scores, read_label_scores)


def _nothing(_: WeightSet) -> None:
    pass


def _never() -> bool:
    return False


class Run:
    """RunContext over one policy (algorithms/base.py)."""

    def __init__(
        self,
        cfg: DictConfig,
        policy: Policy,
        start: Start,
        folder: RunFolder,
        console: Console,
        signals: StopSignals,
        asked: frozenset[WeightSet] = frozenset(),
    ) -> None:
        self.cfg = to_typed(cfg)
        self.policy, self.tokenizer = policy, start.tokenizer
        self.console = console
        self.stages = Stages(folder, console, policy, signals)
        self.weights = WeightSets(policy)
        self.places = WeightPlaces(self.weights, start, self.cfg.seed)
        self.service: RolloutService | None = None
        ready, engine = self.places.ready, self._embedded()
        cancelled = None
        if self.cfg.rollout.engine is RolloutEngineName.vllm:
            from nemo_selfpref.training.service import RolloutService

            self.service = engine = RolloutService(
                self.cfg, policy, self.places, start, folder.path, console, asked
            )
            ready, cancelled = _nothing, _never  # the service sees to it, and has a deadline
        self.rollouts = EngineRollouts(
            self.cfg,
            self.tokenizer,
            engine,
            ready,
            policy.arch.max_position_embeddings,
            cancelled=cancelled,
        )
        self._check = RolloutCheck(
            self.weights, self.places.ready, self.cfg.rollout.logprob_alarm, console.say
        )
        model = MegatronGPTPreferenceModel(cfg.model, policy)
        self._trainer = StageTrainer(
            self.cfg,
            model,
            self.tokenizer,
            self.places,
            self.rollouts,
            self.stages,
            self._check,
            signals,
            self.service,
        )

    def _embedded(self) -> RolloutEngine:
        return embedded_engine(
            self.policy, self.tokenizer.stop_ids, self.cfg.rollout.batch_size, self.weights
        )

    def open(self) -> None:
        """Start what answers questions. Collective."""
        if self.service is not None:
            self.service.open()

    def close(self) -> None:
        """End what open started."""
        if self.service is not None:
            self.service.close()

    # -- data ---------------------------------------------------------------------------------

    def demonstrations(self) -> list[Demonstration]:
        rows, report = load_demonstrations(self.cfg.data, self.tokenizer)
        self.note("demonstrations", report)
        return rows

    def prompt_rows(self) -> list[Demonstration]:
        rows, report = load_prompt_rows(self.cfg.data, self.tokenizer)
        self.note("prompts", report)
        return rows

    def preferences(self, paths: Sequence[str] | None = None) -> list[PreferencePair]:
        data = self.cfg.data
        if paths:
            data = replace(data, train_path=list(paths), limit=None)
        rows, report = load_preferences(data, self.tokenizer)
        self.note("preference pairs", report)
        return rows

    def template(
        self, name: str, required: frozenset[str], optional: frozenset[str] = frozenset()
    ) -> PromptTemplate:
        return self.rollouts.template(name, required, optional)

    def encode_user(self, row: Demonstration | PreferencePair, text: str) -> TokenIds:
        return self.rollouts.encode_user(row, text)

    def fits(self, prompt: TokenIds, new_tokens: int | None = None) -> bool:
        return self.rollouts.fits(prompt, new_tokens)

    def note(self, stage: str, report: DropReport) -> None:
        self.stages.note(stage, report)

    def log(self, metrics: Mapping[str, float]) -> None:
        self.stages.log(metrics)

    # -- rollouts -----------------------------------------------------------------------------

    def sample(
        self,
        name: str,
        prompts: Sequence[tuple[str, TokenIds]],
        *,
        weights: WeightSet = WeightSet.POLICY,
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        stage = self.stages.next(name)
        path = stage / "completions.parquet"
        parts = self._parts(stage)
        if is_done(stage):
            parts.clear()
            self.stages.skip(name, stage)
            return read_completions(path)
        started = time.monotonic()
        with self.console.progress(name, len(prompts), "answers") as progress:

            def make(part: slice) -> list[Completion]:
                own = None if limits is None else limits[part]
                return self.rollouts.sample(
                    name,
                    prompts[part],
                    weights=weights,
                    limits=own,
                    progress=progress,
                    stop=parts.stop,
                )

            found = parts.collect(len(prompts), make, _COMPLETIONS, progress)
        facts = {
            "stage": name,
            "answers": len(found),
            "generated_tokens": sum(len(c.token_ids) for c in found),
            "cached_tokens": sum(c.cached_tokens for c in found),
            "seconds": time.monotonic() - started,
            "weight_version": found[0].weight_version if found else -1,
            "truncated": sum(c.finish_reason.value == "length" for c in found),
            "metrics": self._check.metrics(self._some([ids for _, ids in prompts], found)),
        }
        if self.policy.layout.is_main:
            write_completions(path, found)
        self.stages.finish(stage, facts)
        parts.clear()
        return found

    def _parts(self, stage: Path) -> Parts:
        device = self.policy.platform.device()
        return Parts(stage, self.cfg.rollout.save_every, device, self.stages.signals)

    def _some(self, prompts: Sequence[TokenIds], found: Sequence[Completion]) -> list[Sampled]:
        """Some answers to compare, out of all parts of the stage."""
        self.rollouts.take_sampled()  # those of the parts made in this process
        chosen = spread(len(found), self.cfg.rollout.check_samples)
        return [(prompts[n], found[n]) for n in chosen]

    def label_scores(
        self,
        name: str,
        prompts: Sequence[TokenIds],
        labels: TokenIds,
        *,
        weights: WeightSet = WeightSet.POLICY,
    ) -> list[LabelScores]:
        stage = self.stages.next(name)
        path = stage / "labels.parquet"
        parts = self._parts(stage)
        if is_done(stage):
            parts.clear()
            self.stages.skip(name, stage)
            return read_label_scores(path)
        started = time.monotonic()
        with self.console.progress(name, len(prompts), "judgements") as progress:

            def make(part: slice) -> list[LabelScores]:
                return self.rollouts.label_scores(
                    name,
                    prompts[part],
                    labels,
                    weights=weights,
                    progress=progress,
                    stop=parts.stop,
                )

            found = parts.collect(len(prompts), make, _LABEL_SCORES, progress)
        if self.policy.layout.is_main:
            write_label_scores(path, found)
        facts = {"stage": name, "answers": len(found), "seconds": time.monotonic() - started}
        self.stages.finish(stage, facts)
        parts.clear()
        return found

    def perplexities(self, name: str, rows: Sequence[tuple[TokenIds, TokenIds]]) -> list[float]:
        stage = self.stages.next(name)
        path = stage / "logprobs.safetensors"
        if not is_done(stage):
            self.places.ready(WeightSet.POLICY)
            with self.console.progress(name, len(rows), "answers scored") as progress:
                found = self.policy.score(rows, lambda n: progress(n, 0))
            if self.policy.layout.is_main:
                write_tensors(path, {"sums": found.sums, "lengths": found.lengths})
            self.stages.finish(stage, {"stage": name, "answers": len(rows)}, listed=False)
        saved = read_tensors(path)
        return [
            perplexity(total, length)
            for total, length in zip(saved["sums"].tolist(), saved["lengths"].tolist(), strict=True)
        ]

    def ask(
        self, name: str, make_teacher: Callable[[], Teacher], requests: Sequence[TeacherRequest]
    ) -> dict[str, str]:
        return ask_teacher(self.stages, name, make_teacher, requests)

    # -- training -----------------------------------------------------------------------------

    def train(
        self,
        name: str,
        rows: Sequence[TrainingRow],
        objective: Objective,
        settings: TrainSettings = TrainSettings(),
    ) -> None:
        self._trainer.train(name, rows, objective, settings)

    def train_online(
        self,
        name: str,
        rows: Sequence[Demonstration],
        pairs: PairMaker,
        objective: Objective,
        settings: TrainSettings = TrainSettings(),
        prompts_per_step: int | None = None,
    ) -> None:
        self._trainer.train_online(name, rows, pairs, objective, settings, prompts_per_step)

    def freeze(self) -> None:
        self.places.freeze()

    def reset_policy(self) -> None:
        self.places.reset()

    @property
    def summary(self) -> list[dict[str, Any]]:
        """The closing table's facts, in order."""
        return self.stages.summary

    def save_final(self) -> Path:
        """The trained weights as RUN/checkpoint."""
        self.places.ready(WeightSet.POLICY)
        target = self.stages.folder.path / "checkpoint"
        if not self._is_saved(target):
            save_weights(target, self.policy, self.tokenizer)
        return target

    def _is_saved(self, target: Path) -> bool:
        """Whether the last stage's weights are there, whole, from an earlier start of the run. The
        same on every rank."""
        source, device = self.places.standing(WeightSet.POLICY), self.policy.platform.device()
        differ = not isinstance(source, Path) or _weight_sums(source) != _weight_sums(target)
        return not any_of([differ], device)[0] and not problems_together(target, device)


def _weight_sums(folder: Path) -> dict[str, FileSum] | None:
    """The sums of a checkpoint's weights as its seal has them; None where there is none."""
    try:
        return {n: s for n, s in read_seal(folder).items() if n.startswith(f"{WEIGHTS}/")}
    except CheckpointError:
        return None
