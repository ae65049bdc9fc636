"""A RunContext that needs no model: it writes down every stage and answers from a script."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_selfpref.algorithms.base import Algorithm, PairMaker, TrainSettings, algorithms
from nemo_selfpref.config.paths import prompts_dir
from nemo_selfpref.config.schema import DataConfig, RunConfig
from nemo_selfpref.data.templates import PromptTemplate, load_template
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.objectives.objective import Objective
from nemo_selfpref.rollout.teacher import Teacher, TeacherRequest
from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    FinishReason,
    LabelScores,
    PreferencePair,
    TokenIds,
    TrainingRow,
    WeightSet,
)

CFG = RunConfig(name="test", data=DataConfig(train_path=[]))
Logprobs = tuple[float, float]


@dataclass
class Training:
    """What one call to train or train_online was given, and the pairs each online step made."""

    name: str
    rows: list[TrainingRow]
    objective: Objective
    settings: TrainSettings
    prompts_per_step: int | None = None
    steps: list[list[PreferencePair]] = field(default_factory=list)


@dataclass
class ScriptedRun:
    """Completions come from `replies[stage][id]`, text or token ids (or "STAGE answer to ID"), cut
    off for the ids in `truncated`; verdicts from `verdict` by prompt; perplexities from `ppl` by
    response text (or 2.0); teacher answers from the teacher itself.

    An online stage goes over its prompts once, without shuffling; with `interrupted` its maker is
    saved and restored between steps.
    """

    cfg: RunConfig
    tokenizer: ChatTokenizer
    demos: list[Demonstration] = field(default_factory=list)
    pairs: list[PreferencePair] = field(default_factory=list)
    replies: dict[str, dict[str, str | TokenIds]] = field(default_factory=dict)
    truncated: frozenset[str] = frozenset()
    verdict: Callable[[str], Logprobs] = lambda prompt: (-1.0, -1.0)
    ppl: dict[str, float] = field(default_factory=dict)
    longest_prompt: int = 10**9
    interrupted: bool = False

    stages: list[str] = field(default_factory=list)
    prompts: dict[str, dict[str, str]] = field(default_factory=dict)
    prompt_ids: dict[str, TokenIds] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    weights: dict[str, WeightSet] = field(default_factory=dict)
    judged: dict[str, list[str]] = field(default_factory=dict)
    labels: set[TokenIds] = field(default_factory=set)
    sources: list[str] = field(default_factory=list)
    read: list[Sequence[str] | None] = field(default_factory=list)
    asked: list[TeacherRequest] = field(default_factory=list)
    trained: list[Training] = field(default_factory=list)
    scored: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, DropReport] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def demonstrations(self) -> list[Demonstration]:
        self.sources.append("demonstrations")
        return self.demos

    def prompt_rows(self) -> list[Demonstration]:
        self.sources.append("prompts")
        return [replace(demo, response_ids=(), response="") for demo in self.demos]

    def preferences(self, paths: Sequence[str] | None = None) -> list[PreferencePair]:
        self.read.append(paths)
        return self.pairs

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
    ) -> list[Completion]:
        self.stages.append(name)
        self.weights[name] = weights
        texts = {id: self.tokenizer.decode(ids) for id, ids in prompts}
        self.prompts.setdefault(name, {}).update(texts)
        self.prompt_ids.update(prompts)
        if limits is not None:
            ids = [id for id, _ in prompts]
            self.limits.update(zip(ids, limits, strict=True))
        return [self._completion(name, id, weights) for id, _ in prompts]

    def _completion(self, stage: str, id: str, weights: WeightSet) -> Completion:
        reply = self.replies.get(stage, {}).get(id, f"{stage} answer to {id}")
        cut = id in self.truncated
        if isinstance(reply, str):
            end = () if cut else (self.tokenizer.end_of_turn_id,)
            reply = (*self.tokenizer.encode_text(reply), *end)
        reason = FinishReason.LENGTH if cut else FinishReason.STOP
        return Completion(id, reply, (-1.0,) * len(reply), reason, weights, len(self.trained))

    def label_scores(
        self,
        name: str,
        prompts: Sequence[TokenIds],
        labels: TokenIds,
        *,
        weights: WeightSet = WeightSet.POLICY,
    ) -> list[LabelScores]:
        self.stages.append(name)
        self.weights[name] = weights
        self.labels.add(labels)
        texts = [self.tokenizer.decode(ids) for ids in prompts]
        self.judged.setdefault(name, []).extend(texts)
        found = [self.verdict(text) for text in texts]
        return [LabelScores(logprobs, max(logprobs)) for logprobs in found]

    def perplexities(self, name: str, rows: Sequence[tuple[TokenIds, TokenIds]]) -> list[float]:
        self.stages.append(name)
        texts = [(self.tokenizer.decode(p), self.tokenizer.decode(r)) for p, r in rows]
        self.scored += texts
        return [self.ppl.get(response, 2.0) for _, response in texts]

    def fits(self, prompt: TokenIds, new_tokens: int | None = None) -> bool:
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

    def train_online(
        self,
        name: str,
        rows: Sequence[Demonstration],
        pairs: PairMaker,
        objective: Objective,
        settings: TrainSettings = TrainSettings(),
        prompts_per_step: int | None = None,
    ) -> None:
        self.stages.append(name)
        size = prompts_per_step or self.cfg.model.global_batch_size
        training = Training(name, [], objective, settings, prompts_per_step)
        self.trained.append(training)
        for step, start in enumerate(range(0, len(rows), size)):
            training.steps.append(pairs.pairs(step, self, rows[start : start + size]))
            training.rows += training.steps[-1]
            if self.interrupted:
                kept, state = pairs.kept()
                pairs.restore(list(kept), json.loads(json.dumps(state)))

    def freeze(self) -> None:
        self.stages.append("(freeze)")

    def reset_policy(self) -> None:
        self.stages.append("(reset)")

    def note(self, stage: str, report: DropReport) -> None:
        self.notes.setdefault(stage, DropReport()).add(report)

    def log(self, metrics: Mapping[str, float]) -> None:
        self.metrics.update(metrics)


def configured(name: str, **settings: Any) -> Algorithm:
    """A registered method with some settings changed."""
    known = algorithms()[name]
    return known(known.config_class(**settings))


def carry_out(name: str, run: ScriptedRun, **settings: Any) -> list[Training]:
    """Check and run a method; what it trained on."""
    method = configured(name, **settings)
    method.check(run.cfg)
    method.run(run)
    # An engine holds what the method says it asks, so it may ask no other weights.
    assert set(run.weights.values()) == method.asked_weights(), "asked_weights"
    return run.trained


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


def question(tokenizer: ChatTokenizer, id: str) -> Demonstration:
    """A row that asks "question ID" and answers "reference ID"."""
    return demonstration(
        tokenizer, id, ("user", f"question {id}"), ("assistant", f"reference {id}")
    )


def preference(
    tokenizer: ChatTokenizer, id: str, chosen: str, rejected: str, *turns: tuple[str, str]
) -> PreferencePair:
    """A pair as the data set's reader makes it; without turns the user asks "question ID"."""
    conversation = turns or (("user", f"question {id}"),)
    messages = tuple({"role": r, "content": c} for r, c in conversation)
    return PreferencePair(
        id=id,
        prompt_ids=tokenizer.encode_prompt(messages),
        chosen_ids=tokenizer.encode_response(messages, chosen),
        rejected_ids=tokenizer.encode_response(messages, rejected),
        provenance={"source": f"pairs.jsonl:{id}"},
        messages=messages,
    )


