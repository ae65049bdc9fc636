"""docs/security.md names the tests that show what it says, and they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = {*re.findall(r"`(tests/[\w/]+\.py)`", TEXT)}


def test_every_test_it_names_is_there() -> None:
    assert len(NAMED) > 12
    assert [name for name in sorted(NAMED) if not (ROOT / name).is_file()] == []


def test_it_names_every_test_of_this_folder() -> None:
    own = {f"tests/security/{p.name}" for p in Path(__file__).parent.glob("test_*.py")}
    assert own - NAMED == {"tests/security/test_document.py"}


def test_each_threat_has_an_answer_and_a_test() -> None:
    table = TEXT.split("| threat |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) > 15
    for row in table:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert len(cells) == 3 and all(cells) and "tests/" in cells[2], row
