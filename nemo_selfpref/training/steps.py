"""The two kinds of stage: rows known beforehand, and pairs made anew in every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nemo_selfpref.algorithms.base import PairMaker
from nemo_selfpref.checkpoint.snapshot import Snapshot
from nemo_selfpref.data.batching import StepPlan, TokenSequence
from nemo_selfpref.files import read_json
from nemo_selfpref.megatron.parallel import barrier
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.scoring import SequenceLogps
from nemo_selfpref.models.stage import Step
from nemo_selfpref.objectives.inputs import PassLogps, StepInputs
from nemo_selfpref.objectives.objective import Objective, Pass
from nemo_selfpref.training.copies import StageCopies
from nemo_selfpref.training.making import Made, PairSource
from nemo_selfpref.training.reference_cache import ReferenceCache
from nemo_selfpref.training.rollout_check import RolloutCheck
from nemo_selfpref.training.store import (
    read_pairs,
    read_tensors,
    write_dropped,
    write_pairs,
    write_tensors,
)
from nemo_selfpref.types import (
    DropReport,
    PreferencePair,
    TrainingRow,
    WeightSet,
)

_ROLLOUTS = "rollouts"
_UNDER_WAY = f"{_ROLLOUTS}/under_way"
_AUGMENTED = frozenset({Pass.REFINED, Pass.REFINED_REFERENCE})


class Passes:
    """Log-probs of a loss's passes without gradient."""

    def __init__(
        self,
        policy: Policy,
        copies: StageCopies,
        objective: Objective,
        ready: Callable[[WeightSet], None],
        cache: ReferenceCache | None = None,
    ) -> None:
        self.policy, self.copies, self._ready, self._cache = policy, copies, ready, cache
        self.wanted = objective.passes - {Pass.POLICY}

    def weights_of(self, name: Pass) -> WeightSet:
        return WeightSet.POLICY if name is Pass.REFINED else self.copies.reference_set

    def score(
        self,
        name: Pass,
        pairs: Sequence[PreferencePair],
        weights: WeightSet,
        progress: Callable[[int], None] | None = None,
    ) -> PassLogps:
        """One pass over some pairs, now. Collective."""
        prompts = [p.augmented_prompt_ids if name in _AUGMENTED else p.prompt_ids for p in pairs]
        assert all(p is not None for p in prompts), "the loss needs augmented prompts"
        answers = [p.chosen_ids for p in pairs], [p.rejected_ids for p in pairs]
        both = [(p or (), a) for side in answers for p, a in zip(prompts, side, strict=True)]

        def ask(sequences: Sequence[TokenSequence]) -> SequenceLogps:
            self._ready(weights)
            with self.copies.weights.using(weights):
                return self.policy.score(sequences, progress)

        # The policy itself moves in every step: its name would cost more than it could save.
        if self._cache is None or name is Pass.REFINED:
            found = ask(both)
        else:
            found = self._cache.score(weights, self.copies, both, ask, progress)
        chosen, rejected = found.sums.float().chunk(2)
        return PassLogps(chosen, rejected)

    def take_metrics(self) -> Mapping[str, float]:
        """What was measured on the passes since the last time."""
        return {} if self._cache is None else self._cache.take_metrics()

    def flush(self) -> None:
        """Have on disk what the cache holds."""
        if self._cache is not None:
            self._cache.flush()

    def live(
        self, names: frozenset[Pass], pairs: Sequence[PreferencePair]
    ) -> dict[Pass, PassLogps]:
        """The passes of one step's rows."""
        return {name: self.score(name, pairs, self.weights_of(name)) for name in sorted(names)}


def step_inputs(rows: Sequence[TrainingRow], passes: dict[Pass, PassLogps]) -> StepInputs:
    strength = [r.strength if isinstance(r, PreferencePair) else 1.0 for r in rows]
    return StepInputs(torch.tensor(strength, dtype=torch.float32), passes)