_JUDGED = re.compile(r"RESPONSE A:(.*?)\n\nRESPONSE B:(.*?)\n\nWhich response", re.DOTALL)


def responses_of(prompt: str) -> tuple[str, str]:
    """The two answers that a judge prompt shows."""
    found = _JUDGED.search(prompt)
    assert found is not None, prompt
    return found[1], found[2]


def prefers(quality: Mapping[str, float]) -> Callable[[str], Logprobs]:
    """A judge with P(a beats b) = sigmoid(quality[a] - quality[b]), whatever the order; the blank
    answer has quality 0."""

    def verdict(prompt: str) -> Logprobs:
        a, b = responses_of(prompt)
        return {"": 0.0, **quality}[a], {"": 0.0, **quality}[b]

    return verdict


QUALITY = {"a0": 0.0, "a1": math.log(9), "a2": math.log(3), "a3": -math.log(3)}
"""Of four answers, as log-odds of beating the blank one: 0.5, 0.9, 0.75, 0.25."""


def four_answers(*names: str) -> dict[str, str | TokenIds]:
    """The answers a0 to a3 to the prompts of some rows, by id."""
    return {f"{name}/{k}": f"a{k}" for name in names for k in range(4)}


def texts_of(tokenizer: ChatTokenizer, pairs: Sequence[TrainingRow]) -> list[tuple[str, str]]:
    """(chosen, rejected) of each pair."""
    decode = tokenizer.decode
    known = [pair for pair in pairs if isinstance(pair, PreferencePair)]
    assert len(known) == len(pairs)
    return [(decode(pair.chosen_ids), decode(pair.rejected_ids)) for pair in known]
