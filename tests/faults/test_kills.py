"""kill -9 of any rank at any moment: the others end, nothing half written is ever read, and the
same command goes on to the same bits as a run that nobody disturbed.

The hundred of `make test-long` draw method, layout, settings, rank and moment from their number.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ranks import PATIENCE_S, Started, Zygote
from safetensors.torch import load_file
from torch import Tensor

E2E = str(Path(__file__).parents[1] / "e2e")
if E2E not in sys.path:
    sys.path.append(E2E)

import test_methods  # noqa: E402 (the tests are no package)

from nemo_selfpref.checkpoint.seal import problems  # noqa: E402
from nemo_selfpref.checkpoint.sharded import ShardReader  # noqa: E402

CASES = list(test_methods.CASES)
STEPS = test_methods.STEPS
TENSOR_PARALLEL = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
LAYOUTS = {"one": (1, ()), "tp2": (2, TENSOR_PARALLEL), "dp2": (2, ("trainer.devices=2",))}
"""Ranks, and the settings that ask for them."""
SAVES = "exp_manager.checkpoint_callback_params"
ALL_SAVES = {"every_n_train_steps": 1, "save_top_k": -1, "async_save": True}
BAD_WORDS = ("damaged", "cannot be read", "is missing", "is gone", "put aside")
"""What a run would say that met something half written."""
SAMPLE = {"dpo": "tp2", "self_augmented_po": "dp2", "sgpo": "one", "spin": "tp2"}
"""An offline method, an online one, and two of many stages."""


# -- what a run has come to ------------------------------------------------------------------------


def state_of(run: Path) -> dict[str, str]:
    """Sums of all that a run made, by file: values, not bytes, and nothing that a clock told."""
    return {
        path.relative_to(run).as_posix(): digest(path)
        for path in sorted(run.rglob("*"))
        if path.is_file() and is_made(path, run)
    }


def is_made(path: Path, run: Path) -> bool:
    parts = path.relative_to(run).parts
    told_elsewhere = path.suffix == ".safetensors" and path.with_name("index.json").exists()
    known = path.name in ("config.yaml", "inputs.json", "manifest.json", "latest")
    return not (known or told_elsewhere or {"tokenizer", "logs", "heartbeat"} & set(parts))


def digest(path: Path) -> str:
    if path.suffix == ".parquet":
        return sum_of(pq.read_table(path).to_pylist())
    if path.suffix == ".safetensors":
        return tensors_sum(load_file(path))
    if path.name == "index.json":
        reader = ShardReader(path.parent)
        shapes = {name: reader.global_shape(name) for name in reader.names()}
        return tensors_sum({n: reader.read(n, (0,) * len(s), s) for n, s in shapes.items()})
    if path.name == "lightning.json":  # its loops count what this process has begun
        return sum_of([json.loads(path.read_text())[n] for n in ("global_step", "lr_schedulers")])
    if path.suffix == ".json":
        return sum_of(without_clock(json.loads(path.read_text())))
    return sum_of(path.read_text())


def without_clock(value: Any) -> Any:
    """JSON without seconds, and without the sums of files in which they are."""
    if isinstance(value, list):
        return [without_clock(v) for v in value]
    if not isinstance(value, dict):
        return value
    timed = {name for name in value if name.endswith("seconds")}
    return {n: without_clock(v) for n, v in value.items() if n not in timed | {"sum"}}


def tensors_sum(tensors: dict[str, Tensor]) -> str:
    facts = {
        name: [str(t.dtype), list(t.shape), hashlib.sha256(t.numpy().tobytes()).hexdigest()]
        for name, t in tensors.items()
    }
    return sum_of(facts)


def sum_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differences(run: Path, whole: dict[str, str], kept: set[int]) -> list[str]:
    """Names of what is not as in an unbroken run that kept every checkpoint; `kept`: the steps
    whose checkpoints this one keeps."""
    state = state_of(run)
    expected = {name: told for name, told in whole.items() if checkpoint_in(name) in {None, *kept}}
    return sorted(n for n in state.keys() | expected.keys() if state.get(n) != expected.get(n))


def checkpoint_in(name: str) -> int | None:
    """The step of the checkpoint that a file is in."""
    parts = name.split("/")
    inside = "checkpoints" in parts and parts[-2] != "checkpoints"
    return int(parts[3].removeprefix("step-")) if inside else None


def sealed(run: Path) -> dict[Path, int]:
    """Everything a run has that is whole for good, and when that came to be."""
    folders = [*run.glob("stages/*/checkpoints/step-*"), *run.glob("stages/*/weights")]
    all_of_it = [*folders, *run.glob("checkpoint")]  # the last is written by every start
    assert [line for folder in all_of_it for line in problems(folder)] == []
    marks = [folder / "manifest.json" for folder in folders] + [*run.glob("stages/*/done.json")]
    return {mark: mark.stat().st_mtime_ns for mark in marks}


# -- what is killed, and when ----------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One case of the hundred."""

    case: str
    layout: str
    every: int = 1
    keep: int = -1
    background: bool = True
    kills: int = 1

    @classmethod
    def draw(cls, seed: int) -> Plan:
        draw = random.Random(seed)
        return cls(
            CASES[seed % len(CASES)],
            draw.choice(["one", "tp2", "tp2", "dp2", "dp2"]),
            draw.choice([1, 1, 2]),
            draw.choice([-1, -1, 1]),
            draw.random() < 0.6,
            2 if draw.random() < 0.25 else 1,
        )

    @property
    def kept(self) -> set[int]:
        steps = range(self.every, STEPS + 1, self.every)
        return set(steps[-self.keep :] if self.keep > 0 else steps)

    def settings(self) -> list[str]:
        saves = {
            "every_n_train_steps": self.every,
            "save_top_k": self.keep,
            "async_save": str(self.background).lower(),
        }
        return [*LAYOUTS[self.layout][1], *(f"{SAVES}.{k}={v}" for k, v in saves.items())]


