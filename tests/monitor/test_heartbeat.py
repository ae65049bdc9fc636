"""What a watching rank concludes from beats, by a clock of the test's; worlds of real processes are
in tests/faults/test_hangs.py."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nemo_selfpref.config.checks import check_config
from nemo_selfpref.config.schema import (
    DataConfig,
    ExpManagerConfig,
    HeartbeatConfig,
    RunConfig,
)
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.monitor import heartbeat
from nemo_selfpref.monitor.beats import (
    Beat,
    BeatFolder,
    main_frames,
    new_launch,
    process_state,
    waits_for_others,
)
from nemo_selfpref.monitor.hangs import Hang, Watch
from nemo_selfpref.monitor.heartbeat import Heart, mark, phase, tick

IN_COLLECTIVE = ("/lib/torch/distributed/distributed_c10d.py:2810 all_reduce",)


def beat(rank: int, number: int = 1, **changes: object) -> Beat:
    plain = Beat(
        rank=rank,
        host="here",
        pid=1000 + rank,
        time=0.0,
        number=number,
        marks=10,
        ticks=0,
        phase="step 3",
        timeout_s=None,
        still_s=0.0,
        waiting=False,
        frames=(f"own.py:{rank} f",),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def watch(rank: int = 0, size: int = 3) -> Watch:
    """Slow after 10 s, hung after 40; begun at second 0."""
    return Watch(rank, size, "there", slow_after_s=10.0, hang_timeout_s=40.0, now=0.0)


def stuck(hang: Hang | None) -> list[int]:
    return [] if hang is None else [s.rank for s in hang.stuck]


def all_still(watch: Watch, now: float, *beats: Beat) -> list[int]:
    """Who is to blame where all ranks beat at `now` and none has moved for 40 s."""
    for b in beats:
        watch.see(b.rank, replace(b, number=b.number + int(now), still_s=40.0), now)
    return stuck(watch.find_hang(now))


# -- beats that stop ----------------------------------------------------------------------------


def beats_of_two_in_three(watch: Watch, until: int) -> None:
    """Rank 2's number stays at 1."""
    for now in range(until + 1):
        for rank in range(3):
            watch.see(rank, beat(rank, number=1 if rank == 2 else now + 1), float(now))


def test_a_rank_whose_number_stays_hangs_at_the_timeout_and_not_before() -> None:
    w = watch()
    beats_of_two_in_three(w, 39)
    assert w.find_hang(39.9) is None
    beats_of_two_in_three(w, 40)
    hang = w.find_hang(40.0)
    assert stuck(hang) == [2]
    assert hang is not None and [b.rank for b in hang.waiting] == [0, 1]
    assert "rank 2 (host here, pid 1002) has not been heard of for 40.0 s" in hang.message()
    assert ", in phase 'step 3'\n    at own.py:2 f\n" in hang.message()


def test_what_a_file_says_of_the_time_does_not_matter() -> None:
    w = watch()
    for now in range(100):
        for rank in range(3):
            w.see(rank, beat(rank, number=now, time=1e9 * rank - now), float(now))
    assert w.find_hang(99.5) is None


def test_a_rank_that_never_came_is_named() -> None:
    w = watch(size=2)
    for now in range(41):
        w.see(0, beat(0, number=now), float(now))
    hang = w.find_hang(40.0)
    assert hang is not None
    assert "rank 1 has not been heard of at all, for 40.0 s" in hang.message()


def test_a_rank_that_cannot_look_accuses_itself_alone() -> None:
    w = watch()
    for rank in range(3):
        w.see(rank, beat(rank), 0.0)
    assert w.find_hang(39.0) is None
    assert list(w.news(39.0)) == []
    hang = w.find_hang(40.0)
    assert stuck(hang) == [0]
    assert hang is not None and "could not write or read heartbeats for 40.0 s" in hang.message()


def test_a_disk_that_was_full_starts_all_measurements_anew() -> None:
    w = watch()
    beats_of_two_in_three(w, 30)
    w.restart(30.0)
    w.see(0, beat(0, number=99), 69.0)
    assert w.find_hang(69.0) is None
    w.see(0, beat(0, number=100), 70.0)
    assert stuck(w.find_hang(70.0)) == [1, 2]


