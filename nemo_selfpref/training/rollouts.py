"""Asking the model, straight on the engine: what a stage and a step of an online stage share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from nemo_selfpref.config.paths import prompts_dir
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.data.templates import PromptTemplate, load_template
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import RolloutError
from nemo_selfpref.monitor.heartbeat import tick
from nemo_selfpref.rollout.engine import FOREVER, RolloutEngine, Until
from nemo_selfpref.rollout.sampling import seed_of
from nemo_selfpref.training.rollout_check import Sampled, spread
from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    GenerationRequest,
    LabelScores,
    PreferencePair,
    SamplingParams,
    TokenIds,
    WeightSet,
)

Progress = Callable[[int, int], None]
_MOST = 1e-3
"""Rounding may put a log-prob this far above 0."""
_LOOK_AT = "The weights may have diverged; go back to a checkpoint, with a lower learning rate."


class EngineRollouts:
    """Rollouts (algorithms/base.py) on an engine.

    Args:
        ready: makes the engine hold a weight set before it is asked.
        scope: names the place in the run; with a request's name and id it seeds the draw.
        max_length: longest prompt and answer the model takes.
        cancelled: whether answers are still wanted.
    """

    def __init__(
        self,
        cfg: RunConfig,
        tokenizer: ChatTokenizer,
        engine: RolloutEngine,
        ready: Callable[[WeightSet], None],
        max_length: int,
        scope: tuple[object, ...] = (),
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        self.cfg, self.tokenizer = cfg, tokenizer
        self._engine, self._ready, self._max_length, self._scope = engine, ready, max_length, scope
        self._cancelled = cancelled
        self.reports: dict[str, DropReport] = {}
        self.metrics: dict[str, float] = {}
        self.generated_tokens = 0
        self.cached_tokens = 0
        """Prompt tokens that an engine had read before."""
        self.sampled: list[Sampled] = []
        """Some prompts with their answers, for RolloutCheck."""

    def within(self, *scope: object) -> EngineRollouts:
        """The same engine for another place in the run, with counts of its own."""
        return EngineRollouts(
            self.cfg,
            self.tokenizer,
            self._engine,
            self._ready,
            self._max_length,
            scope,
            self._cancelled,
        )

    def take_sampled(self) -> list[Sampled]:
        """The answers kept for RolloutCheck since the last time."""
        taken, self.sampled = self.sampled, []
        return taken

    def template(
        self, name: str, required: frozenset[str], optional: frozenset[str] = frozenset()
    ) -> PromptTemplate:
        return load_template(name, required, optional, folder=prompts_dir())

    def encode_user(self, row: Demonstration | PreferencePair, text: str) -> TokenIds:
        system = [m for m in row.messages if m["role"] == "system"]
        return self.tokenizer.encode_prompt([*system, {"role": "user", "content": text}])

    def sample(
        self,
        name: str,
        prompts: Sequence[tuple[str, TokenIds]],
        *,
        weights: WeightSet = WeightSet.POLICY,
        limits: Sequence[int] | None = None,
        progress: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        """See Rollouts.sample.

        Args:
            stop: whether answers are no longer wanted.
        """
        rollout = self.cfg.rollout
        params = SamplingParams(
            rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k
        )
        requests = [
            GenerationRequest(id, ids, seed_of(self.cfg.seed, *self._scope, name, id), limit)
            for (id, ids), limit in zip(prompts, limits or [None] * len(prompts), strict=True)
        ]
        self._ready(weights)
        tick()  # not a mark: where pairs are made ahead, the first rank alone comes here
        found = self._engine.generate(requests, params, weights, progress, self._until(stop))
        self._check_completions(name, found)
        self.generated_tokens += sum(len(c.token_ids) for c in found)
        self.cached_tokens += sum(c.cached_tokens for c in found)
        chosen = spread(len(found), rollout.check_samples)
        self.sampled += [(requests[i].prompt_ids, found[i]) for i in chosen]
        return found

    def _until(self, stop: Callable[[], bool] | None) -> Until:
        """A deadline where another process is waited for, which may never answer."""
        cancelled = self._cancelled
        if cancelled is None:
            return FOREVER if stop is None else Until(None, stop)
        over = cancelled if stop is None else lambda: cancelled() or stop()
        return Until.within(self.cfg.rollout.timeout_s, over)

    def label_scores(
        self,
        name: str,
        prompts: Sequence[TokenIds],
        labels: TokenIds,
        *,
        weights: WeightSet = WeightSet.POLICY,
        progress: Progress | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[LabelScores]:
        self._ready(weights)
        tick()
        found = self._engine.label_scores(prompts, labels, weights, progress, self._until(stop))
        self._check_scores(name, found, weights)
        return found

    def _check_completions(self, name: str, found: Sequence[Completion]) -> None:
        for completion in found:
            if not all(map(math.isfinite, completion.logprobs)):
                raise RolloutError(
                    f"{name}: the answer to {completion.id} came with a log-prob that is not "
                    f"finite from rollout.engine={self.cfg.rollout.engine.value}, weights "
                    f"{completion.weight_set.value} version {completion.weight_version}: expected "
                    f"finite numbers. {_LOOK_AT}"
                )

    def _check_scores(self, name: str, found: Sequence[LabelScores], weights: WeightSet) -> None:
        for number, scores in enumerate(found):
            # A token that cannot come next has -inf, which a method may refuse; nothing else may.
            if not all(value <= _MOST for value in (*scores.logprobs, scores.best)):
                raise RolloutError(
                    f"{name}: the labels of question {number} have log-probs {scores.logprobs} "
                    f"from rollout.engine={self.cfg.rollout.engine.value}, weights "
                    f"{weights.value}: expected numbers up to 0. {_LOOK_AT}"
                )

    def fits(self, prompt: TokenIds, new_tokens: int | None = None) -> bool:
        room = self.cfg.rollout.max_new_tokens if new_tokens is None else new_tokens
        return len(prompt) + room <= self._max_length

    def note(self, stage: str, report: DropReport) -> None:
        self.reports.setdefault(stage, DropReport()).add(report)

    def log(self, metrics: Mapping[str, float]) -> None:
        self.metrics.update(metrics)