@dataclass(frozen=True)
class Moment:
    """When a file or folder is there, or is being written, or has so many lines; and a while."""

    path: str
    lines: int = 0
    delay_s: float = 0.0

    def reached(self, run: Path) -> bool:
        path = run / self.path
        if self.lines:
            return path.exists() and path.read_bytes().count(b"\n") >= self.lines
        return path.exists() or path.with_name(f".{path.name}.tmp").exists()


def moments(whole: dict[str, str], plan: Plan) -> list[Moment]:
    """All that a run comes by, out of what an unbroken one left."""
    paths = {"config.yaml": 0, "checkpoint": 0, "summary.json": 0}
    for name in whole:
        first, *inside = name.split("/")[1:] if name.startswith("stages/") else [""]
        if not first:
            continue
        stage, step = f"stages/{first}", checkpoint_in(name)
        paths[stage] = 0
        if inside[0] == "checkpoints":
            paths |= {f"{stage}/checkpoints/step-{step:06d}": 0} if step in plan.kept else {}
        else:
            paths["/".join([stage, *inside[: 1 if inside[0] == "weights" else 2]])] = 0
    found = [Moment(path) for path in sorted(paths)]
    lines = [m.path for m in found if m.path.endswith("metrics.jsonl")]
    return found + [Moment(path, n) for path in lines for n in range(1, STEPS + 1)]


def phase(run: Path) -> str:
    """What a run is at, by its folder."""
    stages = sorted(run.glob("stages/*"))
    if any(stages[-1].glob("checkpoints/.step-*")) if stages else False:
        return "in a save"
    if [*run.glob("stages/*/.*"), *run.glob("stages/*/pairs/.*"), *run.glob(".*")]:
        return "in another write"
    if not stages:
        return "at the start"
    if (stages[-1] / "done.json").exists():
        return "between stages"
    started = [stages[-1] / name for name in ("checkpoints", "pairs", "pairs.parquet", "logs")]
    return "in a step" if any(path.exists() for path in started) else "sampling"


# -- killing ---------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Runs, and what the kills among them met."""

    folder: Path
    zygote: Zygote
    phases: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    equal: int = 0
    _whole: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)

    def whole(self, case: str, layout: str) -> dict[str, str]:
        """The state of an unbroken run, which is made when it is first asked for."""
        if (case, layout) not in self._whole:
            kind, (size, settings) = f"whole-{layout}", LAYOUTS[layout]
            self.zygote.run(test_methods.arguments(self.folder, kind, case, *settings), size)
            self._whole[case, layout] = state_of(self.folder / kind / case)
            shutil.rmtree(self.folder / kind / case)
        return self._whole[case, layout]

    def kill_and_resume(self, plan: Plan, draw: random.Random, kind: str) -> None:
        """Raises AssertionError where a killed run does not come to what an unbroken one does."""
        run, size = self.folder / kind / plan.case, LAYOUTS[plan.layout][0]
        whole = self.whole(plan.case, plan.layout)
        arguments = test_methods.arguments(self.folder, kind, plan.case, *plan.settings())
        for number in range(plan.kills):
            for _ in range(10):
                before = sealed(run)
                if self.kill_once(arguments, run, size, choose(whole, plan, run, draw), draw):
                    break
                if number == 0:
                    shutil.rmtree(run)  # it had ended by then
            kept = sealed(run)
            assert plan.keep > 0 or before.items() <= kept.items(), "done again"
        told = self.zygote.run(arguments, size).told()
        assert_nothing_half_read(told)
        assert plan.keep > 0 or kept.items() <= sealed(run).items(), "done again"
        self.resumed += 1
        assert differences(run, whole, plan.kept) == []
        assert_nothing_left(run, plan)
        self.equal += 1
        shutil.rmtree(run)

    def kill_once(
        self, arguments: list[str], run: Path, size: int, moment: Moment, draw: random.Random
    ) -> bool:
        """Whether a rank was killed before the run had ended."""
        started = self.zygote.start(arguments, size)
        wait_for(moment, run, started)
        victim, at = draw.randrange(size), phase(run)
        killed = started.send(victim, signal.SIGKILL)
        statuses = started.statuses(PATIENCE_S)
        assert_nothing_half_read(started.told())
        if not killed or statuses[victim] != -signal.SIGKILL:
            return False
        ended = (run / "summary.json").exists()
        others = [status for rank, status in enumerate(statuses) if rank != victim]
        assert ended or all(status > 0 for status in others), (statuses, started.told()[-3000:])
        self.phases[at] += 1
        return True

    def table(self) -> str:
        rows = [f"  {at:<18} {count:>4}" for at, count in sorted(self.phases.items())]
        head = f"kill -9: {self.phases.total()} kills, {self.resumed} runs resumed to their end, "
        return "\n".join([f"{head}{self.equal} of them bitwise equal to unbroken ones", *rows])


