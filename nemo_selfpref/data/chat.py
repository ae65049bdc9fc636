"""The fixed part of a rendered conversation, told apart from the data in it.

A chat template is rendered once with stand-ins in place of the messages' contents. What is left,
the skeleton, says which control tokens a conversation really has, so that a control token spelled
out inside the data can be recognised and kept as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nemo_selfpref.errors import DataError
from nemo_selfpref.types import Message

# Stand-ins use private-use characters, and are padded with a space no template writes: where the
# padding is gone, the template strips its data on that side.
_PADDING = "\u2003"
_STAND_IN = re.compile(f"({_PADDING}?)\ue000(\\d+)\ue001({_PADDING}?)")


@dataclass(frozen=True)
class Control:
    """A control token that the template writes."""

    token: str


@dataclass(frozen=True)
class Slot:
    """The place of one message's content, and the sides on which the template strips it."""

    index: int
    strip_left: bool
    strip_right: bool

    def fill(self, content: str) -> str:
        content = content.lstrip() if self.strip_left else content
        return content.rstrip() if self.strip_right else content


@dataclass(frozen=True)
class Skeleton:
    """Template text, control tokens and slots, in the order of the rendered conversation."""

    parts: tuple[str | Control | Slot, ...]

    @property
    def controls(self) -> tuple[str, ...]:
        return controls_in(self.parts)

    def fill(self, contents: Sequence[str]) -> list[str | Control]:
        """The conversation with these contents, each run of plain text in one piece."""
        return join_text(
            part.fill(contents[part.index]) if isinstance(part, Slot) else part
            for part in self.parts
        )

    def control_after(self, index: int) -> str | None:
        """The first control token after the slot of message `index`."""
        slots = ((i, part) for i, part in enumerate(self.parts) if isinstance(part, Slot))
        start = next((i for i, slot in slots if slot.index == index), len(self.parts))
        return next(iter(controls_in(self.parts[start:])), None)


def control_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `tokens`, the longest where one begins with another."""
    ordered = sorted((re.escape(token) for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(ordered) or r"(?!)")


def split_controls(text: str, pattern: re.Pattern[str]) -> list[str | Control]:
    """Cut rendered text at its control tokens."""
    pieces: list[str | Control] = []
    end = 0
    for match in pattern.finditer(text):
        pieces += [text[end : match.start()], Control(match.group())]
        end = match.end()
    return join_text([*pieces, text[end:]])


def controls_in(pieces: Iterable[str | Control | Slot]) -> tuple[str, ...]:
    return tuple(piece.token for piece in pieces if isinstance(piece, Control))


def join_text(pieces: Iterable[str | Control]) -> list[str | Control]:
    joined: list[str | Control] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return joined


def build_skeleton(
    render: Callable[[Sequence[Message]], str], roles: Sequence[str], pattern: re.Pattern[str]
) -> Skeleton:
    """Render a conversation of these roles with stand-ins for its contents, and take it apart."""
    stand_ins = [f"{_PADDING}\ue000{index}\ue001{_PADDING}" for index in range(len(roles))]
    rendered = render([{"role": r, "content": c} for r, c in zip(roles, stand_ins, strict=True)])
    parts: list[str | Control | Slot] = []
    end = 0
    for match in _STAND_IN.finditer(rendered):
        parts += split_controls(rendered[end : match.start()], pattern)
        parts.append(Slot(int(match[2]), not match[1], not match[3]))
        end = match.end()
    return Skeleton((*parts, *split_controls(rendered[end:], pattern)))


def safe_pieces(
    skeleton: Skeleton, messages: Sequence[Message], rendered: str, pattern: re.Pattern[str]
) -> list[str | Control]:
    """The rendered conversation in pieces, with exactly the skeleton's control tokens.

    Raises DataError where data with spelled-out control tokens cannot be told from the template.
    """
    filled = skeleton.fill([message["content"] for message in messages])
    if rendered == "".join(p.token if isinstance(p, Control) else p for p in filled):
        return filled
    # The template rewrites the data; that is harmless as long as no control token is in it.
    pieces = split_controls(rendered, pattern)
    if controls_in(pieces) == skeleton.controls:
        return pieces
    raise DataError(
        "the messages spell out control tokens and the chat template rewrites them; got the "
        f"control tokens {list(controls_in(pieces))}; expected {list(skeleton.controls)}; "
        "remove them from the messages"
    )


def roles_of(messages: Sequence[Message]) -> tuple[str, ...]:
    return tuple(message["role"] for message in messages)


def template_error(error: Exception, messages: Sequence[Mapping[str, str]]) -> DataError:
    """A DataError for a conversation that the chat template refuses."""
    return DataError(
        f"the chat template refuses the conversation: {error}; got the roles "
        f"{list(roles_of(messages))}; change the rows or give model.tokenizer.chat_template"
    )
