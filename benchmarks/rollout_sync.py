"""The measurement of rollout.py of new weights: from a trainer's policy into an engine."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Spread
from rollout_engines import Child, Served, Serving
from rollout_kit import Bench, in_turn, ratio_per_round
from steps_kit import Facts, Measured, Part, Ratio, counted, raw, seconds_of

from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.rollout.serving.wire import Probe
from nemo_selfpref.training.publish import WeightPublisher, probe_ids
from nemo_selfpref.types import WeightSet

_PARTS = ("gather", "probe", "write", "http", "verify", "load", "engine's probe")
_IN_PROCESS_MS, _HTTP_MS, _COPIES = 25.0, 100.0, 2.0


def sync(bench: Bench) -> Part:
    """New weights: in an engine's own process, over HTTP from a policy, and over a memcpy."""
    part = Part(
        "New weights: median milliseconds",
        ("weights", "way", "MB", "total", "range", *_PARTS),
        [],
        notes=[
            "gather: Megatron's shards to Hugging Face tensors. probe: the trainer's log-prob of a "
            "fixed text. write: SHA-256, the check for numbers, and the file. verify: the "
            "engine's SHA-256 and check of every tensor. load: vLLM's layerwise reload, which "
            "repacks linear layers for the processor, and an empty prefix cache. http: what is "
            "left of the hand-over, two hops through the front among it.",
        ],
    )
    with Serving(bench, "tiny") as served:
        _tiny(bench, part, served)
        if bench.args.large == "tiny":
            _large(bench, part, served)
            return part
    with Serving(bench, bench.args.large) as served:
        _large(bench, part, served)
    return part


def _tiny(bench: Bench, part: Part, served: Served) -> None:
    weights_dir = str(bench.shared / "in-process")
    spec = served.spec.engines[0].spec.model_copy(update={"weights_dir": weights_dir})
    with Child(bench, "updates", spec) as child:
        policy, _ = bench.policy("tiny")
        probe = _probe(policy).model_dump()
        publish = _Publishing(policy, served)
        variants = {"in process": partial(child.ask, probe=probe), "HTTP": publish.run}
        rounds = in_turn(variants, bench.args.sync_runs)
    part.rows.append(_row("tiny", "in process", publish.megabytes, rounds["in process"], _child))
    part.rows.append(_row("tiny", "HTTP", publish.megabytes, rounds["HTTP"], _published))
    part.ratios.append(_milliseconds("tiny, in process", rounds["in process"], _IN_PROCESS_MS))
    part.ratios.append(_milliseconds("tiny, policy to engine", rounds["HTTP"], _HTTP_MS))
    part.notes.append(f"tiny, HTTP: {_shares(rounds['HTTP'])} of the total.")
    part.facts["tiny"] = raw(rounds)


def _large(bench: Bench, part: Part, served: Served) -> None:
    size = bench.args.large
    policy, _ = bench.policy(size)
    publish = _Publishing(policy, served)
    publish.run()  # how many bytes there are
    copy = _Copying(bench.shared, publish.bytes)
    variants = {"HTTP": publish.run, "new": copy.to_new, "old": copy.to_old}
    rounds = in_turn(variants, bench.args.sync_runs)
    part.rows.append(_row(size, "HTTP", publish.megabytes, rounds["HTTP"], _published))
    for way, name in (("new", "copy, new shared memory"), ("old", "copy, memory in use")):
        part.rows.append(_row(size, name, publish.megabytes, rounds[way], lambda m: {}))
    total, new, old = (seconds_of(rounds[way]) for way in variants)
    title = f"{size}: new weights / torch copy into "
    part.ratios += [
        ratio_per_round(f"{title}a new file in shared memory", total, new, bar=_COPIES),
        ratio_per_round(f"{title}memory in use", total, old),
    ]
    part.notes.append(f"{size}: {_shares(rounds['HTTP'])} of the total.")
    part.facts[size] = raw(rounds)


