from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import (
    new_folder,
    publish_folder,
    read_json,
    sha256_of,
    write_json,
    write_text,
)


def test_text_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "notes.txt"
    write_text(path, "old")
    write_text(path, "new\u00e9\n")
    assert path.read_bytes() == b"new\xc3\xa9\n"
    assert os.listdir(path.parent) == ["notes.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of it, then \ud800")
    assert read_json(path) == {"a": 1}


def test_a_write_cut_short_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}


def test_json_as_written(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": [1, None], "a": "t"})
    want = '{\n  "a": "t",\n  "b": [\n    1,\n    null\n  ]\n}\n'
    assert (tmp_path / "x.json").read_text() == want


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.json is missing: the folder is incomplete"):
        read_json(tmp_path / "gone.json")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b""])
def test_broken_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.json cannot be read as JSON: "):
        read_json(path)


def test_json_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_json(tmp_path)


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(path) == want


def test_a_folder_takes_its_name_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "out" / "model"
    with new_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert os.listdir(target.parent) == ["model"]


def test_a_failing_block_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with new_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), new_folder(target) as folder:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_publishing_replaces_the_old_folder_whole(tmp_path: Path) -> None:
    target, temporary = tmp_path / "model", tmp_path / ".model.tmp"
    for folder, name in ((target, "old"), (temporary, "new")):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / name).write_text(name)
    publish_folder(temporary, target)
    assert os.listdir(target / "sub") == ["new"]
    assert os.listdir(tmp_path) == ["model"]


def test_leftovers_of_a_crash_do_not_get_in(tmp_path: Path) -> None:
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "half").write_text("x")
    (tmp_path / ".model.old").mkdir()
    with new_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
    assert os.listdir(tmp_path / "model") == ["a"]
    assert os.listdir(tmp_path) == ["model"]
