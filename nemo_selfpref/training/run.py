"""A run: it offers algorithms their stages, and remembers what is done.

Nothing here knows a method. Each call an algorithm makes (sample, label_scores, perplexities, ask,
train) is a stage with a folder of its own; when a run is started again, finished stages are read
back instead of being computed, and a training stage continues from its newest checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors.torch import load_file

from nemo_selfpref.algorithms.base import PairMaker, TrainSettings
from nemo_selfpref.checkpoint.files import read_json, write_json
from nemo_selfpref.checkpoint.training_state import save_weights
from nemo_selfpref.config.loader import to_typed
from nemo_selfpref.config.schema import RefMode
from nemo_selfpref.data.batching import StepPlan
from nemo_selfpref.data.dataset import load_demonstrations, load_preferences
from nemo_selfpref.data.templates import PromptTemplate
from nemo_selfpref.errors import DataError
from nemo_selfpref.megatron.parallel import barrier
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.models.preference_model import MegatronGPTPreferenceModel
from nemo_selfpref.models.stage import StepSource, TrainingStage
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.objectives.objective import Objective
from nemo_selfpref.pairing.filters import perplexity
from nemo_selfpref.rollout.sampling import seed_of
from nemo_selfpref.rollout.teacher import Teacher, TeacherRequest, write_requests
from nemo_selfpref.training.copies import StageCopies
from nemo_selfpref.training.fit import fit_stage
from nemo_selfpref.training.places import WeightPlaces
from nemo_selfpref.training.rollouts import EngineRollouts
from nemo_selfpref.training.session import Start, embedded_engine
from nemo_selfpref.training.steps import FixedSteps, OnlineSteps, Passes
from nemo_selfpref.training.store import (
    RunFolder,
    done_facts,
    is_done,
    mark_done,
    read_completions,
    read_label_scores,
    write_completions,
    write_label_scores,
    write_pairs,
    write_tensors,
)
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

_POLL_SECONDS = 0.5


class Run:
    """RunContext over one policy (algorithms/base.py)."""

    def __init__(
        self,
        cfg: DictConfig,
        policy: Policy,
        start: Start,
        folder: RunFolder,
        console: Console,
    ) -> None:
        self.cfg = to_typed(cfg)
        self.policy, self.tokenizer = policy, start.tokenizer
        self.folder, self.console = folder, console
        self.model = MegatronGPTPreferenceModel(cfg.model, policy)
        self.weights = WeightSets(policy)
        self.places = WeightPlaces(self.weights, start, self.cfg.seed)
        engine = embedded_engine(policy, self.tokenizer, self.cfg.rollout.batch_size, self.weights)
        self.rollouts = EngineRollouts(
            self.cfg,
            self.tokenizer,
            engine,
            self.places.ready,
            policy.arch.max_position_embeddings,
        )
        self.summary: list[dict[str, Any]] = []

    # -- data ---------------------------------------------------------------------------------

    def demonstrations(self) -> list[Demonstration]:
        rows, report = load_demonstrations(self.cfg.data, self.tokenizer)
        self.note("demonstrations", report)
        return rows

    def preferences(self, paths: Sequence[str] | None = None) -> list[PreferencePair]:
        data = replace(self.cfg.data, train_path=list(paths)) if paths else self.cfg.data
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
        self.summary.append({"stage": stage, "kept": report.kept, "dropped": dict(report.dropped)})
        self.console.rows(stage, report)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Facts about the stage before, for the closing table."""
        assert self.summary, "metrics are logged about a stage that is listed"
        self.summary[-1] = {**self.summary[-1], "metrics": dict(metrics)}

    # -- rollouts -----------------------------------------------------------------------------

    def sample(
        self,
        name: str,
        prompts: Sequence[tuple[str, TokenIds]],
        *,
        weights: WeightSet = WeightSet.POLICY,
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        stage = self.folder.stage(name)
        path = stage / "completions.parquet"
        if is_done(stage):
            self._skip(name, stage)
            return read_completions(path)
        started = time.monotonic()
        with self.console.progress(name, len(prompts), "answers") as progress:
            found = self.rollouts.sample(
                name, prompts, weights=weights, limits=limits, progress=progress
            )
        facts = {
            "stage": name,
            "answers": len(found),
            "generated_tokens": sum(len(c.token_ids) for c in found),
            "seconds": time.monotonic() - started,
            "weight_version": self.weights.version(weights),
            "truncated": sum(c.finish_reason.value == "length" for c in found),
        }
        if self.policy.layout.is_main:
            write_completions(path, found)
        self._finish(stage, facts)
        return found

    def label_scores(
        self,
        name: str,
        prompts: Sequence[TokenIds],
        labels: TokenIds,
        *,
        weights: WeightSet = WeightSet.POLICY,
    ) -> list[LabelScores]:
        stage = self.folder.stage(name)
        path = stage / "labels.parquet"
        if is_done(stage):
            self._skip(name, stage)
            return read_label_scores(path)
        started = time.monotonic()
        with self.console.progress(name, len(prompts), "judgements") as progress:
            found = self.rollouts.label_scores(
                name, prompts, labels, weights=weights, progress=progress
            )
        if self.policy.layout.is_main:
            write_label_scores(path, found)
        facts = {"stage": name, "answers": len(found), "seconds": time.monotonic() - started}
        self._finish(stage, facts)
        return found

    def perplexities(self, name: str, rows: Sequence[tuple[TokenIds, TokenIds]]) -> list[float]:
        stage = self.folder.stage(name)
        path = stage / "logprobs.safetensors"
        if not is_done(stage):
            self.places.ready(WeightSet.POLICY)
            with self.console.progress(name, len(rows), "answers scored") as progress:
                found = self.policy.score(rows, lambda n: progress(n, 0))
            if self.policy.layout.is_main:
                write_tensors(path, {"sums": found.sums, "lengths": found.lengths})
            self._finish(stage, {"stage": name, "answers": len(rows)}, listed=False)
        saved = load_file(path)
        return [
            perplexity(total, length)
            for total, length in zip(saved["sums"].tolist(), saved["lengths"].tolist(), strict=True)
        ]

    def ask(
        self, name: str, make_teacher: Callable[[], Teacher], requests: Sequence[TeacherRequest]
    ) -> dict[str, str]:
        stage = self.folder.stage(name)
        if self.policy.layout.is_main:
            self._ask(name, stage, make_teacher, requests)
        # An external model may take longer than a collective is allowed to wait, so the other
        # ranks watch for the file; the launcher ends them if the first rank fails.
        while not is_done(stage):
            time.sleep(_POLL_SECONDS)
        barrier()
        return read_json(stage / "answers.json")

    def _ask(
        self,
        name: str,
        stage: Path,
        make_teacher: Callable[[], Teacher],
        requests: Sequence[TeacherRequest],
    ) -> None:
        if is_done(stage):
            self._skip(name, stage)
            return
        stage.mkdir(parents=True, exist_ok=True)
        write_requests(stage / "requests.jsonl", requests)
        self.console.say(f"{name}: {len(requests)} questions, in {stage / 'requests.jsonl'}")
        teacher = make_teacher()
        estimate = getattr(teacher, "estimate_tokens", None)
        if estimate is not None:
            self.console.say(f"{name}: about {estimate(requests):,} prompt tokens to send")
        with self.console.progress(name, len(requests), "answers") as progress:
            seen = 0

            def done(total: int) -> None:
                nonlocal seen
                progress(total - seen, 0)
                seen = total

            answers = teacher.answer(requests, done)
        write_json(stage / "answers.json", answers)
        cost = getattr(teacher, "cost", None)
        facts = {"stage": name, "answers": len(answers), **(vars(cost()) if cost else {})}
        mark_done(stage, facts)
        self.summary.append(facts)

    # -- training -----------------------------------------------------------------------------

    def train(
        self,
        name: str,
        rows: Sequence[TrainingRow],
        objective: Objective,
        settings: TrainSettings = TrainSettings(),
    ) -> None:
        stage = self.folder.stage(name)
        if self._trained(name, stage):
            return
        _refuse_empty(name, rows)
        if self.policy.layout.is_main and isinstance(rows[0], PreferencePair):
            write_pairs(stage / "pairs.parquet", [r for r in rows if isinstance(r, PreferencePair)])
        plan = self._plan(name, len(rows), settings.global_batch_size, settings)
        copies = StageCopies(self.weights, settings.reference, settings.averaging)
        steps = FixedSteps(rows, plan, copies, self._passes(copies, objective))
        if steps.scored_once:
            self._score_once(name, stage, steps, settings.reference.mode)
        facts = self._fit(name, stage, steps, objective, settings)
        copies.end()
        self._finish(stage, {**facts, "rows": len(rows)})

    def train_online(
        self,
        name: str,
        rows: Sequence[Demonstration],
        pairs: PairMaker,
        objective: Objective,
        settings: TrainSettings = TrainSettings(),
        prompts_per_step: int | None = None,
    ) -> None:
        stage = self.folder.stage(name)
        if self._trained(name, stage):
            return
        _refuse_empty(name, rows)
        plan = self._plan(name, len(rows), prompts_per_step, settings)
        copies = StageCopies(self.weights, settings.reference, settings.averaging)
        passes = self._passes(copies, objective)
        steps = OnlineSteps(rows, plan, pairs, self.rollouts, stage, copies, passes)
        facts = self._fit(name, stage, steps, objective, settings)
        copies.end()
        made = {
            "reports": {title: asdict(report) for title, report in steps.reports.items()},
            "generated_tokens": steps.generated_tokens,
            "histograms": {title: dict(bins) for title, bins in pairs.histograms().items()},
        }
        self._finish(stage, {**facts, **made})

    def freeze(self) -> None:
        self.places.freeze()

    def reset_policy(self) -> None:
        self.places.reset()

    def _trained(self, name: str, stage: Path) -> bool:
        """Whether the stage is done already, and then where its weights are."""
        if not is_done(stage):
            self.places.ready(WeightSet.POLICY)
            return False
        self.places.arrive(stage / "weights", done_facts(stage)["weight_version"], loaded=False)
        self._skip(name, stage)
        return True

    def _plan(
        self, name: str, num_rows: int, batch_size: int | None, settings: TrainSettings
    ) -> StepPlan:
        cfg = self.cfg
        return StepPlan(
            num_rows=num_rows,
            global_batch_size=batch_size or cfg.model.global_batch_size,
            max_epochs=settings.max_epochs or cfg.trainer.max_epochs,
            max_steps=cfg.trainer.max_steps,
            seed=seed_of(cfg.seed, name) % 2**31,
            shuffle=cfg.data.shuffle,
        )

    def _passes(self, copies: StageCopies, objective: Objective) -> Passes:
        return Passes(self.policy, copies, objective, self.places.ready)

    def _score_once(self, name: str, stage: Path, steps: FixedSteps, mode: RefMode) -> None:
        unmoved = mode is RefMode.last or self.places.policy_is_frozen
        total = 2 * len(steps.rows) * len(steps.scored_once)
        with self.console.progress(f"{name}: reference", total, "answers") as progress:
            steps.score_once(stage / "reference.safetensors", unmoved, lambda n: progress(n, 0))

    def _fit(
        self,
        name: str,
        stage: Path,
        steps: StepSource,
        objective: Objective,
        settings: TrainSettings,
    ) -> dict[str, Any]:
        """Train the stage to its end and keep its weights; what to tell of it."""
        fitted = TrainingStage(
            name=name,
            steps=steps,
            objective=objective,
            optim=settings.optim or self.cfg.model.optim,
            gradient_clip_val=self.cfg.trainer.gradient_clip_val,
            micro_batch_size=self.cfg.model.micro_batch_size,
        )
        started = time.monotonic()
        self.places.leave()
        last = fit_stage(self.model, fitted, self.cfg, stage, self.console)
        save_weights(stage / "weights", self.policy, self.tokenizer)
        self.places.arrive(stage / "weights", self.policy.weight_version, loaded=True)
        return {
            "stage": name,
            "steps": steps.num_steps,
            "seconds": time.monotonic() - started,
            "weight_version": self.policy.weight_version,
            **last,
        }

    def save_final(self) -> Path:
        """The trained weights as RUN/checkpoint."""
        self.places.ready(WeightSet.POLICY)
        target = self.folder.path / "checkpoint"
        save_weights(target, self.policy, self.tokenizer)
        return target

    # -- helpers ------------------------------------------------------------------------------

    def _skip(self, name: str, stage: Path) -> None:
        """List a finished stage as it was."""
        self.summary.append(done_facts(stage))
        self.console.skipped(name)

    def _finish(self, stage: Path, facts: dict[str, Any], listed: bool = True) -> None:
        barrier()
        if self.policy.layout.is_main:
            mark_done(stage, facts)
        barrier()
        if listed:
            self.summary.append(facts)


def _refuse_empty(name: str, rows: Sequence[TrainingRow]) -> None:
    if not rows:
        raise DataError(
            f"stage {name} has no rows left to train on; see the counts of dropped rows above"
        )