def test_ranks_behind_the_third_watch_the_first_three_and_themselves() -> None:
    w = watch(rank=7, size=1000)
    assert sorted(w.seen) == [0, 1, 2, 7]
    assert sorted(watch(rank=2, size=1000).seen) == list(range(1000))
    # It sees too little to say who made no progress, but a watcher that is gone it sees.
    assert all_still(w, 5.0, *(beat(rank) for rank in (0, 1, 2, 7))) == []
    for now in range(6, 50):
        for rank in (0, 1, 7):
            w.see(rank, beat(rank, number=100 + now), float(now))
    assert stuck(w.find_hang(49.0)) == [2]


# -- ranks that beat and do not move ------------------------------------------------------------


def test_nobody_is_to_blame_while_anybody_moves() -> None:
    w = watch()
    assert all_still(w, 5.0, beat(0), beat(1)) == []  # rank 2 has not come yet
    w.see(2, beat(2, still_s=39.0), 5.0)
    assert w.find_hang(5.9) is None
    assert stuck(w.find_hang(6.0)) != []


def test_fewest_marks_are_to_blame() -> None:
    assert all_still(watch(), 5.0, beat(0, marks=11), beat(1), beat(2, marks=11)) == [1]


def test_ticks_are_no_reason_to_blame() -> None:
    ranks = all_still(watch(), 5.0, beat(0, ticks=50), beat(1, ticks=3), beat(2, ticks=9))
    assert ranks == [0, 1, 2]


def test_who_waits_in_a_collective_is_not_to_blame() -> None:
    waits = {"waiting": True, "frames": IN_COLLECTIVE}
    assert all_still(watch(), 5.0, beat(0, marks=12), beat(1, **waits), beat(2, **waits)) == [0]


def test_where_all_wait_the_one_elsewhere_is_to_blame() -> None:
    waits = {"waiting": True, "frames": IN_COLLECTIVE}
    elsewhere = {"waiting": True, "frames": ("/lib/torch/distributed/x.py:7 broadcast",)}
    ranks = all_still(watch(), 5.0, beat(0, **waits), beat(1, **elsewhere), beat(2, **waits))
    assert ranks == [1]
    assert all_still(watch(size=2), 5.0, beat(0, **waits), beat(1, **elsewhere)) == [0, 1]


def test_a_rank_that_left_is_to_blame_and_only_where_others_stand() -> None:
    w = watch()
    for now in range(50):
        for rank in range(2):
            w.see(rank, beat(rank, number=now), float(now))
        w.see(2, beat(2) if now == 0 else None, float(now))
    assert w.find_hang(49.0) is None
    assert all_still(w, 50.0, beat(0), beat(1)) == [2]


def test_the_longest_time_that_a_phase_claims_counts_for_all() -> None:
    w = watch()
    assert all_still(w, 5.0, beat(0, timeout_s=100.0), beat(1), beat(2)) == []
    for rank in range(3):
        claim = 100.0 if rank == 0 else None
        w.see(rank, beat(rank, number=999, still_s=100.0, timeout_s=claim), 6.0)
    hang = w.find_hang(6.0)
    assert hang is not None and hang.limit_s == 100.0


def test_a_claim_does_not_excuse_a_rank_that_does_not_beat() -> None:
    w = watch(size=2)
    for now in range(41):
        w.see(0, beat(0, number=now), float(now))
        w.see(1, beat(1, timeout_s=100.0), float(now))
    assert stuck(w.find_hang(40.0)) == [1]


# -- slow ones ----------------------------------------------------------------------------------


def test_a_slow_rank_is_named_once_and_again_when_it_goes_on() -> None:
    w = watch()
    told: list[str] = []
    for now in range(31):
        for rank in range(3):
            number = now if rank != 1 or not 5 <= now < 20 else 4
            w.see(rank, beat(rank, number=number), float(now))
        told += w.news(float(now))
    assert len(told) == 2  # its last beat came at 4 s
    assert told[0].startswith("slow: rank 1 (host here, pid 1001) has not been heard of for 10.0 s")
    assert told[0].endswith("going on; after 40 s the run ends")
    assert told[1] == "rank 1 (host here, pid 1001) goes on after standing still for 16.0 s"