class _Publishing:
    """A policy whose weights change, and its publisher, into one engine over HTTP."""

    def __init__(self, policy: Policy, served: Served) -> None:
        self.policy, self.client = policy, served.client
        self.publisher = WeightPublisher(
            policy,
            WeightSets(policy),
            folder=Path(served.spec.weights_dir),
            run=secrets.token_hex(8),
        )

    @property
    def bytes(self) -> int:
        return self.publisher.last.bytes

    @property
    def megabytes(self) -> float:
        return self.bytes / 1e6

    def run(self) -> Facts:
        with torch.no_grad():  # not counted: other bytes, as after a step
            for parameter in self.policy.module.parameters():
                parameter.mul_(1.0001)
        self.policy.weight_version += 1
        started = time.perf_counter()
        self.publisher.publish(WeightSet.POLICY, self.client.update)
        seconds = time.perf_counter() - started
        last, (report,) = self.publisher.last, self.publisher.reports
        return {
            "seconds": seconds,
            **{name: getattr(last, name) for name in ("gather_s", "write_s", "send_s")},
            **report.model_dump(include={"wait_s", "verify_s", "load_s", "probe_s"}),
        }


def _probe(policy: Policy) -> Probe:
    first, *rest = probe_ids(policy)
    logprob = float(policy.score([((first,), tuple(rest))]).sums[0])
    return Probe(token_ids=[first, *rest], logprob=logprob, tolerance=1e-3)


class _Copying:
    """The same bytes copied once, by torch: into a new file-backed tensor in shared memory, whose
    pages the kernel has to make, and into memory that is in use already."""

    def __init__(self, folder: Path, count: int) -> None:
        self.path = folder / "copy"
        self.source = torch.randint(256, (count,), dtype=torch.uint8)
        self.target = torch.zeros_like(self.source)

    def to_new(self) -> Facts:
        started = time.perf_counter()
        shape = self.source.numel()
        new = torch.from_file(str(self.path), shared=True, size=shape, dtype=torch.uint8)
        new.copy_(self.source)
        seconds = time.perf_counter() - started
        del new
        self.path.unlink()
        return {"seconds": seconds}

    def to_old(self) -> Facts:
        started = time.perf_counter()
        self.target.copy_(self.source)
        return {"seconds": time.perf_counter() - started}


# -- tables -----------------------------------------------------------------------------------


def _child(measured: Measured) -> dict[str, float]:
    f = measured.facts
    return {
        "write": f["write"],
        "verify": f["verify_s"],
        "load": f["load_s"],
        "engine's probe": f["probe_s"],
    }


def _published(measured: Measured) -> dict[str, float]:
    f = measured.facts
    at_engine = f["verify_s"] + f["load_s"] + f["probe_s"]
    return {
        "gather": f["gather_s"],
        "probe": measured.seconds - f["gather_s"] - f["write_s"] - f["send_s"],
        "write": f["write_s"],
        "http": f["send_s"] - at_engine,
        "verify": f["verify_s"],
        "load": f["load_s"],
        "engine's probe": f["probe_s"],
    }


def _medians(rounds: Sequence[Measured], split: Any) -> dict[str, float]:
    found = [split(m) for m in counted(rounds)]
    return {name: Spread.of([f[name] for f in found]).median for name in found[0]}


def _row(
    size: str, way: str, megabytes: float, rounds: Sequence[Measured], split: Any
) -> list[Any]:
    total = Spread.of([1e3 * s for s in seconds_of(rounds)])
    parts = _medians(rounds, split)
    cells = [f"{1e3 * parts[name]:.1f}" if name in parts else "" for name in _PARTS]
    return [size, way, f"{megabytes:.1f}", *total.cells(1), *cells]


def _milliseconds(name: str, rounds: Sequence[Measured], bar: float) -> Ratio:
    spread = Spread.of([1e3 * s for s in seconds_of(rounds)])
    return Ratio(f"{name}, milliseconds", spread, bar, at_least=False)


def _shares(rounds: Sequence[Measured]) -> str:
    parts, total = _medians(rounds, _published), Spread.of(seconds_of(rounds)).median
    largest = sorted(parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in largest)
