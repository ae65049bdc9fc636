"""What steps.py measures with: material, policies without a run folder, interleaved timing."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import BenchmarkError, Spread
from material import (
    save_model,
    usable_pairs,
    write_pairs,
)

from nemo_selfpref.algorithms.base import Averaging, Reference
from nemo_selfpref.algorithms.refinement import AUGMENT_SLOTS, augment
from nemo_selfpref.checkpoint.hf_config import read_architecture
from nemo_selfpref.checkpoint.hf_weights import HuggingFaceSource
from nemo_selfpref.checkpoint.training_state import fill_policy
from nemo_selfpref.config.model_schema import ModelConfig, OptimConfig, TokenizerConfig
from nemo_selfpref.config.paths import prompts_dir
from nemo_selfpref.config.schema import (
    Accelerator,
    AlgorithmConfig,
    DataConfig,
    RefMode,
    RunConfig,
)
from nemo_selfpref.data.batching import PackedBatch, StepPlan
from nemo_selfpref.data.dataset import load_preferences
from nemo_selfpref.data.packing import micro_batches
from nemo_selfpref.data.templates import load_template
from nemo_selfpref.data.tokenizer import load_tokenizer
from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.platform import select_platform
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.objectives.objective import Objective
from nemo_selfpref.training.copies import StageCopies
from nemo_selfpref.training.steps import FixedSteps, Passes
from nemo_selfpref.types import PreferencePair, TrainingRow

NEVER = 1_000_000
"""Steps after which a reference would move that is not to move while it is measured."""

Pack = Callable[[Sequence[TrainingRow]], list[PackedBatch]]
Facts = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """The shared material. `rows` are those measured on, the first of `all_rows`."""

    args: argparse.Namespace
    all_rows: list[PreferencePair]
    source: str

    @property
    def rows(self) -> list[PreferencePair]:
        return self.all_rows[: self.args.count]

    @property
    def model_folder(self) -> Path:
        return self.args.work / "model"

    @property
    def pairs_path(self) -> Path:
        return self.args.work / "pairs.jsonl"


def prepare(args: argparse.Namespace) -> Bench:
    """Tokenizer, weights and tokenised pairs, the augmented prompts with them."""
    tokenizer, usable = usable_pairs(args.pairs, "--count", args.count, args.size, args.seed)
    write_pairs(args.work / "pairs.jsonl", usable)
    save_model(args.work / "model", args.size, tokenizer, args.seed)
    rows = _tokenised(args)
    if len(rows) != len(usable):
        raise BenchmarkError(f"{len(usable) - len(rows)} pairs were lost on the way to tokens")
    return Bench(args, rows, args.pairs.name if args.pairs else "synthetic")


def _tokenised(args: argparse.Namespace) -> list[PreferencePair]:
    longest = args.size.max_length
    data = DataConfig([str(args.work / "pairs.jsonl")], max_length=longest)
    data.max_prompt_length = longest - 1
    chat = load_tokenizer(TokenizerConfig(), str(args.work / "model"))
    rows, _ = load_preferences(data, chat)
    template = load_template("sr_augment", AUGMENT_SLOTS, folder=prompts_dir())
    # A run drops pairs that the instruction makes too long; here all losses see the same pairs.
    return augment(rows, template, chat, 2 * longest)[0]


class Trainee:
    """A policy of its own at the model's weights, and its optimizer."""

    def __init__(self, bench: Bench, **model_settings: Any) -> None:
        self.bench, args = bench, bench.args
        cfg = RunConfig(
            name="steps",
            seed=args.seed,
            model=ModelConfig(micro_batch_size=args.micro_batch, **model_settings),
            data=DataConfig([], max_length=args.size.max_length),
            algorithm=AlgorithmConfig("none"),
        )
        platform = select_platform(Accelerator.cpu)
        arch = read_architecture(bench.model_folder)
        layout = parallel.initialize(cfg, platform)
        self.policy = Policy(arch, cfg.model, cfg.trainer.precision, platform, layout)
        fill_policy(self.policy, HuggingFaceSource(bench.model_folder, arch))
        self.weights = WeightSets(self.policy)
        self.optimizer = PolicyOptimizer(self.policy, OptimConfig(lr=args.lr), clip_grad=1.0)

    def pack(self, rows: Sequence[TrainingRow], paired: bool, micro_batch: int) -> list[Any]:
        """The micro-batches that a run would make of a step's rows."""
        rule = self.policy.packing_rule(micro_batch)
        numbers = range(len(rows))
        return micro_batches(rows, numbers, replica=0, num_replicas=1, rule=rule, paired=paired)


