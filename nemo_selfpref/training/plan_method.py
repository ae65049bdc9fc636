"""What a method asks of a run: it is carried out on a few made-up rows, without a model.

An algorithm is a program over a RunContext; this one writes down every call. So a plan knows which
copies of the weights a method keeps and how much it samples, judges and trains, of any method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from nemo_selfpref.algorithms.base import Algorithm, PairMaker, TrainSettings
from nemo_selfpref.config.paths import prompts_dir
from nemo_selfpref.config.schema import RefMode, RunConfig
from nemo_selfpref.data.templates import PromptTemplate, load_template
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import Objective, Pass
from nemo_selfpref.rollout.teacher import Teacher, TeacherRequest
from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    FinishReason,
    LabelScores,
    Message,
    PreferencePair,
    TokenIds,
    TrainingRow,
    WeightSet,
)

_ROWS = 8
_CHARS = 4
"""Characters of a made-up token, about as many as of a real one in English."""
_BEGIN, _END = 1, 2


@dataclass
class Asked:
    """What was asked of the model: counts, and tokens over all of them."""

    answers: float = 0
    generated: float = 0
    read: float = 0
    """Prompt tokens of answers and judgements, and tokens of answers that were scored."""
    judgements: float = 0
    scored: float = 0
    sets: set[WeightSet] = field(default_factory=set)

    def scaled(self, factor: float) -> Asked:
        counts = {n: getattr(self, n) * factor for n in _COUNTS}
        return Asked(**counts, sets=set(self.sets))

    def add(self, other: Asked) -> None:
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.sets |= other.sets


_COUNTS = ("answers", "generated", "read", "judgements", "scored")


@dataclass(frozen=True)
class Training:
    """One training stage. rows: those trained on, for each row of the data."""

    name: str
    online: bool
    rows: float
    batch: int
    """Rows (online: prompts) of an optimizer step."""
    epochs: int
    paired: bool
    once: frozenset[Pass]
    """Passes that are scored before the first step."""
    live: frozenset[Pass]
    """Passes that are scored in every step, without gradient."""
    copies: frozenset[WeightSet]
    """Copies in memory while it lasts."""
    in_step: Asked
    """What one prompt of an online step asks."""


@dataclass
class Method:
    """What a run asks for, for each row of the data."""

    trainings: list[Training] = field(default_factory=list)
    before: Asked = field(default_factory=Asked)
    """What is asked outside of training steps."""
    copies: frozenset[WeightSet] = frozenset()
    """Copies that exist outside of training stages."""


def sketch_method(
    algorithm: Algorithm, cfg: RunConfig, prompt_tokens: int, answer_tokens: int
) -> Method:
    """Carry a method out on made-up rows of these lengths.

    Raises:
        ConfigError: it does something that made-up rows do not allow.
    """
    run = _Sketch(cfg, prompt_tokens, answer_tokens)
    try:
        algorithm.run(run)
    except Exception as error:
        raise ConfigError(
            f"algorithm.name={cfg.algorithm.name}: the method cannot be carried out on made-up "
            f"rows ({type(error).__name__}: {error}), so what it asks of a run is not known. It "
            "has to take any text as an answer."
        ) from error
    run.method.before = run.method.before.scaled(1 / _ROWS)
    return run.method


class _Letters:
    """Text to tokens of four characters, and back; what methods use of a ChatTokenizer."""

    end_of_turn_id = eos_id = pad_id = _END
    stop_ids = frozenset({_END})
    control_ids = frozenset({_BEGIN, _END})

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._texts: list[str] = ["", "", ""]

    def encode_text(self, text: str) -> TokenIds:
        parts = [text[n : n + _CHARS] for n in range(0, len(text), _CHARS)]
        for part in parts:
            if part not in self._ids:
                self._ids[part] = len(self._texts)
                self._texts.append(part)
        return tuple(self._ids[part] for part in parts)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self._texts[n] for n in ids)

    def encode_prompt(self, messages: Sequence[Message]) -> TokenIds:
        turns = [(_BEGIN, *self.encode_text(m["content"]), _END) for m in messages]
        return (*(token for turn in turns for token in turn), _BEGIN)

    def encode_response(self, messages: Sequence[Message], response: str) -> TokenIds:
        return (*self.encode_text(response), _END)


class _Sketch:
    """A RunContext that answers with made-up text and counts."""

    def __init__(self, cfg: RunConfig, prompt_tokens: int, answer_tokens: int) -> None:
        # Nothing is to be dropped for its length: counts of rows that fit are wanted.
        room = replace(cfg.data, max_length=10**9, max_prompt_length=10**8)
        self.cfg = replace(cfg, data=room)
        self.tokenizer = cast(ChatTokenizer, _Letters())
        self.method, self._answer = Method(), max(answer_tokens, 2)
        self._made = 0
        self._asked = self.method.before
        self._frozen = self._trained = False
        self._rows = [self._row(n, max(prompt_tokens - 3, 2)) for n in range(_ROWS)]

    def _text(self, tokens: int) -> str:
        """New text of about so many tokens, unlike any before from its beginning on."""
        self._made += 1
        start = f"{self._made:07d} "
        return (start + f"{self._made % 97:03d} " * tokens)[: max(tokens * _CHARS, len(start))]

    def _row(self, number: int, prompt_tokens: int) -> Demonstration:
        messages = ({"role": "user", "content": self._text(prompt_tokens)},)
        text = self._text(self._answer - 1)
        response = self.tokenizer.encode_response(messages, text)
        prompt = self.tokenizer.encode_prompt(messages)
        return Demonstration(f"row{number}", messages, prompt, response, text, f"made-up:{number}")

    # -- data ---------------------------------------------------------------------------------

    def demonstrations(self) -> list[Demonstration]:
        return list(self._rows)

    def prompt_rows(self) -> list[Demonstration]:
        return [replace(row, response_ids=(), response="") for row in self._rows]

    def preferences(self, paths: Sequence[str] | None = None) -> list[PreferencePair]:
        return [
            PreferencePair(
                row.id,
                row.prompt_ids,
                row.response_ids,
                self.tokenizer.encode_response(row.messages, self._text(self._answer - 1)),
                provenance={"source": row.source},
                messages=row.messages,
            )
            for row in self._rows
        ]

    def template(
        self, name: str, required: frozenset[str], optional: frozenset[str] = frozenset()
    ) -> PromptTemplate:
        return load_template(name, required, optional, folder=prompts_dir())

    def encode_user(self, row: Demonstration | PreferencePair, text: str) -> TokenIds:
        system = [m for m in row.messages if m["role"] == "system"]
        return self.tokenizer.encode_prompt([*system, {"role": "user", "content": text}])

    def fits(self, prompt: TokenIds, new_tokens: int | None = None) -> bool:
        return True

    def note(self, stage: str, report: DropReport) -> None:
        """Counts of made-up rows say nothing."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Nor do their metrics."""

    # -- asking -------------------------------------------------------------------------------

    def sample(
        self,
        name: str,
        prompts: Sequence[tuple[str, TokenIds]],
        *,
        weights: WeightSet = WeightSet.POLICY,
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        self._ask(weights)
        longest = self.cfg.rollout.max_new_tokens
        most = [longest] * len(prompts) if limits is None else list(limits)
        found = []
        for (id, prompt), limit in zip(prompts, most, strict=True):
            tokens = max(min(self._answer, limit, longest), 1)
            ids = (*self.tokenizer.encode_text(self._text(tokens)), _END)[-tokens:]
            found.append(Completion(id, ids, (-1.0,) * tokens, FinishReason.STOP, weights, 0))
            self._asked.answers += 1
            self._asked.generated += tokens
            self._asked.read += len(prompt)
        return found

    def label_scores(
        self,
        name: str,
        prompts: Sequence[TokenIds],
        labels: TokenIds,
        *,
        weights: WeightSet = WeightSet.POLICY,
    ) -> list[LabelScores]:
        self._ask(weights)
        self._asked.judgements += len(prompts)
        self._asked.read += sum(len(prompt) for prompt in prompts)
        found = []
        for _ in prompts:  # unlike each other, so that answers are ranked
            self._made += 1
            logprobs = (-1.0 - (self._made * 0.37) % 1.0, *(-1.5 for _ in labels[1:]))
            found.append(LabelScores(logprobs, max(logprobs)))
        return found

    def perplexities(self, name: str, rows: Sequence[tuple[TokenIds, TokenIds]]) -> list[float]:
        self._asked.scored += len(rows)
        self._asked.read += sum(len(p) + len(r) for p, r in rows)
        return [2.0] * len(rows)

    def ask(
        self, name: str, make_teacher: Callable[[], Teacher], requests: Sequence[TeacherRequest]
    ) -> dict[str, str]:
        return {request.id: self._text(self._answer - 1) for request in requests}

    def _ask(self, weights: WeightSet) -> None:
        self._asked.sets.add(weights)
        if weights is WeightSet.FROZEN:  # from here on to the end, or the next freeze
            self._frozen = True
            self.method.copies |= {weights}

    # -- training -----------------------------------------------------------------------------

    def train(
        self,
        name: str,
        rows: Sequence[TrainingRow],
        objective: Objective,
        settings: TrainSettings = TrainSettings(),
    ) -> None:
        mode, wanted = settings.reference.mode, objective.passes - {Pass.POLICY}
        if wanted and mode is RefMode.frozen and self._trained:
            self._frozen = True
        copies = {WeightSet.LAGGED} if wanted and mode.moves else set()
        batch = settings.global_batch_size or self.cfg.model.global_batch_size
        self._add(name, objective, settings, copies, len(rows) / _ROWS, batch)

    def train_online(
        self,
        name: str,
        rows: Sequence[Demonstration],
        pairs: PairMaker,
        objective: Objective,
        settings: TrainSettings = TrainSettings(),
        prompts_per_step: int | None = None,
    ) -> None:
        wanted, copies = objective.passes - {Pass.POLICY}, set()
        if wanted and settings.reference.mode is RefMode.frozen:
            self._frozen = True
        elif wanted:
            copies = {WeightSet.LAGGED}
        self._asked = Asked()
        made = pairs.pairs(0, self, list(rows))
        asked, self._asked = self._asked.scaled(1 / len(rows)), self.method.before
        batch = prompts_per_step or self.cfg.model.global_batch_size
        ratio = len(made) / len(rows)
        self._add(name, objective, settings, copies, ratio, batch, asked)

    def _add(
        self,
        name: str,
        objective: Objective,
        settings: TrainSettings,
        copies: set[WeightSet],
        rows: float,
        batch: int,
        in_step: Asked | None = None,
    ) -> None:
        wanted, trainer = objective.passes - {Pass.POLICY}, self.cfg.trainer
        moves = in_step is not None or settings.reference.mode.moves
        live = wanted if moves else wanted & {Pass.REFINED}
        copies |= {WeightSet.FROZEN} if self._frozen else set()
        copies |= {WeightSet.EMA} if settings.averaging is not None else set()
        self.method.trainings.append(
            Training(
                name,
                in_step is not None,
                rows,
                batch,
                settings.max_epochs or trainer.max_epochs,
                objective.paired,
                wanted - live,
                live,
                frozenset(copies),
                in_step or Asked(),
            )
        )
        self._trained = True

    def freeze(self) -> None:
        self._frozen = self._trained = False

    def reset_policy(self) -> None:
        self._frozen = self._trained = False
