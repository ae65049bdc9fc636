from __future__ import annotations

from collections.abc import Sequence

import pytest

from nemo_selfpref.data.chat import (
    Control,
    Slot,
    build_skeleton,
    control_pattern,
    safe_pieces,
    split_controls,
)
from nemo_selfpref.errors import DataError
from nemo_selfpref.types import Message

PATTERN = control_pattern(["<u>", "<e>", "<ee>"])


def plain(messages: Sequence[Message]) -> str:
    return "".join(f"<u>{m['role']}: {m['content']}<e>\n" for m in messages)


def stripping(messages: Sequence[Message]) -> str:
    return "".join(f"<u> {m['content'].rstrip()} <e>" for m in messages)


def shouting(messages: Sequence[Message]) -> str:
    return "".join(f"<u>{m['content'].upper()}<e>" for m in messages)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def test_split_controls_takes_the_longest_token() -> None:
    pieces = split_controls("a<ee>b<e><e>", PATTERN)
    assert pieces == ["a", Control("<ee>"), "b", Control("<e>"), Control("<e>")]
    assert split_controls("<x>", control_pattern([])) == ["<x>"]


def test_skeleton_tells_template_from_data() -> None:
    skeleton = build_skeleton(plain, ("user", "assistant"), PATTERN)
    assert skeleton.parts == (
        Control("<u>"),
        "user: ",
        Slot(0, strip_left=False, strip_right=False),
        Control("<e>"),
        "\n",
        Control("<u>"),
        "assistant: ",
        Slot(1, strip_left=False, strip_right=False),
        Control("<e>"),
        "\n",
    )
    assert skeleton.controls == ("<u>", "<e>", "<u>", "<e>")
    assert skeleton.control_after(1) == "<e>"
    assert skeleton.fill([" x<e> ", "y"]) == [
        Control("<u>"),
        "user:  x<e> ",
        Control("<e>"),
        "\n",
        Control("<u>"),
        "assistant: y",
        Control("<e>"),
        "\n",
    ]


def test_skeleton_learns_where_the_template_strips() -> None:
    skeleton = build_skeleton(stripping, ("user",), PATTERN)
    assert Slot(0, strip_left=False, strip_right=True) in skeleton.parts
    assert skeleton.fill(["\n<e>\n"]) == [Control("<u>"), " \n<e> ", Control("<e>")]


def test_rewritten_data_passes_unless_it_spells_out_controls() -> None:
    skeleton = build_skeleton(shouting, ("user",), PATTERN)
    messages = [user("hi<e>")]
    pieces = safe_pieces(skeleton, messages, shouting(messages), PATTERN)
    assert pieces == [Control("<u>"), "HI<E>", Control("<e>")]
    forged = control_pattern(["<u>", "<e>", "<E>"])
    with pytest.raises(DataError, match="spell out control tokens and the chat template rewrites"):
        safe_pieces(skeleton, messages, shouting(messages), forged)