class Stage:
    """Optimizer steps over some rows, as the product's stages over known rows take them.

    mode: frozen scores the reference once beforehand; policy scores it live in every step, as a
        reference that moves is scored (it does not move while it is measured).
    rows_per_pair: 2 where each answer of a pair is a row of its own; the batches grow with it.
    pack: how a step's rows become micro-batches, where not as in a run.
    """

    def __init__(
        self,
        trainee: Trainee,
        rows: Sequence[TrainingRow],
        objective: Objective,
        *,
        mode: RefMode = RefMode.frozen,
        averaging: Averaging | None = None,
        rows_per_pair: int = 1,
        pack: Pack | None = None,
    ) -> None:
        args = trainee.bench.args
        self.trainee, self.objective = trainee, objective
        micro = args.micro_batch * rows_per_pair
        self._pack = pack or (lambda rows: trainee.pack(rows, objective.paired, micro))
        copies = StageCopies(trainee.weights, Reference(mode, NEVER), averaging)
        passes = Passes(trainee.policy, copies, objective, lambda name: None)
        plan = StepPlan(len(rows), args.global_batch * rows_per_pair, 1, shuffle=False)
        self.steps = FixedSteps(rows, plan, copies, passes)
        self._scorings = 0
        if self.steps.scored_once:
            self.score_once()
        self.steps.begin()

    def run(self) -> Facts:
        """Every step once; the tokens trained on, what came out, and the seconds after steps."""
        policy, optimizer = self.trainee.policy, self.trainee.optimizer
        tokens, after = 0, 0.0
        losses: list[float] = []
        logps: list[float] = []
        for number in range(self.steps.num_steps):
            step = self.steps.step(number)
            found = policy.train_batch(self._pack(step.rows), self.objective, step.inputs)
            optimizer.step()
            started = time.perf_counter()
            self.steps.after_step(number + 1)
            after += time.perf_counter() - started
            tokens += int(found["tokens"])
            losses.append(found["loss"])
            if self.objective.paired:
                logps += [found["logps/chosen"], found["logps/rejected"]]
        return {"tokens": tokens, "losses": losses, "logps": logps, "after_step": after}

    def score_once(self) -> Facts:
        """The passes that do not move over all rows, as before a training stage."""
        self._scorings += 1
        path = self.trainee.bench.args.scratch / f"{id(self)}-{self._scorings}.safetensors"
        self.steps.score_once(path, unmoved=True)
        return {"sequences": 2 * len(self.steps.rows) * len(self.steps.scored_once)}


@dataclass(frozen=True)
class Measured:
    """One timed round of one variant."""

    seconds: float
    cpu_seconds: float
    facts: Facts


Rounds = dict[str, list[Measured]]


def interleave(variants: Mapping[str, Callable[[], Facts]], runs: int) -> Rounds:
    """Time the variants in turn, A B A B, after a round that is not counted: there caches fill, the
    optimizers make their state, and every loss is that of the first weights."""
    found: Rounds = {name: [] for name in variants}
    for number in range(runs + 1):
        for name, work in variants.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            facts = work()
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
            kind = f"run {number}" if number else "warm-up"
            print(f"  {kind}: {name}: {seconds:.2f} s, CPU {cpu:.2f} s", flush=True)
            found[name].append(Measured(seconds, cpu, facts))
    return found


def counted(rounds: Sequence[Measured]) -> Sequence[Measured]:
    """Without the warm-up."""
    return rounds[1:]