class FixedSteps:
    """A stage over rows known beforehand. What does not move is scored once, before training."""

    def __init__(
        self, rows: Sequence[TrainingRow], plan: StepPlan, copies: StageCopies, passes: Passes
    ) -> None:
        self.rows, self.plan, self.copies, self.passes = rows, plan, copies, passes
        moving = passes.wanted if copies.reference_moves else frozenset({Pass.REFINED})
        self.live = passes.wanted & moving
        self._once: dict[Pass, PassLogps] = {}

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    @property
    def scored_once(self) -> frozenset[Pass]:
        return self.passes.wanted - self.live

    def score_once(
        self, path: Path, unmoved: bool, progress: Callable[[int], None] | None = None
    ) -> Mapping[str, float]:
        """Score, or read back, the passes that stay as they are. Collective, before `begin`.

        unmoved: the policy still is the reference, so no copy of it is needed.

        Returns what was measured on the way.
        """
        if not path.exists():
            pairs, tensors = _pairs(self.rows), {}
            for name in sorted(self.scored_once):
                weights = WeightSet.POLICY if unmoved else self.passes.weights_of(name)
                found = self.passes.score(name, pairs, weights, progress)
                tensors |= {f"{name}.chosen": found.chosen.clone()}
                tensors |= {f"{name}.rejected": found.rejected.clone()}
                self.passes.flush()
            if self.passes.policy.layout.is_main:
                write_tensors(path, tensors)
            barrier()
        saved = read_tensors(path)
        self._once = {
            name: PassLogps(saved[f"{name}.chosen"], saved[f"{name}.rejected"])
            for name in self.scored_once
        }
        return self.passes.take_metrics()

    def begin(self) -> None:
        self.copies.begin(keep_reference=self.copies.reference_moves)

    def step(self, number: int) -> Step:
        numbers = self.plan.rows_of_step(number)
        rows = [self.rows[n] for n in numbers]
        at = torch.tensor(numbers)
        passes = {n: PassLogps(v.chosen[at], v.rejected[at]) for n, v in self._once.items()}
        if self.live:
            passes |= self.passes.live(self.live, _pairs(rows))
        return Step(rows, step_inputs(rows, passes), self.passes.take_metrics())

    def after_step(self, done: int) -> None:
        self.copies.after_step(done)

    def skipped(self, done: int) -> None:
        """Nothing to do: which rows come next depends on the step's number alone."""

    def save(self, snapshot: Snapshot) -> None:
        self.copies.save(snapshot)
        self.passes.flush()

    def load(self, folder: Path) -> None:
        self.copies.load(folder)


