"""Online steps for rollout.py: a method's pairs made ahead of its training, and each alone."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout_kit import Bench
from steps_kit import Facts

from nemo_selfpref.algorithms.base import PairMaker, TrainSettings
from nemo_selfpref.algorithms.judged import JudgedPairs
from nemo_selfpref.algorithms.osp import OSP, OSPConfig
from nemo_selfpref.algorithms.reference import train_settings
from nemo_selfpref.algorithms.self_augmented_po import SAPOConfig, SelfAugmentedPO
from nemo_selfpref.algorithms.spliced import SplicedPairs
from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.data.batching import StepPlan
from nemo_selfpref.data.packing import micro_batches
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.objectives.objective import DPOObjective, Objective, SPCEObjective
from nemo_selfpref.training.copies import StageCopies
from nemo_selfpref.training.making import Ahead, AtOnce, Made, Making, PairSource
from nemo_selfpref.training.rollouts import EngineRollouts
from nemo_selfpref.training.service import RolloutService
from nemo_selfpref.training.session import Start
from nemo_selfpref.training.steps import OnlineSteps, Passes
from nemo_selfpref.types import Demonstration, WeightSet

STALENESS = 1


@dataclass(frozen=True)
class Method:
    """An online method as its algorithm sets it up; prompts of a step, words of prompt and answer,
    tokens made."""

    asked: frozenset[WeightSet]
    maker: Callable[[], PairMaker]
    objective: Objective
    settings: TrainSettings
    prompts: int
    words: tuple[int, int]
    new_tokens: int


def methods(args: Any) -> Mapping[str, Method]:
    """SAPO with its EMA and replay buffer, OSP with its frozen judge."""
    sapo, osp = SAPOConfig(), OSPConfig(num_samples=args.samples)
    segment = args.new_tokens
    return {
        "SAPO": Method(
            SelfAugmentedPO(sapo).asked_weights(),
            lambda: SplicedPairs(WeightSet.EMA, segment, 2000),
            DPOObjective(sapo.beta),
            train_settings(sapo, samples_ema=True),
            args.sapo_prompts,
            (24, 60),
            segment,
        ),
        "OSP": Method(
            OSP(osp).asked_weights(),
            lambda: JudgedPairs(osp, soft=True),
            SPCEObjective(osp.beta),
            train_settings(osp),
            args.osp_prompts,
            (24, 1),
            args.new_tokens,
        ),
    }


class _Timed:
    """RolloutAccess of a service; how long weights took on either side."""

    def __init__(self, service: RolloutService) -> None:
        self.service, self.hand_over_s, self.given_s = service, 0.0, 0.0
        self.rest, self.share = service.rest, service.share

    def hand_over(self) -> Callable[[], None]:
        started = time.perf_counter()
        give = self.service.hand_over()
        self.hand_over_s += time.perf_counter() - started

        def timed() -> None:
            begun = time.perf_counter()
            give()
            self.given_s += time.perf_counter() - begun

        return timed


class _Given(AtOnce):
    """Pairs that are there already."""

    def __init__(self, made: Sequence[Made]) -> None:
        self.made = made

    def take(self, number: int) -> Made:
        """See PairSource.take. Through JSON, as pairs that come from another thread."""
        return Made.of_json(self.made[number].to_json())


class Online:
    """Steps of one method as a training stage takes them (training/trainer.py)."""

    def __init__(
        self,
        bench: Bench,
        cfg: RunConfig,
        policy: Policy,
        start: Start,
        method: Method,
        service: RolloutService,
    ) -> None:
        self.cfg, self.policy, self.method, self.service = cfg, policy, method, service
        self.steps, self.folder = bench.args.ahead_steps, bench.scratch / "steps"
        self.optimizer = PolicyOptimizer(policy, OptimConfig(lr=bench.args.lr), clip_grad=1.0)
        self.rollouts = EngineRollouts(
            cfg, start.tokenizer, service, lambda _: None, start.arch.max_position_embeddings
        )
        # As many as three variants of every round take, so that no prefix is known already.
        count = method.prompts * (self.steps + 2) * 3 * (bench.args.runs + 1)
        self.rows = bench.rows(start, count, *method.words)
        self._used, self._scopes = 0, itertools.count()
        self.given: list[Made] = []
        weights, settings = service.places.weights, method.settings
        self.copies = StageCopies(weights, settings.reference, settings.averaging)
        self.passes = Passes(policy, self.copies, method.objective, service.places.ready)
        self.copies.begin(keep_reference=bool(self.passes.wanted))

    def _making(self, stop: threading.Event) -> Making:
        first, each = self._used, self.method.prompts
        self._used += each * (self.steps + 2)

        def rows_of(step: int) -> list[Demonstration]:
            return self.rows[first + step * each :][:each]

        asking = self.service.asking(self.rollouts, stop.is_set)
        return Making(self.method.maker(), rows_of, asking, f"policy-{next(self._scopes)}")

    def _online(self, making: Making | None, source: PairSource) -> OnlineSteps:
        plan = StepPlan(len(self.rows), self.method.prompts, 1, max_steps=self.steps + 2)
        maker = self.method.maker() if making is None else making.maker
        return OnlineSteps(
            plan,
            maker,
            source,
            self.folder,
            self.copies,
            self.passes,
            max_staleness=STALENESS,
        )

    def _train(self, online: OnlineSteps, number: int) -> None:
        step = online.step(number)
        batches = micro_batches(
            step.rows,
            range(len(step.rows)),
            replica=0,
            num_replicas=1,
            rule=self.policy.packing_rule(self.cfg.model.micro_batch_size),
            paired=self.method.objective.paired,
        )
        self.policy.train_batch(batches, self.method.objective, step.inputs)
        self.optimizer.step()
        online.after_step(number + 1)

    def ahead(self) -> Facts:
        """From the end of one step to the end of the last but one, so that pairs are made all the
        while."""
        stop, access = threading.Event(), _Timed(self.service)
        making = self._making(stop)
        source = Ahead(making, access, STALENESS, self.steps + 2, main=True, stop=stop)
        online = self._online(making, source)
        try:
            self._train(online, 0)
            waited, handed, given = online.waited_s, access.hand_over_s, access.given_s
            started = time.perf_counter()
            for number in range(1, self.steps + 1):
                self._train(online, number)
            seconds = time.perf_counter() - started
            return self._facts(
                seconds,
                # The hand-over is within what the steps' source took.
                online.waited_s - waited - (access.hand_over_s - handed),
                access.hand_over_s - handed,
                access.given_s - given,
            )
        finally:
            source.close()

    def generating(self) -> Facts:
        """The engines at work, the trainer idle."""
        making = self._making(threading.Event())
        self.service.hand_over()()  # not counted
        started = time.perf_counter()
        made = [making.make(number, number) for number in range(self.steps)]
        seconds = time.perf_counter() - started
        self.given = made
        return {**self._facts(seconds), "pairs": [len(m.pairs) for m in made]}

    def training(self) -> Facts:
        """On the pairs that generating made."""
        online = self._online(None, _Given(self.given))
        started = time.perf_counter()
        for number in range(self.steps):
            self._train(online, number)
        return self._facts(time.perf_counter() - started)

    def _facts(
        self, seconds: float, waited: float = 0.0, handed: float = 0.0, given: float = 0.0
    ) -> Facts:
        names = ("step", "waited", "hand_over", "given")
        values = (seconds, waited, handed, given)
        return {n: value / self.steps for n, value in zip(names, values, strict=True)}
