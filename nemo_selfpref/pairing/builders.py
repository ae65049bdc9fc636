"""Turning completions into preference pairs, counting what is left out and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    FinishReason,
    PreferencePair,
    TokenIds,
    WeightSet,
)

FactsOf = Callable[[Demonstration], Mapping[str, Any]]
"""What else is known of the pair of a row; it joins the pair's provenance."""


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
    facts: FactsOf | None = None,
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
        reason = pair_fault(demo.prompt_ids, draft, better, limits)
        if reason is not None:
            report.drop(reason, demo.source)
            continue
        pairs.append(make_pair(demo.id, demo, better, draft, facts and facts(demo)))
    report.kept = len(pairs)
    return pairs, report


def target_over_sample(
    demonstrations: Sequence[Demonstration],
    samples: Sequence[Completion],
    limits: PairLimits,
    suffix: str = "",
    facts: FactsOf | None = None,
) -> tuple[list[PreferencePair], DropReport]:
    """Pairs (x, the row's own answer chosen, a sample rejected), named by the sample (SPIN,
    section 4)."""
    report = DropReport()
    pairs = []
    for demo, sample in zip(demonstrations, samples, strict=True):
        reason = target_fault(demo, sample.token_ids, limits)
        if reason is not None:
            report.drop(reason, demo.source)
            continue
        name, known = f"{sample.id}{suffix}", facts and facts(demo)
        pairs.append(target_pair(name, demo, sample.token_ids, sample, known))
    report.kept = len(pairs)
    return pairs, report


def target_pair(
    name: str,
    demo: Demonstration,
    rejected: TokenIds,
    sample: Completion,
    facts: Mapping[str, Any] | None = None,
) -> PreferencePair:
    """The row's own answer over `rejected`, which came out of `sample`."""
    return PreferencePair(
        id=name,
        prompt_ids=demo.prompt_ids,
        chosen_ids=demo.response_ids,
        rejected_ids=rejected,
        provenance=_provenance(demo, sample, "data", _origin(sample), facts),
    )


def target_fault(demo: Demonstration, rejected: TokenIds, limits: PairLimits) -> str | None:
    """Why the row's answer and a rejected one make no pair, or None."""
    if rejected == demo.response_ids:
        return "identical_pair"
    if len(demo.prompt_ids) + max(len(rejected), len(demo.response_ids)) > limits.max_length:
        return "too_long"
    return None


def make_pair(
    name: str,
    demo: Demonstration,
    chosen: Completion,
    rejected: Completion,
    facts: Mapping[str, Any] | None = None,
) -> PreferencePair:
    """A pair of two completions, with where they come from."""
    return PreferencePair(
        id=name,
        prompt_ids=demo.prompt_ids,
        chosen_ids=chosen.token_ids,
        rejected_ids=rejected.token_ids,
        provenance=_provenance(demo, chosen, _origin(chosen), _origin(rejected), facts),
    )


def pair_fault(
    prompt: TokenIds, rejected: Completion, chosen: Completion, limits: PairLimits
) -> str | None:
    """Why two completions make no pair, or None."""
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


def _provenance(
    demo: Demonstration,
    sample: Completion,
    chosen: Mapping[str, Any] | str,
    rejected: Mapping[str, Any],
    facts: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Row and prompt, each answer's origin, and the weights that made `sample`; `ema_step` where
    those are the moving average: the optimizer steps it had seen."""
    made: dict[str, Any] = {"weight_version": sample.weight_version}
    if sample.weight_set is WeightSet.EMA:
        made["ema_step"] = sample.weight_version
    origin = {"source": demo.source, "prompt": demo.id, **made}
    return {**origin, "chosen": chosen, "rejected": rejected, **(facts or {})}


def _origin(completion: Completion) -> Mapping[str, Any]:
    origin = asdict(completion)
    origin.pop("token_ids")
    origin.pop("logprobs")
    origin.pop("cached_tokens")  # of the engine, not of the answer
    origin["finish_reason"] = completion.finish_reason.value
    origin["weight_set"] = completion.weight_set.value
    return origin
