"""Prompt-augmented pairs: the same answers under a query that asks for more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemo_selfpref.algorithms.base import RunContext, check_positive
from nemo_selfpref.algorithms.reference import ONE_STAGE, ReferenceConfig, check_reference
from nemo_selfpref.data.templates import PromptTemplate
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.types import DropReport, PreferencePair

AUGMENT_SLOTS = frozenset({"query"})
"""What a template that augments a prompt must hold."""


@dataclass
class RefinementConfig(ReferenceConfig):
    """What the refined losses share."""

    beta: float = 0.1
    lam: float = 0.3
    """Weight lambda of the refined margin; 0 is the loss without refinement."""
    augment_prompt: str = "sr_augment"
    """A template of conf/prompts, or the path of one."""


def check_refinement(config: RefinementConfig) -> None:
    """Raise ConfigError for settings out of range."""
    check_positive("algorithm.beta", config.beta)
    if config.lam < 0:
        raise ConfigError(f"algorithm.lam={config.lam}: expected 0 or more, such as 0.3")
    check_reference(config, ONE_STAGE)


def augmented_pairs(run: RunContext, template_name: str) -> list[PreferencePair]:
    """The pairs of the data, augmented with a template of conf/prompts or a path."""
    template = run.template(template_name, AUGMENT_SLOTS)
    kept, report = augment(run.preferences(), template, run.tokenizer, run.cfg.data.max_length)
    run.note("augmented pairs", report)
    return kept


def augment(
    pairs: Sequence[PreferencePair],
    template: PromptTemplate,
    tokenizer: ChatTokenizer,
    max_length: int,
) -> tuple[list[PreferencePair], DropReport]:
    """Pairs with the instruction p put before the query x, inside the last user turn (p (+) x;
    Sr-DPO, section 3.2). A pair that p makes too long is left out and counted."""
    report, kept = DropReport(), []
    for pair in pairs:
        *before, last = pair.messages
        turn = {**last, "content": template.render(query=last["content"])}
        prompt = tokenizer.encode_prompt([*before, turn])
        longest = max(len(pair.chosen_ids), len(pair.rejected_ids))
        if len(prompt) + longest > max_length:
            report.drop("augmented_too_long", str(pair.provenance.get("source", pair.id)))
            continue
        kept.append(replace(pair, augmented_prompt_ids=prompt))
    report.kept = len(kept)
    return kept, report
