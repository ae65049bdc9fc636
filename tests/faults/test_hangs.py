"""Worlds of real processes, one of which is stopped, sleeps, or touches a dead file system."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import save_llama

from nemo_selfpref.errors import EXIT_HUNG

RANK = Path(__file__).parent / "hanging_rank.py"
HANG_S = 2.0


def eventually(reached: Callable[[], Any], within_s: float = 60.0) -> Any:
    end = time.monotonic() + within_s
    while not (found := reached()):
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.02)
    return found


class World:
    """Ranks with their terminals in files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranks: list[subprocess.Popen[bytes]] = []

    def start(
        self, size: int, mode: str = "-", steps: int = 10_000, hang_s: float = HANG_S
    ) -> World:
        for rank in range(size):
            arguments = map(str, (RANK, self.folder, rank, size, hang_s, steps, mode))
            self.spawn([sys.executable, *arguments], {})
        return self

    def spawn(self, command: list[str], environment: dict[str, str]) -> None:
        with open(self.folder / f"stderr-{len(self.ranks)}", "wb") as stderr:
            self.ranks.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                    stdout=stderr,
                    stderr=stderr,
                )
            )

    def told(self) -> str:
        """What all ranks said."""
        files = sorted(self.folder.glob("stderr-*"))
        return "".join(file.read_text(errors="replace") for file in files)

    def reached(self, step: int, rank: int) -> None:
        eventually((self.folder / f"{step}-{rank}").exists)

    def stop(self, rank: int) -> None:
        self.ranks[rank].send_signal(signal.SIGSTOP)

    def ends(self, *ranks: int) -> list[int]:
        return [self.ranks[rank].wait(60) for rank in ranks]

    def report(self) -> dict[str, Any]:
        (path,) = (self.folder / "heartbeat").glob("*/hang.json")
        return json.loads(path.read_text())

    def stacks(self) -> dict[str, str]:
        files = (self.folder / "heartbeat").glob("*/stacks/*.txt")
        return {file.stem: file.read_text() for file in files}

    def close(self) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def only_stuck(world: World, rank: int) -> dict[str, Any]:
    """The report's only culprit, which has to be `rank`, found in time."""
    (stuck,) = world.report()["stuck"]
    assert stuck["rank"] == rank, world.told()
    assert HANG_S <= stuck["still_s"] <= 1.5 * HANG_S
    assert world.told().count("the run hangs") == 1
    return stuck


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_and_the_others_end(world: World, rank: int) -> None:
    world.start(3).reached(5, rank)
    world.stop(rank)
    others = [r for r in range(3) if r != rank]
    assert world.ends(*others) == [EXIT_HUNG] * 2
    stuck, pid = only_stuck(world, rank), world.ranks[rank].pid
    assert stuck["beat"]["pid"] == pid
    assert f"rank {rank} (host {stuck['beat']['host']}, pid {pid}) has not been" in world.told()
    assert "the process is stopped (SIGSTOP), in phase '" in world.told()
    assert any("hanging_rank.py:" in frame for frame in stuck["beat"]["frames"])
    assert {f"rank-{r:05d}" for r in others} == set(world.stacks())
    assert all("meet_the_others" in text for text in world.stacks().values())
    world.ranks[rank].send_signal(signal.SIGCONT)
    assert world.ends(rank) == [EXIT_HUNG], "it reads the report, and does not go on alone"


def test_ranks_that_do_not_watch_everybody_end_too(world: World) -> None:
    world.start(5).reached(5, 4)
    world.stop(3)
    assert world.ends(0, 1, 2, 4) == [EXIT_HUNG] * 4
    only_stuck(world, 3)
    assert len(world.stacks()) == 4


def test_a_rank_asleep_in_python_is_named_by_its_progress(world: World) -> None:
    assert world.start(3, "sleeps:1").ends(0, 1, 2) == [EXIT_HUNG] * 3
    stuck = only_stuck(world, 1)
    assert stuck["beat"]["phase"] == "step 3"
    assert stuck["beat"]["frames"][0].endswith("sleeps_in_python")
    assert "has made no progress for" in world.told()
    assert "ranks waiting meanwhile: 0 in 'end of step 3', 2 in 'end of step 3'" in world.told()
    assert "sleeps_in_python" in world.stacks()["rank-00001"]


@pytest.mark.slow
def test_a_rank_that_others_wait_for_in_a_collective_is_named(world: World) -> None:
    """All came to as many marks: what tells them apart is where they are."""
    assert world.start(3, "collective:2").ends(0, 1, 2) == [EXIT_HUNG] * 3
    assert only_stuck(world, 2)["beat"]["frames"][0].endswith("sleeps_in_python")
    waiting = world.report()["waiting"]
    assert [beat["waiting"] for beat in waiting] == [True, True]
    assert {beat["marks"] for beat in waiting} == {world.report()["stuck"][0]["beat"]["marks"]}
    assert all(beat["frames"][0].endswith("all_reduce") for beat in waiting)


def test_a_rank_that_holds_the_interpreter_is_named(world: World) -> None:
    world.start(3, "holds:2").reached(2, 2)
    assert world.ends(0, 1) == [EXIT_HUNG] * 2
    assert any("hanging_rank.py:" in frame for frame in only_stuck(world, 2)["beat"]["frames"])
    assert "has not been heard of" in world.told()
    assert "SIGSTOP" not in world.told()
    assert world.ranks[2].poll() is None, "its launcher ends it"


