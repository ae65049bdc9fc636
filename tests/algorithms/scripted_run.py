"""A RunContext that needs no model: it writes down every stage and answers from a script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_selfpref.algorithms.base import TrainSettings
from nemo_selfpref.config.paths import prompts_dir
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.data.templates import PromptTemplate, load_template
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.objectives.objective import Objective
from nemo_selfpref.rollout.teacher import Teacher, TeacherRequest
from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    FinishReason,
    PreferencePair,
    TokenIds,
    TrainingRow,
    WeightSet,
)


@dataclass
class Training:
    """What one call to train was given."""

    name: str
    rows: list[TrainingRow]
    objective: Objective
    settings: TrainSettings


@dataclass
class ScriptedRun:
    """Completions come from `replies[stage][row id]` (or "STAGE answer to ID"), perplexities from
    `ppl` by response text (or 2.0), teacher answers from the teacher itself."""

    cfg: RunConfig
    tokenizer: ChatTokenizer
    demos: list[Demonstration] = field(default_factory=list)
    pairs: list[PreferencePair] = field(default_factory=list)
    replies: dict[str, dict[str, str]] = field(default_factory=dict)
    ppl: dict[str, float] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)
    prompts: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[TeacherRequest] = field(default_factory=list)
    trained: list[Training] = field(default_factory=list)
    scored: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, DropReport] = field(default_factory=dict)
    longest_prompt: int = 10**9

    def demonstrations(self) -> list[Demonstration]:
        return self.demos

    def preferences(self) -> list[PreferencePair]:
        return self.pairs

    def template(
        self, name: str, required: frozenset[str], optional: frozenset[str] = frozenset()
    ) -> PromptTemplate:
        return load_template(name, required, optional, folder=prompts_dir())

    def encode_user(self, row: Demonstration, text: str) -> TokenIds:
        system = [m for m in row.messages if m["role"] == "system"]
        return self.tokenizer.encode_prompt([*system, {"role": "user", "content": text}])

    def sample(self, name: str, prompts: Sequence[tuple[str, TokenIds]]) -> list[Completion]:
        self.stages.append(name)
        self.prompts[name] = {id: self.tokenizer.decode(ids) for id, ids in prompts}
        return [self._completion(name, id) for id, _ in prompts]

    def _completion(self, stage: str, id: str) -> Completion:
        text = self.replies.get(stage, {}).get(id, f"{stage} answer to {id}")
        ids = (*self.tokenizer.encode_text(text), self.tokenizer.end_of_turn_id)
        logprobs = (-1.0,) * len(ids)
        return Completion(id, ids, logprobs, FinishReason.STOP, WeightSet.POLICY, len(self.trained))

    def perplexities(self, name: str, rows: Sequence[tuple[TokenIds, TokenIds]]) -> list[float]:
        self.stages.append(name)
        texts = [(self.tokenizer.decode(p), self.tokenizer.decode(r)) for p, r in rows]
        self.scored += texts
        return [self.ppl.get(response, 2.0) for _, response in texts]

    def fits(self, prompt: TokenIds) -> bool:
        return len(prompt) <= self.longest_prompt

    def ask(
        self, name: str, make_teacher: Callable[[], Teacher], requests: Sequence[TeacherRequest]
    ) -> dict[str, str]:
        self.stages.append(name)
        self.asked += requests
        return make_teacher().answer(requests)

    def train(
        self,
        name: str,
        rows: Sequence[TrainingRow],
        objective: Objective,
        settings: TrainSettings = TrainSettings(),
    ) -> None:
        self.stages.append(name)
        self.trained.append(Training(name, list(rows), objective, settings))

    def note(self, stage: str, report: DropReport) -> None:
        self.notes[stage] = report


def demonstration(tokenizer: ChatTokenizer, id: str, *turns: tuple[str, str]) -> Demonstration:
    """A row whose conversation is `turns`, the last of them the answer to imitate."""
    messages: tuple[dict[str, Any], ...] = tuple({"role": r, "content": c} for r, c in turns[:-1])
    answer = turns[-1][1]
    return Demonstration(
        id=id,
        messages=messages,
        prompt_ids=tokenizer.encode_prompt(messages),
        response_ids=tokenizer.encode_response(messages, answer),
        response=answer,
        source=f"rows.jsonl:{id}",
    )
