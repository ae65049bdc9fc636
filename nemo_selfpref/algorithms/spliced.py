"""The pairs of an online step made by regenerating a segment of a good answer, kept for replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_selfpref.algorithms.base import PairMaker, Rollouts
from nemo_selfpref.algorithms.candidates import sampled_by
from nemo_selfpref.pairing.builders import PairLimits, target_fault, target_pair
from nemo_selfpref.pairing.replay import ReplayBuffer
from nemo_selfpref.pairing.segments import Segment, plan_segment, splice
from nemo_selfpref.rollout.sampling import seed_of, uniform
from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    PreferencePair,
    TokenIds,
    WeightSet,
)


class SplicedPairs(PairMaker):
    """The row's own answer over the same with a segment regenerated (SAPO, section 3, eqs. 4, 5).

    Args:
        weights: who regenerates.
        segment_len: tokens of a segment; None regenerates the whole answer.
        capacity: pairs in the replay buffer; None trains on each step's own pairs.
    """

    def __init__(self, weights: WeightSet, segment_len: int | None, capacity: int | None) -> None:
        self.weights, self.segment_len = weights, segment_len
        self.buffer = None if capacity is None else ReplayBuffer(capacity)

    def pairs(
        self, step: int, rollouts: Rollouts, rows: Sequence[Demonstration]
    ) -> list[PreferencePair]:
        fresh = self._fresh(step, rollouts, rows)
        if self.buffer is None:
            return fresh
        self.buffer.push(fresh, step)
        if not len(self.buffer):
            return []
        seed = seed_of(rollouts.cfg.seed, "replay", step)
        drawn = self.buffer.draw(len(rows), seed, step)
        rollouts.log(self.buffer.metrics())
        return drawn

    def _fresh(
        self, step: int, rollouts: Rollouts, rows: Sequence[Demonstration]
    ) -> list[PreferencePair]:
        plans = [self._plan(step, rollouts, row) for row in rows]
        prompts = [
            (f"{row.id}@{step}", row.prompt_ids + row.response_ids[: plan.start])
            for row, plan in zip(rows, plans, strict=True)
        ]
        found = rollouts.sample(
            "segment", prompts, weights=self.weights, limits=[p.length for p in plans]
        )
        limits, report, pairs = PairLimits(rollouts.cfg.data.max_length), DropReport(), []
        for row, plan, sample in zip(rows, plans, found, strict=True):
            rejected = self._rejected(rollouts, row, plan, sample)
            reason = target_fault(row, rejected, limits)
            if reason is not None:
                report.drop(reason, row.source)
                continue
            facts = sampled_by(rollouts, segment=[plan.start, plan.length], step=step)
            pairs.append(target_pair(sample.id, row, rejected, sample, facts))
        report.kept = len(pairs)
        rollouts.note("pairs", report)
        return pairs

    def _plan(self, step: int, rollouts: Rollouts, row: Demonstration) -> Segment:
        if self.segment_len is None:
            return Segment(0, rollouts.cfg.rollout.max_new_tokens)
        data = rollouts.cfg.data
        draw = uniform(seed_of(rollouts.cfg.seed, "segment", step, row.id), 0)
        return plan_segment(
            len(row.response_ids),
            len(row.prompt_ids),
            self.segment_len,
            data.max_length,
            data.max_prompt_length,
            draw,
        )

    def _rejected(
        self, rollouts: Rollouts, row: Demonstration, plan: Segment, sample: Completion
    ) -> TokenIds:
        if self.segment_len is None:
            return sample.token_ids
        return splice(row.response_ids, plan, sample.token_ids, rollouts.tokenizer.stop_ids)

    def kept(self) -> tuple[Sequence[PreferencePair], Mapping[str, Any]]:
        return ((), {}) if self.buffer is None else (self.buffer.pairs, self.buffer.state())

    def restore(self, pairs: Sequence[PreferencePair], state: Mapping[str, Any]) -> None:
        if self.buffer is not None:
            self.buffer = ReplayBuffer.restore(self.buffer.capacity, pairs, state)

    def histograms(self) -> Mapping[str, Mapping[str, int]]:
        return {} if self.buffer is None else self.buffer.histograms()