def choose(whole: dict[str, str], plan: Plan, run: Path, draw: random.Random) -> Moment:
    """A moment that is still to come."""
    to_come = [moment for moment in moments(whole, plan) if not moment.reached(run)]
    moment = draw.choice(to_come) if to_come else Moment("config.yaml")
    delay = draw.choice([0.0, draw.uniform(0, 0.01), draw.uniform(0, 0.2)])
    return Moment(moment.path, moment.lines, delay)


def wait_for(moment: Moment, run: Path, started: Started) -> None:
    """Until it is there, or the run has ended."""
    fresh = not run.exists()
    while started.running() and not (moment.reached(run) and (fresh or started.joined())):
        time.sleep(0.001)
    time.sleep(moment.delay_s)


def assert_nothing_left(run: Path, plan: Plan) -> None:
    """Nothing of an interrupted save, and `latest` names the newest."""
    assert [p.name for p in run.glob("stages/*/checkpoints/.*")] == []
    latest = {path.read_text() for path in run.glob("stages/*/checkpoints/latest")}
    assert latest == {f"step-{max(plan.kept):06d}\n"}


def assert_nothing_half_read(told: str) -> None:
    found = [word for word in BAD_WORDS if word in told]
    assert found == [], told[-6000:]


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("kills")
    test_methods.write_inputs(folder)
    bench = Bench(folder, Zygote(folder / "logs"))
    yield bench
    bench.zygote.close()
    request.config.get_terminal_writer().line(f"\n{bench.table()}")


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLE)
def test_a_killed_run_goes_on_to_the_same_bits(bench: Bench, case: str) -> None:
    plan = Plan(case, SAMPLE[case])
    bench.kill_and_resume(plan, random.Random(case), f"sample-{case}")


@pytest.mark.slow
def test_answers_kept_before_a_kill_are_not_sampled_again(bench: Bench) -> None:
    """A sampling stage killed after each of its parts."""
    more = (*LAYOUTS["dp2"][1], "rollout.save_every=5", "algorithm.iterations=1")
    whole, run = bench.folder / "parts" / "spin", bench.folder / "parts-killed" / "spin"
    bench.zygote.run(test_methods.arguments(bench.folder, "parts", "spin", *more), 2)
    arguments = test_methods.arguments(bench.folder, "parts-killed", "spin", *more)
    kept: dict[Path, int] = {}
    for rank, part in enumerate(("000000-000005", "000005-000010")):
        started = bench.zygote.start(arguments, 2)
        wait_for(Moment(f"stages/01-answer-0/parts/{part}.json"), run, started)
        started.send(rank, signal.SIGKILL)
        assert started.statuses(PATIENCE_S)[rank] == -signal.SIGKILL, started.told()
        parts = (run / "stages/01-answer-0/parts").glob("*.parquet")
        now = {path: path.stat().st_mtime_ns for path in parts}
        assert kept.items() < now.items(), "sampled again"
        kept = now
    bench.zygote.run(arguments, 2)
    # The stage's facts have means of what was measured on the answers sampled since the kill.
    differ = set(differences(run, state_of(whole), set(range(1, STEPS + 1))))
    assert differ <= {"stages/01-answer-0/done.json", "summary.json"}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("tens", range(10))
def test_the_hundred(bench: Bench, tens: int) -> None:
    failed = []
    for seed in range(10 * tens, 10 * tens + 10):
        plan = Plan.draw(seed)
        try:
            bench.kill_and_resume(plan, random.Random(seed), f"seed-{seed}")
        except AssertionError as error:
            failed.append(f"{seed}: {plan}: {error}")
            sys.stderr.write(f"{failed[-1]}\n")
    assert not failed, "\n".join(failed)


def test_the_hundred_are_of_every_kind() -> None:
    plans = [Plan.draw(seed) for seed in range(100)]
    assert {plan.case for plan in plans} == set(CASES)
    for case in CASES:
        assert any(plan.case == case and plan.layout != "one" for plan in plans), case
    kinds = {(p.layout, p.every, p.keep, p.background) for p in plans}
    assert len(kinds) > 20
    assert 10 < sum(plan.kills == 2 for plan in plans) < 50
