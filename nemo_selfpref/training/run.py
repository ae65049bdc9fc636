"""A run: it builds the model, offers algorithms their stages, and remembers what is done.

Nothing here knows a method. Each call an algorithm makes (sample, perplexities, ask, train) is a
stage with a folder of its own; when a run is started again, finished stages are read back instead
of being computed, and a training stage continues from its newest checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors.torch import load_file

from nemo_selfpref.algorithms.base import TrainSettings
from nemo_selfpref.checkpoint.files import read_json, write_json
from nemo_selfpref.checkpoint.training_state import load_weights, save_weights
from nemo_selfpref.config.loader import to_typed
from nemo_selfpref.config.paths import prompts_dir
from nemo_selfpref.data.batching import StepPlan
from nemo_selfpref.data.dataset import load_demonstrations, load_preferences
from nemo_selfpref.data.templates import PromptTemplate, load_template
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import DataError
from nemo_selfpref.megatron.parallel import (
    barrier,
)
from nemo_selfpref.megatron.policy import Policy, ReferenceLogps
from nemo_selfpref.models.preference_model import MegatronGPTPreferenceModel, TrainingStage
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.objectives.objective import Objective, Pass
from nemo_selfpref.pairing.filters import perplexity
from nemo_selfpref.rollout.engine import RolloutEngine
from nemo_selfpref.rollout.sampling import seed_of
from nemo_selfpref.rollout.teacher import Teacher, TeacherRequest, write_requests
from nemo_selfpref.training.fit import fit_stage
from nemo_selfpref.training.session import embedded_engine
from nemo_selfpref.training.store import (
    RunFolder,
    done_facts,
    is_done,
    mark_done,
    read_completions,
    write_completions,
    write_pairs,
    write_tensors,
)
from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    GenerationRequest,
    PreferencePair,
    SamplingParams,
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
        tokenizer: ChatTokenizer,
        folder: RunFolder,
        console: Console,
    ) -> None:
        self.cfg = to_typed(cfg)
        self.policy, self.tokenizer = policy, tokenizer
        self.folder, self.console = folder, console
        self.model = MegatronGPTPreferenceModel(cfg.model, policy)
        self.engine: RolloutEngine = embedded_engine(policy, tokenizer, self.cfg.rollout.batch_size)
        self.summary: list[dict[str, Any]] = []
        self._unread_weights: Path | None = None

    # -- data ---------------------------------------------------------------------------------

    def demonstrations(self) -> list[Demonstration]:
        rows, report = load_demonstrations(self.cfg.data, self.tokenizer)
        self.note("demonstrations", report)
        return rows

    def preferences(self) -> list[PreferencePair]:
        rows, report = load_preferences(self.cfg.data, self.tokenizer)
        self.note("preference pairs", report)
        return rows

    def template(
        self, name: str, required: frozenset[str], optional: frozenset[str] = frozenset()
    ) -> PromptTemplate:
        return load_template(name, required, optional, folder=prompts_dir())

    def encode_user(self, row: Demonstration, text: str) -> TokenIds:
        system = [m for m in row.messages if m["role"] == "system"]
        return self.tokenizer.encode_prompt([*system, {"role": "user", "content": text}])

    def note(self, stage: str, report: DropReport) -> None:
        self.summary.append({"stage": stage, "kept": report.kept, "dropped": dict(report.dropped)})
        self.console.rows(stage, report)

    # -- rollouts -----------------------------------------------------------------------------

    def sample(self, name: str, prompts: Sequence[tuple[str, TokenIds]]) -> list[Completion]:
        stage = self.folder.stage(name)
        path = stage / "completions.parquet"
        if is_done(stage):
            self._skip(name, stage)
            return read_completions(path)
        self._read_weights()
        rollout = self.cfg.rollout
        params = SamplingParams(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k
        )
        requests = [
            GenerationRequest(id, ids, seed_of(self.cfg.seed, name, id)) for id, ids in prompts
        ]
        started = time.monotonic()
        with self.console.progress(name, len(requests), "answers") as progress:
            found = self.engine.generate(requests, params, WeightSet.POLICY, progress)
        facts = {
            "stage": name,
            "answers": len(found),
            "generated_tokens": sum(len(c.token_ids) for c in found),
            "seconds": time.monotonic() - started,
            "weight_version": self.policy.weight_version,
            "truncated": sum(c.finish_reason.value == "length" for c in found),
        }
        if self.policy.layout.is_main:
            write_completions(path, found)
        self._finish(stage, facts)
        return found

    def perplexities(self, name: str, rows: Sequence[tuple[TokenIds, TokenIds]]) -> list[float]:
        stage = self.folder.stage(name)
        path = stage / "logprobs.safetensors"
        if not is_done(stage):
            self._read_weights()
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

    def fits(self, prompt: TokenIds) -> bool:
        longest = self.policy.arch.max_position_embeddings
        return len(prompt) + self.cfg.rollout.max_new_tokens <= longest

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
        if is_done(stage):
            self._unread_weights = stage / "weights"
            self._skip(name, stage)
            return
        if not rows:
            raise DataError(
                f"stage {name} has no rows left to train on; see the counts of dropped rows above"
            )
        self._read_weights()
        if self.policy.layout.is_main and isinstance(rows[0], PreferencePair):
            write_pairs(stage / "pairs.parquet", [r for r in rows if isinstance(r, PreferencePair)])
        plan = self._training_stage(name, stage, rows, objective, settings)
        started = time.monotonic()
        last = fit_stage(self.model, plan, self.cfg, stage, self.console)
        save_weights(stage / "weights", self.policy, self.tokenizer)
        facts = {
            "stage": name,
            "steps": plan.plan.num_steps,
            "rows": len(rows),
            "seconds": time.monotonic() - started,
            "weight_version": self.policy.weight_version,
            **last,
        }
        self._finish(stage, facts)

    def _training_stage(
        self,
        name: str,
        stage: Path,
        rows: Sequence[TrainingRow],
        objective: Objective,
        settings: TrainSettings,
    ) -> TrainingStage:
        cfg = self.cfg
        reference = None
        if Pass.REFERENCE in objective.passes:
            pairs = [r for r in rows if isinstance(r, PreferencePair)]
            reference = self._reference(name, stage, pairs)
        return TrainingStage(
            name=name,
            rows=rows,
            plan=StepPlan(
                num_rows=len(rows),
                global_batch_size=settings.global_batch_size or cfg.model.global_batch_size,
                max_epochs=settings.max_epochs or cfg.trainer.max_epochs,
                max_steps=cfg.trainer.max_steps,
                seed=seed_of(cfg.seed, name) % 2**31,
                shuffle=cfg.data.shuffle,
            ),
            objective=objective,
            optim=settings.optim or cfg.model.optim,
            gradient_clip_val=cfg.trainer.gradient_clip_val,
            micro_batch_size=cfg.model.micro_batch_size,
            reference=reference,
        )

    def _reference(self, name: str, stage: Path, pairs: Sequence[PreferencePair]) -> ReferenceLogps:
        """Log-probs of every pair under the weights the stage starts from, computed once."""
        path = stage / "reference.safetensors"
        if not path.exists():
            both = [(p.prompt_ids, p.chosen_ids) for p in pairs]
            both += [(p.prompt_ids, p.rejected_ids) for p in pairs]
            with self.console.progress(f"{name}: reference", len(both), "answers") as progress:
                found = self.policy.score(both, lambda n: progress(n, 0))
            if self.policy.layout.is_main:
                chosen, rejected = found.sums.float().chunk(2)
                write_tensors(path, {"chosen": chosen.clone(), "rejected": rejected.clone()})
            barrier()
        saved = load_file(path)
        return ReferenceLogps(chosen=saved["chosen"], rejected=saved["rejected"])

    def save_final(self) -> Path:
        """The trained weights as RUN/checkpoint."""
        self._read_weights()
        target = self.folder.path / "checkpoint"
        save_weights(target, self.policy, self.tokenizer)
        return target

    # -- helpers ------------------------------------------------------------------------------

    def _read_weights(self) -> None:
        """Load the newest finished training stage that this process has only skipped so far."""
        if self._unread_weights is not None:
            load_weights(self._unread_weights, self.policy)
            self._unread_weights = None

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
