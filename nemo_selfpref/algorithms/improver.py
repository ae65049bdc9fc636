"""The prompts and rows of a self-improver, shared by every method that has one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_selfpref.algorithms.base import (
    RunContext,
    TrainSettings,
    check_positive,
    instruction_text,
)
from nemo_selfpref.config.checks import check_optim
from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.data.templates import PromptTemplate
from nemo_selfpref.objectives.objective import SFTObjective
from nemo_selfpref.pairing.filters import iqr_bounds, iqr_keep
from nemo_selfpref.rollout.teacher import Teacher, TeacherRequest
from nemo_selfpref.types import Completion, Demonstration, DropReport, TokenIds


@dataclass
class ImproverConfig:
    """Training of the improver; null takes the run's own value."""

    num_prompts: int | None = None
    """Train the improver on the first rows only; null uses all."""
    max_epochs: int = 3
    global_batch_size: int | None = None
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5))

    def check(self, cfg: RunConfig) -> None:
        """Raise ConfigError for settings out of range."""
        for name in ("num_prompts", "max_epochs", "global_batch_size"):
            if getattr(self, name) is not None:
                check_positive(f"algorithm.improver.{name}", getattr(self, name))
        check_optim("algorithm.improver.optim", self.optim)


KINDS = ("improve", "answer")
"""What the external model is asked for: its improvement of the draft, and its own answer."""

_ALWAYS = frozenset({"instruction", "response"})
_REFERENCE = frozenset({"reference"})


def target_requests(
    run: RunContext,
    rows: Sequence[Demonstration],
    drafts: Sequence[Completion],
    template_name: str,
    kinds: Sequence[str] = KINDS,
) -> list[TeacherRequest]:
    """One question of each kind a row: improve the draft (ID/improve), answer (ID/answer)."""
    template = run.template(template_name, _ALWAYS | _REFERENCE)
    requests = []
    for row, draft in zip(rows, drafts, strict=True):
        texts = {"improve": _render(run, template, row, draft), "answer": instruction_text(row)}
        requests += [TeacherRequest(f"{row.id}/{kind}", texts[kind]) for kind in kinds]
    return requests


def _render(
    run: RunContext, template: PromptTemplate, row: Demonstration, draft: Completion
) -> str:
    """The template with the row's instruction and draft, and its reference where it has a slot."""
    values = {
        "instruction": instruction_text(row),
        "response": run.tokenizer.decode(draft.token_ids),
        "reference": row.response,
    }
    return template.render(**{slot: values[slot] for slot in template.slots})


class Filtered:
    """What the filter on perplexity found of each row's targets."""

    def __init__(self) -> None:
        self._of_row: dict[str, dict[str, Any]] = {}

    def join(self, kind: str, ids: Sequence[str], perplexities: Sequence[float]) -> list[bool]:
        """Filter the targets of one kind, and remember them by row; which ones are kept."""
        bounds = [_finite(bound) for bound in iqr_bounds(perplexities)]
        keep = iqr_keep(perplexities)
        for id, value, kept in zip(ids, perplexities, keep, strict=True):
            facts = {"perplexity": _finite(value), "bounds": bounds, "kept": kept}
            self._of_row.setdefault(id, {})[kind] = facts
        return keep

    def facts(self, row: Demonstration) -> dict[str, Any]:
        """For the provenance of the row's pair: by kind of target its perplexity, the filter's
        bounds, and whether it was kept. Infinities are None."""
        found = self._of_row.get(row.id)
        return {} if found is None else {"targets": found}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def improver_rows(
    run: RunContext,
    rows: Sequence[Demonstration],
    drafts: Sequence[Completion],
    answers: Mapping[str, str],
    template_name: str,
    kinds: Sequence[str] = KINDS,
) -> tuple[list[Demonstration], Filtered]:
    """SFT rows -log pi(target | x, draft; p_imp): improved drafts and fresh answers, each set
    filtered on its own by the interquartile range of its perplexity under the starting policy
    (SGPO, section 3.1.2). The reference is shown only by a template with a slot for it. Also what
    the filter found."""
    template = run.template(template_name, _ALWAYS, _REFERENCE)
    kept, filtered = [], Filtered()
    for kind in kinds:
        report = DropReport()
        made = []
        for row, draft in zip(rows, drafts, strict=True):
            target = answers[f"{row.id}/{kind}"].strip()
            if not target:
                report.drop("empty_target", row.source)
                continue
            prompt = run.encode_user(row, _render(run, template, row, draft))
            response = run.tokenizer.encode_response(row.messages, target)
            if len(prompt) + len(response) > run.cfg.data.max_length:
                report.drop("too_long", row.source)
                continue
            made.append((row, prompt, response, target))
        plain = [(row.prompt_ids, response) for row, _, response, _ in made]
        perplexities = run.perplexities(f"perplexity-{kind}", plain)
        keep = filtered.join(kind, [row.id for row, *_ in made], perplexities)
        for (row, prompt, response, target), ok in zip(made, keep, strict=True):
            if not ok:
                report.drop("perplexity_outlier", row.source)
                continue
            name = f"{row.id}/{kind}"
            kept.append(Demonstration(name, row.messages, prompt, response, target, row.source))
            report.kept += 1
        run.note(f"targets ({kind})", report)
    return kept, filtered


def teach_improving(
    run: RunContext,
    demos: Sequence[Demonstration],
    config: ImproverConfig,
    teacher: Callable[[], Teacher],
    target_prompt: str,
    improve_prompt: str,
    kinds: Sequence[str] = KINDS,
) -> Filtered:
    """Step 1 of SGPO: drafts, an external model's targets for them, and SFT on those. Returns what
    the filter found of the targets."""
    rows = demos[: config.num_prompts]
    drafts = run.sample("draft", [(d.id, d.prompt_ids) for d in rows])
    questions = target_requests(run, rows, drafts, target_prompt, kinds)
    answers = run.ask("targets", teacher, questions)
    lessons, filtered = improver_rows(run, rows, drafts, answers, improve_prompt, kinds)
    settings = TrainSettings(config.max_epochs, config.global_batch_size, config.optim)
    run.train("improver", lessons, SFTObjective(), settings)
    return filtered


def refinement_prompts(
    run: RunContext,
    rows: Sequence[Demonstration],
    replies: Sequence[Completion],
    template_name: str,
) -> list[tuple[str, TokenIds]]:
    """(id, prompt) that ask the policy to improve its own reply, with the reference beside it where
    the template has a slot for it.

    A prompt that leaves no room for an answer is left out; its row makes no pair.
    """
    template = run.template(template_name, _ALWAYS, _REFERENCE)
    prompts = []
    for row, reply in zip(rows, replies, strict=True):
        prompt = run.encode_user(row, _render(run, template, row, reply))
        if run.fits(prompt):
            prompts.append((row.id, prompt))
    return prompts