class OnlineSteps:
    """A stage whose every step trains on pairs made for it.

    Args:
        source: makes the pairs, with `maker`.
        folder: the stage's; the pairs of each step are kept there.
        check: compares some of the answers' log-probs with the trainer's.
        max_staleness, count_stale: pairs that a checkpoint kept and whose weights are more steps
            behind are made anew, or counted and used.
    """

    def __init__(
        self,
        plan: StepPlan,
        maker: PairMaker,
        source: PairSource,
        folder: Path,
        copies: StageCopies,
        passes: Passes,
        check: RolloutCheck | None = None,
        max_staleness: int = 0,
        count_stale: bool = False,
    ) -> None:
        self.plan, self.maker, self.source = plan, maker, source
        self.folder, self.copies, self.passes = folder, copies, passes
        self.check, self.max_staleness, self.count_stale = check, max_staleness, count_stale
        self.reports: dict[str, DropReport] = {}
        self.generated_tokens = 0
        self._done = 0
        self.waited_s = 0.0
        """Seconds of this process that the trainer stood still for rollouts."""

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps

    def begin(self) -> None:
        self.copies.begin(keep_reference=bool(self.passes.wanted))

    def step(self, number: int) -> Step:
        started = time.monotonic()
        self._done = number
        made = self.source.take(number)
        self.waited_s += time.monotonic() - started
        pairs = made.pairs
        self.generated_tokens += made.generated_tokens
        for title, report in made.reports.items():
            self.reports.setdefault(title, DropReport()).add(report)
        if self.passes.policy.layout.is_main:
            path = self.folder / "pairs" / f"step-{number + 1:06d}.parquet"
            write_pairs(path, pairs)
            write_dropped(path.with_suffix(".dropped.jsonl"), made.reports)
        passes = self.passes.live(self.passes.wanted, pairs)
        measured = {
            "rollout/generated_tokens": float(made.generated_tokens),
            "rollout/cached_tokens": float(made.cached_tokens),
            **self._ages(number, made),
            **(self.check.metrics(made.sampled) if self.check is not None else {}),
            **made.metrics,
            **self.passes.take_metrics(),
        }
        return Step(pairs, step_inputs(pairs, passes), measured)

    def _ages(self, number: int, made: Made) -> dict[str, float]:
        age = number - made.updates
        if not (self.max_staleness or age):
            return {}
        stale = float(age > self.max_staleness)
        return {"rollout/staleness": float(age), "rollout/stale_steps": stale}

    def after_step(self, done: int) -> None:
        self._done = done
        self.copies.after_step(done)

    def skipped(self, done: int) -> None:
        self._done = done

    def save(self, snapshot: Snapshot) -> None:
        self.copies.save(snapshot)
        self.passes.flush()
        self.source.settle()
        if not snapshot.is_main:
            return
        under_way = self.source.under_way(self._done)
        pairs, state = under_way.after or self.maker.kept()
        counts = {"generated_tokens": self.generated_tokens, "maker": dict(state)}
        reports = {title: asdict(report) for title, report in self.reports.items()}
        snapshot.add_json(f"{_ROLLOUTS}/state.json", {**counts, "reports": reports})
        _add_pairs(snapshot, f"{_ROLLOUTS}/pairs.parquet", pairs)
        if under_way.made:
            before, before_state = under_way.before or ([], {})
            _add_pairs(snapshot, f"{_UNDER_WAY}/before.parquet", before)
            known = under_way.before is not None
            facts = {"made": under_way.made, "before": before_state if known else None}
            snapshot.add_json(f"{_UNDER_WAY}/steps.json", facts)

    def load(self, folder: Path) -> None:
        self.copies.load(folder)
        state = read_json(folder / _ROLLOUTS / "state.json")
        self.generated_tokens = state["generated_tokens"]
        self.reports = {title: DropReport(**r) for title, r in state["reports"].items()}
        pairs = read_pairs(folder / _ROLLOUTS / "pairs.parquet")
        made, kept = [], state["maker"]
        if (folder / _UNDER_WAY).is_dir():
            facts = read_json(folder / _UNDER_WAY / "steps.json")
            made = facts["made"]
            if self._too_old(made) and facts["before"] is not None:
                made, kept = [], facts["before"]
                pairs = read_pairs(folder / _UNDER_WAY / "before.parquet")
        self.maker.restore(pairs, kept)
        self.source.restore(made)

    def _too_old(self, made: Sequence[Mapping[str, Any]]) -> bool:
        """Whether steps made ahead are older than this run takes: it may have been started with a
        lower rollout.max_staleness than the one that made them."""
        ages = [step["number"] - step["updates"] for step in made]
        return not self.count_stale and any(age > self.max_staleness for age in ages)


def _add_pairs(snapshot: Snapshot, name: str, pairs: Sequence[PreferencePair]) -> None:
    """Pairs as they are now; the list may change before the file is written."""
    kept = list(pairs)
    snapshot.add_file(name, lambda path: write_pairs(path, kept))


def _pairs(rows: Sequence[TrainingRow]) -> list[PreferencePair]:
    pairs = [r for r in rows if isinstance(r, PreferencePair)]
    assert len(pairs) == len(rows), "a loss over pairs was given demonstrations"
    return pairs
