"""Every change of a sealed folder is found, and the file named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_selfpref.checkpoint.seal import SEAL, is_sealed, problems, read_seal, seal, sum_of
from nemo_selfpref.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "weights").mkdir(parents=True)
    (made / "facts.json").write_text("{}\n")
    (made / "weights" / "a.bin").write_bytes(bytes(range(200)))
    (made / "weights" / "b.bin").write_bytes(bytes(range(1, 201)))
    (made / ".nfs0001").write_text("the file system's")
    seal(made)
    return made


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_whole_folder(folder: Path) -> None:
    assert problems(folder) == []
    assert sorted(read_seal(folder)) == ["facts.json", "weights/a.bin", "weights/b.bin"]
    assert read_seal(folder)["facts.json"] == sum_of(folder / "facts.json")
    assert is_sealed(folder) and not is_sealed(folder / "weights")


def swap(folder: Path) -> None:
    a, b = (folder / "weights" / name for name in ("a.bin", "b.bin"))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


@pytest.mark.parametrize(
    ("harm", "want"),
    [
        (lambda f: flip(f / "weights" / "a.bin"), [r"weights/a.bin is damaged: SHA-256 "]),
        (lambda f: (f / "facts.json").write_text(""), ["facts.json is damaged: 0 bytes"]),
        (lambda f: (f / "weights" / "b.bin").unlink(), ["weights/b.bin is missing"]),
        (lambda f: (f / "weights" / "c.bin").touch(), ["weights/c.bin does not belong there"]),
        (swap, ["weights/a.bin is damaged", "weights/b.bin is damaged"]),
        (lambda f: (f / SEAL).unlink(), [f"{SEAL} is missing"]),
        (lambda f: flip(f / SEAL), [f"{SEAL} "]),
        (lambda f: (f / SEAL).write_text("[1]"), [f"{SEAL} is damaged"]),
    ],
)
def test_harm_is_named(folder: Path, harm: Callable[[Path], None], want: list[str]) -> None:
    harm(folder)
    found = problems(folder)
    assert len(found) == len(want)
    assert all(text in line for line, text in zip(found, want, strict=True)), found


def test_a_changed_sum_is_found_by_the_sum_of_sums(folder: Path) -> None:
    # Somebody mends a file and its own sum, but not the seal over all of them.
    flip(folder / "weights" / "a.bin")
    saved = json.loads((folder / SEAL).read_text())
    saved["sha256"]["weights/a.bin"] = sum_of(folder / "weights" / "a.bin")[0]
    (folder / SEAL).write_text(json.dumps(saved))
    assert problems(folder) == [f"{folder / SEAL} is damaged: its own sum differs"]
    with pytest.raises(CheckpointError, match="its own sum differs"):
        read_seal(folder)


def test_each_part_looks_at_its_own_files(folder: Path) -> None:
    swap(folder)
    shares = [problems(folder, part, 2) for part in range(2)]
    assert all(len(share) == 1 for share in shares)
    assert sorted(shares[0] + shares[1]) == problems(folder)


def test_known_sums_are_taken_over(folder: Path) -> None:
    seal(folder, {"facts.json": ("0" * 64, 3)})
    (found,) = problems(folder)
    assert "SHA-256" in found and "the manifest says 000000000000" in found
