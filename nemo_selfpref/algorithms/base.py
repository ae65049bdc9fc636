"""What an algorithm is, what a run offers it, and the registry.

An algorithm is a composition: it asks the run for data, samples, perplexities and training, and
supplies only the step its paper adds. It sees no device, no parallelism and no file format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, TypeVar

from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.config.schema import AlgorithmConfig, RefMode, RunConfig
from nemo_selfpref.data.templates import PromptTemplate
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import Objective
from nemo_selfpref.rollout.teacher import Teacher, TeacherRequest
from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    LabelScores,
    Message,
    PreferencePair,
    TokenIds,
    TrainingRow,
    WeightSet,
    flatten_messages,
)


@dataclass(frozen=True)
class Reference:
    """Which weights a stage's reference is; in the modes policy and ema it moves every so many
    optimizer steps."""

    mode: RefMode = RefMode.last
    every: int = 0


@dataclass(frozen=True)
class Averaging:
    """An EMA of the policy: ema <- alpha ema + (1 - alpha) policy, every so many steps."""

    alpha: float
    every: int


@dataclass(frozen=True)
class TrainSettings:
    """Where a training stage departs from the run's own trainer and model settings."""

    max_epochs: int | None = None
    global_batch_size: int | None = None
    optim: OptimConfig | None = None
    reference: Reference = Reference()
    averaging: Averaging | None = None


class Rollouts(Protocol):
    """Asking the model. In a run each call is a stage; in an online step it is part of the step."""

    cfg: RunConfig
    tokenizer: ChatTokenizer

    def template(
        self, name: str, required: frozenset[str], optional: frozenset[str] = frozenset()
    ) -> PromptTemplate:
        """A prompt template of conf/prompts, or a path to one."""
        ...

    def encode_user(self, row: Demonstration | PreferencePair, text: str) -> TokenIds:
        """Prompt token ids of a single user turn, under the row's system message."""
        ...

    def sample(
        self,
        name: str,
        prompts: Sequence[tuple[str, TokenIds]],
        *,
        weights: WeightSet = WeightSet.POLICY,
        limits: Sequence[int] | None = None,
    ) -> list[Completion]:
        """One completion for each (id, prompt), of at most `limits` tokens each where given."""
        ...

    def label_scores(
        self,
        name: str,
        prompts: Sequence[TokenIds],
        labels: TokenIds,
        *,
        weights: WeightSet = WeightSet.POLICY,
    ) -> list[LabelScores]:
        """How likely each of the label tokens comes next, for each prompt."""
        ...

    def fits(self, prompt: TokenIds, new_tokens: int | None = None) -> bool:
        """Whether an answer of so many tokens (rollout.max_new_tokens) stays within the model."""
        ...

    def note(self, stage: str, report: DropReport) -> None:
        """Put rows kept and dropped into the run's closing table."""
        ...

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add metrics to the current step's, or to the closing table."""
        ...


class PairMaker(ABC):
    """Makes the preference pairs of each step of an online stage."""

    @abstractmethod
    def pairs(
        self, step: int, rollouts: Rollouts, rows: Sequence[Demonstration]
    ) -> list[PreferencePair]:
        """The pairs to train on in this step, from the step's prompts."""

    def kept(self) -> tuple[Sequence[PreferencePair], Mapping[str, Any]]:
        """What must survive between steps: pairs, and the rest as JSON."""
        return (), {}

    def restore(self, pairs: Sequence[PreferencePair], state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what `kept` gave."""

    def histograms(self) -> Mapping[str, Mapping[str, int]]:
        """Counts for the closing report, by title and bin."""
        return {}


class RunContext(Rollouts, Protocol):
    """What a run offers. Every call is one named stage; a resumed run skips the finished ones."""

    def demonstrations(self) -> list[Demonstration]:
        """The rows of data.train_path, each with the answer to imitate."""
        ...

    def prompt_rows(self) -> list[Demonstration]:
        """The rows of data.train_path as prompts to answer; their own answers are not read."""
        ...

    def preferences(self, paths: Sequence[str] | None = None) -> list[PreferencePair]:
        """The rows of data.train_path (or of other files) as preference pairs."""
        ...

    def perplexities(self, name: str, rows: Sequence[tuple[TokenIds, TokenIds]]) -> list[float]:
        """Perplexity of each response given its prompt, under the current policy."""
        ...

    def ask(
        self, name: str, make_teacher: Callable[[], Teacher], requests: Sequence[TeacherRequest]
    ) -> dict[str, str]:
        """Answers of an external model, by request id. Only one rank makes the teacher."""
        ...

    def train(
        self,
        name: str,
        rows: Sequence[TrainingRow],
        objective: Objective,
        settings: TrainSettings = TrainSettings(),
    ) -> None:
        """Train the policy on rows."""
        ...

    def train_online(
        self,
        name: str,
        rows: Sequence[Demonstration],
        pairs: PairMaker,
        objective: Objective,
        settings: TrainSettings = TrainSettings(),
        prompts_per_step: int | None = None,
    ) -> None:
        """Train the policy on pairs made anew in every optimizer step, each from the next
        `prompts_per_step` rows (the global batch size)."""
        ...

    def freeze(self) -> None:
        """From here on the frozen weights are the policy's as they are now."""
        ...

    def reset_policy(self) -> None:
        """Put the frozen weights back into the policy."""
        ...


class Algorithm(ABC):
    """One method, with its settings."""

    summary: ClassVar[str]
    paper: ClassVar[str]
    config_class: ClassVar[type[AlgorithmConfig]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def run(self, run: RunContext) -> None:
        """The method, from data to trained policy."""

    def asked_weights(self) -> frozenset[WeightSet]:
        """The sets of weights the method samples from or judges with; an engine of its own holds
        these and no others."""
        return frozenset()

    def check(self, cfg: RunConfig) -> None:  # noqa: B027 (most methods have nothing to check)
        """Raise ConfigError for settings that contradict each other."""


ALIASES = {
    "sapo": (
        "self_augmented_po",
        "other software calls Soft Adaptive Policy Optimization by that name",
    )
}
"""Names people may use for a configuration: what is meant, and what else it could be."""

_REGISTRY: dict[str, type[Algorithm]] = {}
A = TypeVar("A", bound=type[Algorithm])


def register(name: str) -> Callable[[A], A]:
    """Class decorator: makes an algorithm known by `name`."""

    def add(cls: A) -> A:
        if name in _REGISTRY and _REGISTRY[name] is not cls:
            raise ConfigError(f"two algorithms are called {name!r}: {_REGISTRY[name]} and {cls}")
        _REGISTRY[name] = cls
        return cls

    return add


def algorithms() -> dict[str, type[Algorithm]]:
    """All algorithms by name: our own, and those of installed packages that offer an entry point
    in the group nemo_selfpref.algorithms."""
    import nemo_selfpref.algorithms.all  # noqa: F401

    for entry in entry_points(group="nemo_selfpref.algorithms"):
        entry.load()
    return dict(sorted(_REGISTRY.items()))


def check_positive(name: str, value: float) -> None:
    """Raise ConfigError unless value > 0."""
    if value <= 0:
        raise ConfigError(f"{name}={value}: expected a positive number")


def instruction_of(row: Demonstration | PreferencePair) -> tuple[Message, ...]:
    """The conversation without its system message."""
    return tuple(m for m in row.messages if m["role"] != "system")


def instruction_text(row: Demonstration | PreferencePair) -> str:
    """What the user asked, as text for a slot."""
    return flatten_messages(instruction_of(row))
