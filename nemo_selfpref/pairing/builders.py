"""Turning completions into preference pairs, counting what is left out and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    FinishReason,
    PreferencePair,
    TokenIds,
)


@dataclass(frozen=True)
class PairLimits:
    """Which generated pairs are left out."""

    max_length: int
    drop_truncated_chosen: bool = True


def improved_over_draft(
    demonstrations: Sequence[Demonstration],
    drafts: Sequence[Completion],
    improved: Sequence[Completion],
    limits: PairLimits,
) -> tuple[list[PreferencePair], DropReport]:
    """Pairs (x, improved chosen, draft rejected), conditioned on the plain prompt (SGPO, eq. 5).

    A demonstration whose id is not among `improved` had no room for a refinement; it is counted.
    """
    report = DropReport()
    pairs = []
    improved_of = {completion.id: completion for completion in improved}
    for demo, draft in zip(demonstrations, drafts, strict=True):
        better = improved_of.get(demo.id)
        if better is None:
            report.drop("refinement_prompt_too_long", demo.source)
            continue
        reason = _fault(demo.prompt_ids, draft, better, limits)
        if reason is not None:
            report.drop(reason, demo.source)
            continue
        provenance = {
            "source": demo.source,
            "weight_version": better.weight_version,
            "chosen": _origin(better),
            "rejected": _origin(draft),
        }
        pairs.append(
            PreferencePair(
                id=demo.id,
                prompt_ids=demo.prompt_ids,
                chosen_ids=better.token_ids,
                rejected_ids=draft.token_ids,
                provenance=provenance,
            )
        )
    report.kept = len(pairs)
    return pairs, report


def _fault(
    prompt: TokenIds, rejected: Completion, chosen: Completion, limits: PairLimits
) -> str | None:
    if chosen.token_ids == rejected.token_ids:
        return "identical_pair"
    if limits.drop_truncated_chosen and chosen.finish_reason is FinishReason.LENGTH:
        return "truncated_chosen"
    longest = max(len(chosen.token_ids), len(rejected.token_ids))
    if len(prompt) + longest > limits.max_length:
        return "too_long"
    if chosen.finish_reason is FinishReason.STOP and len(chosen.token_ids) == 1:
        return "empty_response"
    return None


def _origin(completion: Completion) -> Mapping[str, Any]:
    origin = asdict(completion)
    origin.pop("token_ids")
    origin.pop("logprobs")
    origin["finish_reason"] = completion.finish_reason.value
    origin["weight_set"] = completion.weight_set.value
    return origin
