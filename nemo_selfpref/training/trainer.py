"""Training stages: from rows or a pair maker to fitted weights on disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_selfpref.algorithms.base import PairMaker, TrainSettings
from nemo_selfpref.checkpoint.training_state import save_weights
from nemo_selfpref.config.schema import NonFinite, RefMode, RunConfig, StaleSamples
from nemo_selfpref.data.batching import StepPlan
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import DataError, TrainingError
from nemo_selfpref.files import write_json
from nemo_selfpref.megatron.parallel import barrier
from nemo_selfpref.models.nonfinite import NonFiniteSteps, refuse_nonfinite
from nemo_selfpref.models.preference_model import MegatronGPTPreferenceModel
from nemo_selfpref.models.stage import StepSource, TrainingStage
from nemo_selfpref.objectives.objective import Objective
from nemo_selfpref.rollout.sampling import seed_of
from nemo_selfpref.training.copies import StageCopies
from nemo_selfpref.training.fit import fit_stage
from nemo_selfpref.training.fp8_guard import GuardedSteps
from nemo_selfpref.training.making import Ahead, AtOnce, Making, PairSource
from nemo_selfpref.training.places import WeightPlaces
from nemo_selfpref.training.reference_cache import open_cache
from nemo_selfpref.training.rollout_check import RolloutCheck
from nemo_selfpref.training.rollouts import EngineRollouts
from nemo_selfpref.training.signals import StopSignals
from nemo_selfpref.training.stages import Stages
from nemo_selfpref.training.steps import FixedSteps, OnlineSteps, Passes
from nemo_selfpref.training.store import PLAN, done_facts, is_done, read_tensors, write_pairs
from nemo_selfpref.types import Demonstration, PreferencePair, TrainingRow, WeightSet

if TYPE_CHECKING:
    from nemo_selfpref.training.service import RolloutService


class StageTrainer:
    """Trains the run's model, one stage after another; a finished stage is not trained again."""

    def __init__(
        self,
        cfg: RunConfig,
        model: MegatronGPTPreferenceModel,
        tokenizer: ChatTokenizer,
        places: WeightPlaces,
        rollouts: EngineRollouts,
        stages: Stages,
        check: RolloutCheck,
        signals: StopSignals,
        service: RolloutService | None = None,
    ) -> None:
        self.cfg, self.model, self.tokenizer = cfg, model, tokenizer
        self.places, self.rollouts, self.stages = places, rollouts, stages
        self.policy, self.weights = model.policy, places.weights
        self._check, self._signals, self._service = check, signals, service
        self._cache = open_cache(cfg.model, self.policy, places, stages.console.say)

    def train(
        self,
        name: str,
        rows: Sequence[TrainingRow],
        objective: Objective,
        settings: TrainSettings = TrainSettings(),
    ) -> None:
        stage = self.stages.next(name)
        if self._trained(name, stage):
            return
        _refuse_empty(name, rows)
        if self.policy.layout.is_main and isinstance(rows[0], PreferencePair):
            write_pairs(stage / "pairs.parquet", [r for r in rows if isinstance(r, PreferencePair)])
        plan = self._plan(name, len(rows), settings.global_batch_size, settings)
        self._keep_plan(stage, plan)
        copies = StageCopies(self.weights, settings.reference, settings.averaging)
        steps = FixedSteps(rows, plan, copies, self._passes(copies, objective))
        measured: dict[str, float] = {}
        if steps.scored_once:
            measured |= self._score_once(name, stage, steps, settings.reference.mode)
        facts = self._fit(name, stage, steps, objective, settings)
        copies.end()
        measured |= facts["metrics"]
        self.stages.finish(stage, {**facts, "metrics": measured, "rows": len(rows)})

    def train_online(
        self,
        name: str,
        rows: Sequence[Demonstration],
        pairs: PairMaker,
        objective: Objective,
        settings: TrainSettings = TrainSettings(),
        prompts_per_step: int | None = None,
    ) -> None:
        stage = self.stages.next(name)
        if self._trained(name, stage):
            return
        _refuse_empty(name, rows)
        plan = self._plan(name, len(rows), prompts_per_step, settings)
        self._keep_plan(stage, plan)
        copies = StageCopies(self.weights, settings.reference, settings.averaging)
        passes = self._passes(copies, objective)
        source = self._source(stage.name, rows, pairs, plan)
        rollout = self.cfg.rollout
        steps = OnlineSteps(
            plan,
            pairs,
            source,
            stage,
            copies,
            passes,
            self._check,
            rollout.max_staleness,
            rollout.stale_samples is StaleSamples.count,
        )
        try:
            facts = self._fit(name, stage, steps, objective, settings)
        finally:
            source.close()
        copies.end()
        made = {
            "reports": {title: asdict(report) for title, report in steps.reports.items()},
            "generated_tokens": steps.generated_tokens,
            "rollout_wait_seconds": steps.waited_s,
            "histograms": {title: dict(bins) for title, bins in pairs.histograms().items()},
        }
        self.stages.finish(stage, {**facts, **made})

    def _source(
        self, scope: str, rows: Sequence[Demonstration], maker: PairMaker, plan: StepPlan
    ) -> PairSource:
        def rows_of(step: int) -> list[Demonstration]:
            return [rows[n] for n in plan.rows_of_step(step)]

        if self._service is None:
            return AtOnce(Making(maker, rows_of, self.rollouts, scope))
        stop = threading.Event()
        asking = self._service.asking(self.rollouts, stop.is_set)
        making = Making(maker, rows_of, asking, scope)
        staleness, main = self.cfg.rollout.max_staleness, self.policy.layout.is_main
        return Ahead(making, self._service, staleness, plan.num_steps, main, stop)

    def _trained(self, name: str, stage: Path) -> bool:
        """Whether the stage is done already, and then where its weights are."""
        if not is_done(stage):
            self.places.ready(WeightSet.POLICY)
            return False
        self.places.arrive(stage / "weights", done_facts(stage)["weight_version"], loaded=False)
        self.stages.skip(name, stage)
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

    def _keep_plan(self, stage: Path, plan: StepPlan) -> None:
        """Write down which rows each step takes, for whoever looks back."""
        if self.policy.layout.is_main:
            write_json(stage / PLAN, asdict(plan))

    def _passes(self, copies: StageCopies, objective: Objective) -> Passes:
        return Passes(self.policy, copies, objective, self.places.ready, self._cache)

    def _score_once(
        self, name: str, stage: Path, steps: FixedSteps, mode: RefMode
    ) -> Mapping[str, float]:
        """Score what does not move; what was measured doing so."""
        unmoved = mode is RefMode.last or self.places.policy_is_frozen
        total = 2 * len(steps.rows) * len(steps.scored_once)
        with self.stages.console.progress(f"{name}: reference", total, "answers") as progress:
            path = stage / "reference.safetensors"
            measured = steps.score_once(path, unmoved, lambda n: progress(n, 0))
        try:
            refuse_nonfinite(name, read_tensors(path), steps.rows)
        except TrainingError:
            barrier()  # every rank has read it
            if self.policy.layout.is_main:
                path.unlink(missing_ok=True)  # another start scores anew
            raise
        return measured

    def _fit(
        self,
        name: str,
        stage: Path,
        steps: StepSource,
        objective: Objective,
        settings: TrainSettings,
    ) -> dict[str, Any]:
        """Train the stage to its end and keep its weights; what to tell of it."""
        if self.policy.in_fp8:
            steps = GuardedSteps(steps, self.policy, self.cfg.model, self.stages.console.say)
        fitted = TrainingStage(
            name=name,
            steps=steps,
            objective=objective,
            optim=settings.optim or self.cfg.model.optim,
            gradient_clip_val=self.cfg.trainer.gradient_clip_val,
            micro_batch_size=self.cfg.model.micro_batch_size,
            nonfinite=self._nonfinite(stage),
        )
        started = time.monotonic()
        self.places.leave()
        console = self.stages.console
        last = fit_stage(self.model, fitted, self.cfg, stage, console, self._signals)
        if self._cache is not None:
            self._cache.flush()
        save_weights(stage / "weights", self.policy, self.tokenizer)
        self.places.arrive(stage / "weights", self.policy.weight_version, loaded=True)
        return {
            "stage": name,
            "steps": steps.num_steps,
            "seconds": time.monotonic() - started,
            "weight_version": self.policy.weight_version,
            **last,
        }

    def _nonfinite(self, stage: Path) -> NonFiniteSteps:
        t, main = self.cfg.trainer, self.policy.layout.is_main
        path = stage / "nonfinite.jsonl" if main else None
        halt = t.nonfinite is NonFinite.halt
        return NonFiniteSteps(halt, t.max_nonfinite_steps, path, self.stages.console.say)


def _refuse_empty(name: str, rows: Sequence[TrainingRow]) -> None:
    if not rows:
        raise DataError(
            f"stage {name} has no rows left to train on; see the counts of dropped rows above"
        )
