"""The prompts and rows of a self-improver, shared by every method that has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nemo_selfpref.algorithms.base import RunContext, check_positive, instruction_of
from nemo_selfpref.config.checks import check_optim
from nemo_selfpref.config.schema import OptimConfig, RunConfig
from nemo_selfpref.pairing.filters import iqr_keep
from nemo_selfpref.rollout.teacher import TeacherRequest
from nemo_selfpref.types import Completion, Demonstration, DropReport, TokenIds, flatten_messages


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


def instruction_text(row: Demonstration) -> str:
    """What the user asked, as text for a slot."""
    return flatten_messages(instruction_of(row))


def target_requests(
    run: RunContext,
    rows: Sequence[Demonstration],
    drafts: Sequence[Completion],
    template_name: str,
) -> list[TeacherRequest]:
    """Two questions a row: improve the draft (ID/improve), and answer afresh (ID/answer)."""
    template = run.template(template_name, frozenset({"instruction", "response", "reference"}))
    requests = []
    for row, draft in zip(rows, drafts, strict=True):
        instruction = instruction_text(row)
        text = template.render(
            instruction=instruction,
            response=run.tokenizer.decode(draft.token_ids),
            reference=row.response,
        )
        requests.append(TeacherRequest(f"{row.id}/improve", text))
        requests.append(TeacherRequest(f"{row.id}/answer", instruction))
    return requests


def improver_rows(
    run: RunContext,
    rows: Sequence[Demonstration],
    drafts: Sequence[Completion],
    answers: Mapping[str, str],
    template_name: str,
) -> list[Demonstration]:
    """SFT rows -log pi(target | x, draft; p_imp): improved drafts and fresh answers, each set
    filtered on its own by the interquartile range of its perplexity under the starting policy
    (SGPO, section 3.1.2)."""
    template = run.template(template_name, frozenset({"instruction", "response"}))
    kept = []
    for kind in ("improve", "answer"):
        report = DropReport()
        made = []
        for row, draft in zip(rows, drafts, strict=True):
            target = answers[f"{row.id}/{kind}"].strip()
            if not target:
                report.drop("empty_target", row.source)
                continue
            text = template.render(
                instruction=instruction_text(row), response=run.tokenizer.decode(draft.token_ids)
            )
            prompt = run.encode_user(row, text)
            response = run.tokenizer.encode_response(row.messages, target)
            if len(prompt) + len(response) > run.cfg.data.max_length:
                report.drop("too_long", row.source)
                continue
            made.append((row, prompt, response, target))
        plain = [(row.prompt_ids, response) for row, _, response, _ in made]
        keep = iqr_keep(run.perplexities(f"perplexity-{kind}", plain))
        for (row, prompt, response, target), ok in zip(made, keep, strict=True):
            if not ok:
                report.drop("perplexity_outlier", row.source)
                continue
            name = f"{row.id}/{kind}"
            kept.append(Demonstration(name, row.messages, prompt, response, target, row.source))
            report.kept += 1
        run.note(f"targets ({kind})", report)
    return kept


def refinement_prompts(
    run: RunContext,
    rows: Sequence[Demonstration],
    replies: Sequence[Completion],
    template_name: str,
) -> list[tuple[str, TokenIds]]:
    """(id, prompt) that ask the policy to improve its own reply with the reference beside it.

    A prompt that leaves no room for an answer is left out; its row makes no pair.
    """
    template = run.template(template_name, frozenset({"instruction", "response", "reference"}))
    prompts = []
    for row, reply in zip(rows, replies, strict=True):
        text = template.render(
            instruction=instruction_text(row),
            response=run.tokenizer.decode(reply.token_ids),
            reference=row.response,
        )
        prompt = run.encode_user(row, text)
        if run.fits(prompt):
            prompts.append((row.id, prompt))
    return prompts
