"""A run that is asked to stop: by any signal, to any one rank or to the launcher, in a step or in a
stage without steps. All ranks save what they have done, end with 75, and the same command goes on
to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_kills  # puts tests/e2e on the path
import test_methods
from ranks import PATIENCE_S, Started, Zygote, eventually, exists
from test_kills import SAVES, differences, state_of

from nemo_selfpref.checkpoint.seal import problems
from nemo_selfpref.errors import EXIT_STOPPED

pytestmark = pytest.mark.slow
LAYOUTS = test_kills.LAYOUTS
STEPS = 24
LONG = (f"trainer.max_steps={STEPS}", f"trainer.max_epochs={STEPS}")
ENDLESS = ("trainer.max_steps=1000000", "trainer.max_epochs=1000000")
STAGE = "stages/01-policy"
STOPS = [
    *((signal.SIGTERM, 0, "tp2", 0), (signal.SIGTERM, 1, "dp2", 1)),
    *((signal.SIGUSR1, 0, "dp2", 0), (signal.SIGUSR1, 1, "tp2", 1)),
    *((signal.SIGINT, 0, "dp2", 1), (signal.SIGINT, 1, "tp2", 0)),
]
"""Signal, which rank gets it, layout, and every how many steps there is a checkpoint anyway."""


class Runs:
    """Runs of two ranks, and what they come to when nobody stops them."""

    def __init__(self, folder: Path) -> None:
        test_methods.write_inputs(folder)
        self.folder, self.zygote = folder, Zygote(folder / "logs")
        self._whole: dict[tuple[str, ...], dict[str, str]] = {}

    def arguments(self, kind: str, case: str, layout: str, *more: str) -> list[str]:
        every = f"{SAVES}.every_n_train_steps=1"
        return test_methods.arguments(self.folder, kind, case, *LAYOUTS[layout][1], every, *more)

    def whole(self, case: str, layout: str, *more: str) -> dict[str, str]:
        key = (case, layout, *more)
        if key not in self._whole:
            kind = f"whole-{layout}"
            self.zygote.run(self.arguments(kind, case, layout, *more), 2)
            self._whole[key] = state_of(self.folder / kind / case)
        return self._whole[key]

    def start(self, kind: str, case: str, layout: str, *more: str) -> tuple[Started, Path]:
        arguments = self.arguments(kind, case, layout, *more)
        return self.zygote.start(arguments, 2), self.folder / kind / case


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("stops"))
    yield runs
    runs.zygote.close()


def steps_of(run: Path) -> list[int]:
    path = run / STAGE / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


def in_step(run: Path, number: int, started: Started) -> None:
    """Wait until so many steps are done."""
    eventually(lambda: len(steps_of(run)) >= number or not started.running())
    assert started.running(), started.told()[-5000:]


def assert_saved(run: Path) -> int:
    """The step that was recorded last, which is in the newest checkpoint; nothing else is left."""
    last = steps_of(run)[-1]
    checkpoints = run / STAGE / "checkpoints"
    assert (checkpoints / "latest").read_text() == f"step-{last:06d}\n"
    found = sorted(path for path in checkpoints.iterdir() if path.is_dir())
    assert found[-1].name == f"step-{last:06d}"
    assert [path for path in found if path.name.startswith(".")] == []
    assert problems(found[-1]) == []
    return last


@pytest.mark.parametrize(
    ("number", "rank", "layout", "every"),
    [
        pytest.param(
            *stop,
            id=f"{stop[0].name}-rank{stop[1]}-{stop[2]}",
            marks=[pytest.mark.long] if n >= 2 else [],
        )
        for n, stop in enumerate(STOPS)
    ],
)
def test_a_signal_to_one_rank_stops_all(
    runs: Runs, number: signal.Signals, rank: int, layout: str, every: int
) -> None:
    more = (*LONG, f"{SAVES}.every_n_train_steps={every}")
    kind = f"{number.name}-{rank}"
    started, run = runs.start(kind, "dpo", layout, *more)
    in_step(run, 2, started)
    started.send(rank, number)
    assert started.statuses(PATIENCE_S) == [EXIT_STOPPED] * 2, started.told()[-5000:]
    last = assert_saved(run)
    assert 2 <= last < STEPS
    told = started.told()
    assert f"rank {rank} got {number.name}: stopping after this step" in told
    assert told.count("got SIG") == 1
    assert told.count(f"everything up to step {last} of policy is in") == 2
    resumed = runs.zygote.run(runs.arguments(kind, "dpo", layout, *more), 2)
    assert f"policy step {last}/" not in resumed.told(), "done again"
    kept = set(range(1, STEPS + 1)) if every else {last}
    assert differences(run, runs.whole("dpo", layout, *LONG), kept) == []


def test_one_request_that_comes_twice_counts_once(runs: Runs) -> None:
    started, run = runs.start("twice", "dpo", "tp2", *LONG)
    in_step(run, 1, started)
    for rank in (0, 1, 0, 1):  # as to a process and to its group
        started.send(rank, signal.SIGTERM)
    assert started.statuses(PATIENCE_S) == [EXIT_STOPPED] * 2, started.told()[-5000:]
    assert_saved(run)


def test_a_second_request_stops_at_once(runs: Runs) -> None:
    started, run = runs.start("at-once", "dpo", "tp2", *LONG)
    in_step(run, 1, started)
    started.send(1, signal.SIGSTOP)  # so that the first rank's step does not end
    started.send(0, signal.SIGTERM)
    eventually(lambda: "rank 0 got SIGTERM: stopping" in started.told())
    time.sleep(2.1)  # within two seconds it would count as the same request
    assert exists(started.pids[0])
    started.send(0, signal.SIGINT)
    eventually(lambda: not exists(started.pids[0]))
    started.send(1, signal.SIGKILL)  # as a launcher ends what outlasts a rank that failed
    assert started.statuses(PATIENCE_S) == [128 + signal.SIGINT, -signal.SIGKILL]
    assert "rank 0 got SIGINT again: stopping at once" in started.told()
    runs.zygote.run(runs.arguments("at-once", "dpo", "tp2", *LONG), 2)
    kept = set(range(1, STEPS + 1))
    assert differences(run, runs.whole("dpo", "tp2", *LONG), kept) == []


@pytest.mark.parametrize(
    ("case", "layout"), [pytest.param("spin", "dp2", marks=pytest.mark.long), ("sgpo", "tp2")]
)
def test_a_signal_before_the_first_step(runs: Runs, case: str, layout: str) -> None:
    """The first stage samples: the run stops in it or after it, and does not begin to train."""
    started, run = runs.start("sampling", case, layout)
    eventually(started.joined)
    started.send(1, signal.SIGUSR1)
    assert started.statuses(PATIENCE_S) == [EXIT_STOPPED] * 2, started.told()[-5000:]
    assert "rank 1 got SIGUSR1" in started.told()
    assert len([*run.glob("stages/*")]) <= 1
    runs.zygote.run(runs.arguments("sampling", case, layout), 2)
    assert differences(run, runs.whole(case, layout), {1, 2, 3}) == []


@pytest.mark.parametrize("layout", ["tp2", pytest.param("dp2", marks=pytest.mark.long)])
def test_a_signal_between_two_trainings(runs: Runs, layout: str) -> None:
    """After SGPO's improver is trained, it samples; what is trained is not trained again."""
    case, kind = "sgpo", f"between-{layout}"
    started, run = runs.start(kind, case, layout)
    done = run / "stages" / "05-improver" / "done.json"
    eventually(lambda: done.exists() or not started.running(), 2 * PATIENCE_S)
    started.send(0, signal.SIGTERM)
    assert started.statuses(PATIENCE_S) == [EXIT_STOPPED] * 2, started.told()[-5000:]
    trained = done.stat().st_mtime_ns
    runs.zygote.run(runs.arguments(kind, case, layout), 2)
    assert done.stat().st_mtime_ns == trained
    assert differences(run, runs.whole(case, layout), {1, 2, 3}) == []


