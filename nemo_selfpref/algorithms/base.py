"""What an algorithm is, what a run offers it, and the registry.

An algorithm is a composition: it asks the run for data, samples, perplexities and training, and
supplies only the step its paper adds. It sees no device, no parallelism and no file format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, TypeVar

from nemo_selfpref.config.schema import AlgorithmConfig, OptimConfig, RunConfig
from nemo_selfpref.data.templates import PromptTemplate
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import Objective
from nemo_selfpref.rollout.teacher import Teacher, TeacherRequest
from nemo_selfpref.types import (
    Completion,
    Demonstration,
    DropReport,
    Message,
    PreferencePair,
    TokenIds,
    TrainingRow,
)


@dataclass(frozen=True)
class TrainSettings:
    """Where a training stage departs from the run's own trainer and model settings."""

    max_epochs: int | None = None
    global_batch_size: int | None = None
    optim: OptimConfig | None = None


class RunContext(Protocol):
    """What a run offers. Every call is one named stage; a resumed run skips the finished ones."""

    cfg: RunConfig
    tokenizer: ChatTokenizer

    def demonstrations(self) -> list[Demonstration]:
        """The rows of data.train_path, each with the answer to imitate."""
        ...

    def preferences(self) -> list[PreferencePair]:
        """The rows of data.train_path as preference pairs."""
        ...

    def template(
        self, name: str, required: frozenset[str], optional: frozenset[str] = frozenset()
    ) -> PromptTemplate:
        """A prompt template of conf/prompts, or a path to one."""
        ...

    def encode_user(self, row: Demonstration, text: str) -> TokenIds:
        """Prompt token ids of a single user turn, under the row's system message."""
        ...

    def sample(self, name: str, prompts: Sequence[tuple[str, TokenIds]]) -> list[Completion]:
        """One completion of the current policy for each (id, prompt)."""
        ...

    def perplexities(self, name: str, rows: Sequence[tuple[TokenIds, TokenIds]]) -> list[float]:
        """Perplexity of each response given its prompt, under the current policy."""
        ...

    def ask(
        self, name: str, make_teacher: Callable[[], Teacher], requests: Sequence[TeacherRequest]
    ) -> dict[str, str]:
        """Answers of an external model, by request id. Only one rank makes the teacher."""
        ...

    def fits(self, prompt: TokenIds) -> bool:
        """Whether an answer of rollout.max_new_tokens to the prompt stays within the model."""
        ...

    def train(
        self,
        name: str,
        rows: Sequence[TrainingRow],
        objective: Objective,
        settings: TrainSettings = TrainSettings(),
    ) -> None:
        """Train the policy on rows. A reference, where the objective needs one, is the policy as
        it stands when the stage begins."""
        ...

    def note(self, stage: str, report: DropReport) -> None:
        """Put rows kept and dropped into the run's closing table."""
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

    def check(self, cfg: RunConfig) -> None:  # noqa: B027 (most methods have nothing to check)
        """Raise ConfigError for settings that contradict each other."""


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


def instruction_of(row: Demonstration) -> tuple[Message, ...]:
    """The conversation without its system message."""
    return tuple(m for m in row.messages if m["role"] != "system")