def test_a_rank_that_left_is_what_the_others_wait_for(world: World) -> None:
    assert world.start(3, "leaves:1").ends(0, 1, 2) == [EXIT_HUNG, 0, EXIT_HUNG]
    assert "has ended its run while the others go on" in world.told()
    assert [stuck["rank"] for stuck in world.report()["stuck"]] == [1]


def test_a_single_rank_names_itself(world: World) -> None:
    assert world.start(1, "sleeps:0").ends(0) == [EXIT_HUNG]
    assert only_stuck(world, 0)["beat"]["frames"][0].endswith("sleeps_in_python")


def test_a_rank_whose_file_system_is_dead_names_itself(world: World) -> None:
    # Whoever opens a pipe without another end waits, as on a server that does not answer.
    (world.folder / "heartbeat" / "launch").mkdir(parents=True)
    os.mkfifo(world.folder / "heartbeat" / "launch" / "rank-00001.json")
    world.start(2)
    world.ranks[1].kill()
    assert world.ends(0) == [EXIT_HUNG]
    assert f"pid {world.ranks[0].pid}) could not write or read heartbeats" in world.told()
    assert "its file system hangs" in world.told()


def test_a_rank_stopped_for_a_while_is_named_and_the_run_goes_on(world: World) -> None:
    world.start(3, steps=40, hang_s=10.0).reached(5, 1)
    world.stop(1)
    who = f"rank 1 (host {socket.gethostname()}, pid {world.ranks[1].pid})"
    eventually(lambda: f"slow: {who} has not been heard of for" in world.told())
    world.ranks[1].send_signal(signal.SIGCONT)
    assert world.ends(0, 1, 2) == [0, 0, 0]
    assert f"{who} goes on after standing still for" in world.told()
    assert world.told().count("slow: rank 1") == 1
    assert not (world.folder / "heartbeat").exists()


def test_a_whole_world_stopped_for_long_goes_on(world: World) -> None:
    world.start(3, steps=40).reached(5, 1)
    for rank in range(3):
        world.stop(rank)
    time.sleep(1.5 * HANG_S)  # what is tested is this time itself: none of it may count
    for process in world.ranks:
        process.send_signal(signal.SIGCONT)
    assert world.ends(0, 1, 2) == [0, 0, 0], world.told()


def test_a_phase_may_take_longer_than_the_timeout(world: World) -> None:
    assert world.start(3, "long", steps=6).ends(0, 1, 2) == [0, 0, 0], world.told()
    assert not (world.folder / "heartbeat").exists()


def test_what_an_earlier_launch_left_is_no_rank_of_this_one(world: World) -> None:
    old = world.folder / "heartbeat" / "earlier"
    old.mkdir(parents=True)
    (old / "rank-00001.json").write_text("{}")
    reported = world.folder / "heartbeat" / "hung"
    reported.mkdir()
    (reported / "rank-00002.json").write_text("{}")
    (reported / "hang.json").write_text("{}")
    assert world.start(3, steps=20).ends(0, 1, 2) == [0, 0, 0], world.told()
    left = [str(p.relative_to(reported.parent)) for p in reported.parent.rglob("*")]
    assert sorted(left) == ["hung", "hung/hang.json"]


# -- a training ---------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_training_names_the_rank_that_was_stopped(world: World) -> None:
    folder = world.folder
    rows = [{"prompt": f"{n}?", "chosen": "Yes. " * 3, "rejected": "No."} for n in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        *("train", "--config-name", "dpo", "name=run", f"exp_manager.exp_dir={folder}"),
        *("exp_manager.create_tensorboard_logger=false", "trainer.devices=2"),
        *(f"model.restore_from_path={save_llama(folder / 'llama')}", "trainer.max_epochs=10000"),
        *(f"data.train_path=[{folder / 'pairs.jsonl'}]", "data.max_length=64"),
        *("data.max_prompt_length=32", "model.global_batch_size=8", "model.micro_batch_size=2"),
        *("exp_manager.heartbeat.hang_timeout_s=8", "exp_manager.heartbeat.slow_after_s=2"),
        "exp_manager.heartbeat.every_s=0.5",
    ]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in ("0", "1"):
        command = [sys.executable, "-m", "nemo_selfpref.cli", *arguments]
        own = {"RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": ""}
        world.spawn(command, {**shared, **own})
    metrics = "stages/*-policy/metrics.jsonl"

    def trains() -> bool:
        assert all(process.poll() is None for process in world.ranks), world.told()
        return any(path.stat().st_size for path in (folder / "run").glob(metrics))

    eventually(trains, 120)
    world.stop(1)
    assert world.ends(0) == [EXIT_HUNG], world.told()
    assert f"pid {world.ranks[1].pid}) has not been heard of" in world.told()
    assert "the process is stopped (SIGSTOP)" in world.told()
    (report,) = (folder / "run" / "heartbeat").glob("*/hang.json")
    assert [s["rank"] for s in json.loads(report.read_text())["stuck"]] == [1]