# -- through the launcher --------------------------------------------------------------------------


class Launched:
    """`selfpref train trainer.devices=2` as a user types it, until it has done a step."""

    def __init__(self, runs: Runs, name: str) -> None:
        self.run, self.log = runs.folder / name / "dpo", runs.folder / f"{name}.log"
        more = (*ENDLESS, f"{SAVES}.every_n_train_steps=0")
        arguments = runs.arguments(name, "dpo", "tp2", *more)
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "nemo_selfpref.cli", *arguments],
                env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdout=log,
                stderr=log,
            )
        self.ranks: list[int] = []

    def trains(self) -> None:
        eventually(lambda: steps_of(self.run) or self.process.poll() is not None, 300)
        assert self.process.poll() is None, self.told()
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        self.ranks = [int(child) for child in children]
        assert len(self.ranks) == 2

    def told(self) -> str:
        return self.log.read_text(errors="replace")[-5000:]

    def gone(self) -> bool:
        return not any(map(exists, self.ranks))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def launched(runs: Runs, request: pytest.FixtureRequest) -> Iterator[Launched]:
    launched = Launched(runs, request.node.name.replace("[", "-").rstrip("]"))
    launched.trains()
    yield launched
    launched.close()


LAUNCHER_STOPS = [
    signal.SIGTERM,
    *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGUSR1, signal.SIGINT)),
]


@pytest.mark.parametrize("number", LAUNCHER_STOPS, ids=lambda n: n.name)
def test_a_signal_to_the_launcher_stops_the_run(launched: Launched, number: signal.Signals) -> None:
    launched.process.send_signal(number)
    assert launched.process.wait(PATIENCE_S) == EXIT_STOPPED, launched.told()
    assert launched.gone()
    assert_saved(launched.run)


def test_a_killed_rank_ends_the_others_and_the_launcher(launched: Launched) -> None:
    os.kill(launched.ranks[1], signal.SIGKILL)
    assert launched.process.wait(PATIENCE_S) == 128 + signal.SIGKILL, launched.told()
    assert launched.gone()


def test_a_killed_launcher_leaves_no_rank(launched: Launched) -> None:
    launched.process.kill()
    eventually(launched.gone)