def test_one_other_rank_tells_of_a_slow_one() -> None:
    for slow in range(3):
        tellers = []
        for rank in range(3):
            w = watch(rank)
            for now in range(12):
                for r in range(3):
                    w.see(r, beat(r, number=1 if r == slow else now), float(now))
            tellers += [rank] * len(list(w.news(11.0)))
        others = [rank for rank in range(3) if rank != slow]
        assert [t for t in tellers if t != slow] == others[:1]


def test_a_rank_that_all_wait_for_is_slow_and_one_that_waits_is_not() -> None:
    w = watch()
    for rank in range(3):
        w.see(rank, beat(rank, still_s=0.0 if rank == 0 else 500.0), 1.0)
    assert list(w.news(1.0)) == []
    waits = {"waiting": True, "frames": IN_COLLECTIVE}
    for rank in range(3):
        w.see(rank, beat(rank, number=2, still_s=10.0, **({} if rank == 2 else waits)), 2.0)
    (line,) = w.news(2.0)
    assert "slow: rank 2 (host here, pid 1002) has made no progress for 10.0 s" in line


def test_a_phase_with_a_timeout_of_its_own_is_not_slow() -> None:
    w = watch(size=1)
    w.see(0, beat(0, still_s=30.0, timeout_s=100.0), 1.0)
    assert list(w.news(1.0)) == []


# -- the folder ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> BeatFolder:
    folder = BeatFolder(tmp_path / "heartbeat", new_launch())
    folder.open(0)
    return folder


def test_a_beat_is_read_back_as_it_was_written(folder: BeatFolder) -> None:
    assert folder.read(3) is None
    folder.write(beat(3, frames=IN_COLLECTIVE, timeout_s=2.5))
    assert folder.read(3) == beat(3, frames=IN_COLLECTIVE, timeout_s=2.5)
    (path,) = folder.path.iterdir()
    assert path.name == "rank-00003.json"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"rank": 3}'])
def test_what_is_no_beat_is_said_to_be_none(folder: BeatFolder, text: str) -> None:
    (folder.path / "rank-00003.json").write_text(text)
    with pytest.raises(OSError, match=r"rank-00003\.json is no heartbeat"):
        folder.read(3)


def test_only_the_last_to_leave_takes_the_folder_away(folder: BeatFolder) -> None:
    for rank in range(2):
        folder.write(beat(rank))
    folder.leave(0)
    assert folder.read(1) is not None
    folder.leave(1)
    assert not folder.root.exists()


def test_only_the_first_report_counts_and_it_stays(folder: BeatFolder) -> None:
    folder.write(beat(0))
    assert folder.tell(0, {"limit_s": 1.0})
    assert not folder.tell(1, {"limit_s": 2.0})
    folder.leave(0)
    assert json.loads(folder.report.read_text()) == {"found_by": 0, "limit_s": 1.0}


def test_the_first_rank_clears_away_what_others_launches_left(folder: BeatFolder) -> None:
    folder.write(beat(1))
    folder.tell(1, {})
    later = BeatFolder(folder.root, "later")
    later.open(1)
    assert folder.read(1) is not None
    later.open(0)
    assert folder.read(1) is None and folder.report.exists()


def test_stacks_of_all_threads(folder: BeatFolder) -> None:
    assert not folder.has_stacks(2)
    folder.dump_stacks(2)
    assert folder.has_stacks(2)
    text = (folder.stacks / "rank-00002.txt").read_text()
    assert "test_stacks_of_all_threads" in text


def test_frames_are_those_of_the_main_thread() -> None:
    found: list[tuple[str, ...]] = []
    thread = threading.Thread(target=lambda: found.append(main_frames()))
    thread.start()
    thread.join()
    assert any("test_frames_are_those_of_the_main_thread" in frame for frame in found[0])
    assert not waits_for_others(found[0]) and waits_for_others(IN_COLLECTIVE)
    assert not waits_for_others(("own.py:1 f", *IN_COLLECTIVE)) and not waits_for_others(())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_system_is_asked_of_processes_on_this_host_only() -> None:
    host = socket.gethostname()
    gone = replace(beat(0, pid=2**30), host=host)
    assert process_state(gone, host) == "the process is gone"
    assert process_state(gone, "elsewhere") == ""
    assert process_state(replace(gone, pid=os.getpid()), host) == ""


