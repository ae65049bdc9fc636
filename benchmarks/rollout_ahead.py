"""The measurement of rollout.py of online steps whose pairs are made ahead of the trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from common import BenchmarkError, Spread
from rollout_kit import Bench, fact, in_turn, pin, ratio_per_round, threads
from rollout_online import STALENESS, Method, Online, methods
from steps_kit import Part, Rounds, raw

from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.training.places import WeightPlaces
from nemo_selfpref.training.service import RolloutService
from nemo_selfpref.training.session import Start, build_policy, find_start

_SIZE = "small"
_DETAILS = ("waited", "hand_over", "given")


def ahead(bench: Bench) -> Part:
    """Online steps with pairs made one step ahead, over what generating and training take alone."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise BenchmarkError("ahead: generating and training need a core each; there is one")
    part = Part(
        f"Steps ahead (max_staleness={STALENESS}): seconds a step, one core each",
        ("method", "variant", "s", "range", "waited", "hand-over", "given"),
        [],
        notes=[
            f"Engines and front on core {cores[1]}, the trainer with its client on core "
            f"{cores[0]}; one thread each, in all variants. generating: pairs made, with no new "
            "weights and the trainer idle. training: the same step with its pairs given.",
            "waited: the trainer for pairs; hand-over: the trainer gathers and writes weights; "
            "given: the engines take them in, before they make the next pairs.",
        ],
    )
    with threads(1):
        for name in bench.args.methods:
            rounds = _measure(bench, methods(bench.args)[name], cores)
            for variant, found in rounds.items():
                steps = Spread.of(fact(found, "step"))
                rest = [Spread.of(fact(found, f)).cells()[0] for f in _DETAILS]
                part.rows.append([name, variant, *steps.cells(), *rest])
            alone = [fact(rounds[variant], "step") for variant in ("generating", "training")]
            longer = [max(both) for both in zip(*alone, strict=True)]
            title = f"{name}: step / max(generating, training)"
            part.ratios.append(
                ratio_per_round(title, fact(rounds["ahead"], "step"), longer, bar=1.1)
            )
            both = [sum(both) for both in zip(*alone, strict=True)]
            title = f"{name}: step / (generating + training)"
            part.ratios.append(ratio_per_round(title, fact(rounds["ahead"], "step"), both))
            part.facts[name] = raw(rounds)
    return part


def _measure(bench: Bench, method: Method, cores: Sequence[int]) -> Rounds:
    cfg = bench.config(
        _SIZE,
        micro_batch=4,
        max_staleness=STALENESS,
        max_new_tokens=method.new_tokens,
        check_samples=0,
        vllm={"weights_dir": str(bench.shared / f"ahead-{len(method.asked)}")},
    )
    start = find_start(cfg)
    policy, _ = build_policy(cfg, start)
    with _service(bench, cfg, policy, start, method, cores) as service:
        online = Online(bench, cfg, policy, start, method, service)
        variants = {
            "ahead": online.ahead,
            "generating": online.generating,
            "training": online.training,
        }
        return in_turn(variants, bench.args.runs)


@contextmanager
def _service(
    bench: Bench,
    cfg: RunConfig,
    policy: Policy,
    start: Start,
    method: Method,
    cores: Sequence[int],
) -> Iterator[RolloutService]:
    """A run's rollout servers, on a core of their own."""
    everywhere = os.sched_getaffinity(0)
    places = WeightPlaces(WeightSets(policy), start, cfg.seed)
    folder = bench.scratch / f"run-{len(method.asked)}"
    quiet = Console(enabled=False)
    service = RolloutService(cfg, policy, places, start, folder, quiet, method.asked)
    try:
        pin({cores[1]})
        service.open()
        pin({cores[0]})
        yield service
    finally:
        service.close()
        pin(everywhere)
