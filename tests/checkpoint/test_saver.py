"""Saving while something else goes on, and what becomes of a save that fails."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from nemo_selfpref.checkpoint.saver import SavePolicy, Saver, problems_together, save_now
from nemo_selfpref.checkpoint.seal import problems
from nemo_selfpref.checkpoint.snapshot import Snapshot
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import read_json
from nemo_selfpref.megatron.policy import Policy

CPU = torch.device("cpu")


class Said:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, text: str) -> None:
        self.lines.append(text)


def holding(value: int) -> Snapshot:
    snapshot = Snapshot()
    snapshot.add_json("value.json", value)
    return snapshot


def failing(error: OSError) -> Snapshot:
    def write(_: Path) -> None:
        raise error

    snapshot = holding(0)
    snapshot.add_file("late.bin", write)
    return snapshot


FULL = OSError(28, "No space left on device")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def joined(policy: Policy) -> None:
    """The process group, which the policy has joined."""


def test_saving_at_once(tmp_path: Path) -> None:
    save_now(tmp_path / "a", holding(3), CPU)
    assert read_json(tmp_path / "a" / "value.json") == 3
    assert names(tmp_path) == ["a"] and problems_together(tmp_path / "a", CPU) == []


def test_a_folder_made_by_a_writer_is_sealed_whole(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.mkdir()
        (path / "one.txt").write_text("1")
        (path / "two.txt").write_text("2")

    snapshot = holding(1)
    snapshot.add_file("tokenizer", write)
    save_now(tmp_path / "a", snapshot, CPU)
    (tmp_path / "a" / "tokenizer" / "two.txt").write_text("3")
    assert problems(tmp_path / "a")[0].startswith(str(tmp_path / "a" / "tokenizer" / "two.txt"))


def test_what_was_there_stays_where_a_save_fails(tmp_path: Path) -> None:
    save_now(tmp_path / "a", holding(3), CPU)
    with pytest.raises(CheckpointError, match=r"a could not be written: rank 0: .*No space left"):
        save_now(tmp_path / "a", failing(FULL), CPU)
    assert read_json(tmp_path / "a" / "value.json") == 3 and names(tmp_path) == ["a"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"could not be written: .*Not a directory"):
        save_now(tmp_path / "file" / "a", holding(1), CPU)


def test_the_trainer_goes_on_while_a_thread_writes(tmp_path: Path) -> None:
    may_end, published = threading.Event(), []
    snapshot = holding(5)

    def write(path: Path) -> None:
        assert may_end.wait(30)
        path.write_text("slow")

    snapshot.add_file("slow.txt", write)
    saver = Saver(CPU, SavePolicy(), Said(), published.append)
    saver.begin(tmp_path / "a", snapshot)
    assert saver.busy and saver.waiting and names(tmp_path) == [".a.tmp"]
    may_end.set()
    assert saver.finish() and not saver.waiting
    assert published == [tmp_path / "a"] and problems(tmp_path / "a") == []
    saver.close()


def test_one_save_ends_before_the_next_begins(tmp_path: Path) -> None:
    published: list[Path] = []
    saver = Saver(CPU, SavePolicy(), Said(), published.append)
    for number in range(3):
        saver.begin(tmp_path / str(number), holding(number))
        assert len(published) == number
    saver.finish()
    assert [read_json(path / "value.json") for path in published] == [0, 1, 2]
    saver.close()


@pytest.mark.parametrize("background", [False, True])
def test_failed_saves_are_told_of_and_bounded(tmp_path: Path, background: bool) -> None:
    said = Said()
    saver = Saver(CPU, SavePolicy(background, failures_allowed=2), said)
    saver.begin(tmp_path / "1", holding(1))
    for number in (2, 3):
        saver.begin(tmp_path / str(number), failing(FULL))
        assert not saver.finish()
    assert len(said.lines) == 2
    assert "rank 0: [Errno 28] No space left on device" in said.lines[1]
    assert f"the newest whole one is {tmp_path / '1'}. Training goes on." in said.lines[1]
    saver.begin(tmp_path / "4", holding(4))
    assert saver.finish()
    for number in (5, 6):
        saver.begin(tmp_path / str(number), failing(FULL))
        saver.finish()
    with pytest.raises(CheckpointError, match=r"7 could not be written: .* Free some space"):
        saver.begin(tmp_path / "7", failing(FULL))
        saver.finish()
    assert names(tmp_path) == ["1", "4"]
    saver.close()


def test_none_was_saved_before(tmp_path: Path) -> None:
    said = Said()
    saver = Saver(CPU, SavePolicy(False, 1), said)
    saver.begin(tmp_path / "1", failing(FULL))
    assert "none was saved before it. Training goes on." in said.lines[0]


def test_a_save_is_good_where_only_the_tidying_fails(tmp_path: Path) -> None:
    def tidy(_: Path) -> None:
        raise OSError(30, "Read-only file system")

    said = Said()
    saver = Saver(CPU, SavePolicy(False), said, tidy)
    saver.begin(tmp_path / "1", holding(1))
    assert saver.finish() and problems(tmp_path / "1") == []
    assert "is saved, but what lies beside it is not in order" in said.lines[0]


def test_a_save_left_behind_has_no_name(tmp_path: Path) -> None:
    saver = Saver(CPU, SavePolicy(), Said())
    saver.begin(tmp_path / "a", holding(1))
    saver.close()
    assert names(tmp_path) == [".a.tmp"] and not saver.waiting