def seconds_of(rounds: Sequence[Measured], kind: str = "seconds") -> list[float]:
    return [getattr(m, kind) for m in counted(rounds)]


def added(*columns: Sequence[float]) -> list[float]:
    """Round by round."""
    return [sum(values) for values in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Ratio:
    """What a bar is about: round by round, so that what slows the machine hits both sides."""

    name: str
    spread: Spread
    bar: float | None = None
    at_least: bool = True
    cpu: float | None = None

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        value = self.spread.median
        return value >= self.bar if self.at_least else value <= self.bar

    def facts(self) -> Facts:
        return {
            "name": self.name,
            "median": self.spread.median,
            "min": self.spread.min,
            "max": self.spread.max,
            "cpu": self.cpu,
            "bar": self.bar,
            "at_least": self.at_least,
            "met": self.met,
        }

    def line(self) -> str:
        spread = self.spread
        text = f"{self.name}: {spread.median:.4g} ({spread.min:.4g} to {spread.max:.4g})"
        text += "" if self.cpu is None else f", in CPU time {self.cpu:.4g}"
        if self.bar is None:
            return text
        sign = ">=" if self.at_least else "<="
        return f"{text}; bar {sign} {self.bar:g}: {'met' if self.met else 'NOT met'}"


def ratio_of(
    name: str,
    above: Callable[[str], Sequence[float]],
    below: Callable[[str], Sequence[float]],
    bar: float | None = None,
    at_least: bool = True,
) -> Ratio:
    """above / below, each given what kind of seconds it is asked for."""

    def ratios(kind: str) -> Spread:
        return Spread.of([a / b for a, b in zip(above(kind), below(kind), strict=True)])

    return Ratio(name, ratios("seconds"), bar, at_least, ratios("cpu_seconds").median)


def ratio(
    name: str,
    above: Sequence[Measured],
    below: Sequence[Measured],
    bar: float | None = None,
    at_least: bool = True,
) -> Ratio:
    """How many times longer `above` took."""
    sides = (lambda kind, side=side: seconds_of(side, kind) for side in (above, below))
    return ratio_of(name, *sides, bar=bar, at_least=at_least)


@dataclass
class Part:
    """What one part of the benchmark found."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Any]]
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: Facts = field(default_factory=dict)

    def as_json(self) -> Facts:
        return {
            "title": self.title,
            "columns": self.columns,
            "rows": self.rows,
            "ratios": [r.facts() for r in self.ratios],
            "notes": self.notes,
            **self.facts,
        }


def raw(rounds: Rounds) -> Facts:
    """Every measurement, for the JSON."""
    return {
        "rounds": {
            name: [{"seconds": m.seconds, "cpu_seconds": m.cpu_seconds, **m.facts} for m in found]
            for name, found in rounds.items()
        }
    }


def speed_rows(rounds: Rounds, amounts: Mapping[str, float]) -> list[list[Any]]:
    """Name, amount, seconds with range, CPU seconds, amount a second: a row for each variant."""
    rows = []
    for name, found in rounds.items():
        wall, cpu = Spread.of(seconds_of(found)), Spread.of(seconds_of(found, "cpu_seconds"))
        speed = f"{amounts[name] / wall.median:,.0f}"
        rows.append([name, int(amounts[name]), *wall.cells(), f"{cpu.median:.2f}", speed])
    return rows


def check_alike(rounds: Rounds, names: Sequence[str], rtol: float) -> float:
    """Largest relative difference of losses and log-probs in the first round, neighbours compared.

    Raises:
        BenchmarkError: the variants did not train alike, so their times do not compare.
    """
    worst = 0.0
    for first, second in pairwise(names):
        for what in ("losses", "logps"):
            ours, theirs = (rounds[name][0].facts[what] for name in (first, second))
            pairs = zip(ours, theirs, strict=True)
            found = max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)
            if not found <= rtol:
                raise BenchmarkError(
                    f"{what} of {first} and {second} differ by up to {found:.2g} (relative; "
                    f"{rtol:g} allowed): {ours}, {theirs}"
                )
            worst = max(worst, found)
    return worst