# -- marks --------------------------------------------------------------------------------------


def settings(tmp_path: Path) -> Heart:
    return Heart(
        tmp_path / "heartbeat",
        "launch",
        rank=0,
        world_size=1,
        every_s=0.02,
        slow_after_s=60.0,
        hang_timeout_s=600.0,
        say=lambda text: None,
    )


@pytest.fixture
def heart(tmp_path: Path) -> Iterator[Heart]:
    with settings(tmp_path) as heart:
        yield heart
    assert not (tmp_path / "heartbeat").exists()


def newest(heart: Heart, phase: str) -> Beat:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (found := heart.folder.read(0)) is not None and found.phase == phase:
            return found
        time.sleep(0.005)
    raise AssertionError(f"no beat in phase {phase}")


def test_beats_tell_of_marks(heart: Heart) -> None:
    assert newest(heart, "starting").marks == 0
    mark("step 1")
    assert newest(heart, "step 1").marks == 1
    with phase("waiting", 3.0):
        tick()
        inner = newest(heart, "waiting")
    assert (inner.marks, inner.ticks, inner.timeout_s) == (2, 1, 3.0)
    outer = newest(heart, "step 1")
    assert (outer.marks, outer.ticks, outer.timeout_s) == (3, 1, None)
    assert outer.number > inner.number and outer.pid == os.getpid()


def test_a_phase_that_fails_is_left(heart: Heart) -> None:
    mark("step 1")
    with pytest.raises(ValueError), phase("waiting", 3.0):
        raise ValueError
    assert newest(heart, "step 1").timeout_s is None


def test_without_a_heart_marks_do_nothing(tmp_path: Path) -> None:
    mark("a")
    tick()
    with phase("b"):
        pass
    with settings(tmp_path) as heart:
        assert newest(heart, "starting").marks == 0
    assert heartbeat._pulse is None


def test_a_folder_that_cannot_be_used_is_told_of_once_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").write_text("a file")
    told: list[str] = []
    heart = settings(tmp_path)
    heart._say = told.append
    with heart:
        end = time.monotonic() + 60
        while heart._number < 1 and not told and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(0.2)  # some beats more, which may not say it again
    cannot = [line for line in told if "rank 0 cannot keep its heartbeat, and goes on" in line]
    assert len(cannot) == 1
    assert (tmp_path / "heartbeat").read_text() == "a file"


# -- settings -----------------------------------------------------------------------------------


def checked(**values: float) -> None:
    manager = ExpManagerConfig(heartbeat=HeartbeatConfig(**values))
    check_config(
        RunConfig(name="test", data=DataConfig(train_path=["a.jsonl"]), exp_manager=manager)
    )


def test_settings_that_pass() -> None:
    checked()
    checked(hang_timeout_s=0)
    checked(every_s=1.0, slow_after_s=3.0, hang_timeout_s=12.0)
    assert set(asdict(HeartbeatConfig())) == {"every_s", "slow_after_s", "hang_timeout_s"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hang_timeout_s": -1.0}, r"hang_timeout_s=-1.0: expected 0 \(off\) or seconds above it"),
        ({"hang_timeout_s": float("inf")}, "hang_timeout_s=inf: expected"),
        ({"hang_timeout_s": float("nan")}, "hang_timeout_s=nan: expected"),
        ({"hang_timeout_s": 400.0}, "slow_after_s=120.0: expected more than 0 and at most a quart"),
        ({"slow_after_s": 0.0}, "slow_after_s=0.0: expected more than 0"),
        ({"every_s": 41.0}, "every_s=41.0: expected more than 0 and at most a third of slow_after"),
        ({"every_s": 0.0}, "every_s=0.0: expected more than 0"),
        ({"hang_timeout_s": 0.0, "every_s": 5.0}, "do nothing with hang_timeout_s=0. Leave them"),
    ],
)
def test_settings_that_make_no_sense(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(**values)
