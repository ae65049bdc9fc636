"""Fleets of stub engines, and calls for them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from stub_engine import stub_answer

from nemo_selfpref.files import write_json
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.auth import make_token
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec
from nemo_selfpref.rollout.serving.fleet import Fleet, FleetSettings, LocalMember, Member
from nemo_selfpref.rollout.serving.manifest import write_weights
from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    FolderSource,
    GenerateCall,
    ParamsRecord,
    RequestRecord,
    Stamp,
    WeightsCall,
)
from nemo_selfpref.types import WeightSet

SCRIPT = Path(__file__).with_name("stub_engine.py")
FAST = FleetSettings(
    health_every_s=0.1,
    suspect_after=3,
    max_restarts=3,
    min_engines=1,
    start_timeout_s=60.0,
    stall_s=2.0,
)


def stub_command(python: str, spec_path: Path) -> list[str]:
    return [python, str(SCRIPT), str(spec_path)]


@dataclass
class Stubs:
    """Stub engines engine-0, engine-1, ... below one folder, and the fleets over them."""

    root: Path
    notes: list[str] = field(default_factory=list)
    fleets: list[Fleet] = field(default_factory=list)

    @property
    def token(self) -> str:
        return make_token(self.root / "token")

    def set(self, number: int, **faults: Any) -> None:
        """Replace the faults of one engine."""
        write_json(self.root / f"model-{number}" / "faults.json", faults)

    def spec(self, number: int, sets: Sequence[str] = ("policy",)) -> EngineSpec:
        self.token  # noqa: B018 (makes the file)
        return EngineSpec(
            model=str(self.root / f"model-{number}"),
            weights_dir=str(self.root),
            weight_sets=list(sets),
            stop_ids=[2, 0],
            tokenizer_sha256="0" * 64,
            dtype="float32",
            max_length=64,
            device="cpu",
            token_file=str(self.root / "token"),
            ready_file=str(self.root / f"ready-{number}.json"),
        )

    def member(self, number: int, sets: Sequence[str] = ("policy",)) -> LocalMember:
        return LocalMember(
            f"engine-{number}",
            self.spec(number, sets),
            sys.executable,
            self.root / "processes",
            self.token,
            command=stub_command,
        )

    def fleet(
        self, members: Sequence[Member] | int = 2, settings: FleetSettings = FAST
    ) -> tuple[Fleet, list[Any]]:
        """A started fleet and its members."""
        if isinstance(members, int):
            members = [self.member(number) for number in range(members)]
        for number in range(len(members)):
            (self.root / f"model-{number}").mkdir(exist_ok=True)
        fleet = Fleet(members, settings, self.notes.append)
        self.fleets.append(fleet)
        fleet.start(Until.within(60))
        return fleet, list(members)

    def weights(
        self, version: int, run: str = "a", weight_set: WeightSet = WeightSet.POLICY
    ) -> WeightsCall:
        folder = self.root / f"{weight_set.value}-{run}-{version}"
        tensors = [("weight", torch.full((2,), float(version)))]
        manifest = write_weights(folder, tensors, weight_set=weight_set, version=version, run=run)
        return WeightsCall(
            manifest=manifest, source=FolderSource(folder=str(folder)), timeout_s=20.0
        )

    def close(self) -> None:
        for fleet in self.fleets:
            fleet.close()


def ask(
    count: int, expect: Stamp | None = None, weight_set: WeightSet = WeightSet.POLICY
) -> GenerateCall:
    requests = [
        RequestRecord(id=f"r{number}", prompt_ids=[5, 6, 10 + number], seed=number)
        for number in range(count)
    ]
    params = ParamsRecord(max_new_tokens=4)
    return GenerateCall(weight_set=weight_set, expect=expect, requests=requests, params=params)


def collect(
    fleet: Fleet,
    call: GenerateCall,
    until: Until | None = None,
    on_record: Callable[[int], None] = lambda _: None,
) -> list[CompletionRecord]:
    """All answers; `on_record` is told how many there are, at each."""
    found: list[CompletionRecord] = []

    def emit(record: CompletionRecord) -> None:
        found.append(record)
        on_record(len(found))

    fleet.generate(call, emit, until or Until.within(60))
    return found


def check_all(call: GenerateCall, found: Sequence[CompletionRecord], stamp: Stamp) -> None:
    """Nothing is lost, nothing is there twice, and all is what the wanted weights answer."""
    assert sorted(record.id for record in found) == sorted(r.id for r in call.requests)
    asked = {request.id: request for request in call.requests}
    for record in found:
        request = asked[record.id]
        assert record.token_ids == stub_answer(request.prompt_ids, request.seed, stamp)
        assert (record.weight_version, record.weight_digest) == (stamp.version, stamp.digest)


def eventually(reached: Callable[[], bool], within_s: float = 30.0) -> None:
    end = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.02)
