"""Checks on the conversations and answers inside a row, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_selfpref.config.schema import DropReason
from nemo_selfpref.types import Message

_ROLES = ("system", "user", "assistant")


class RowFault(Exception):
    """Something wrong with one row. `reason` is the name under which data.drop drops such rows."""

    def __init__(self, reason: DropReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class Answers:
    """What a format holds: a conversation, its answer, and for a pair the worse answer."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str | None = None


def show(value: Any) -> str:
    """A short form of a value for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def bad_row(what: str, got: Any, expected: str) -> RowFault:
    """A RowFault for a row that is malformed."""
    return RowFault(DropReason.bad_row, f"{what}; got {show(got)}; expected {expected}")


def check_text(value: Any, name: str) -> str:
    """`value` if it is text that has a UTF-8 form, else RowFault."""
    if not isinstance(value, str):
        raise bad_row(f"{name} is not text", value, "a string")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise bad_row(f"{name} holds half of a surrogate pair", value, "valid Unicode text")
    return value


def as_messages(value: Any, name: str, text_role: str) -> tuple[Message, ...]:
    """A list of messages, checked one by one; a plain text becomes one turn of `text_role`."""
    if isinstance(value, str):
        return ({"role": text_role, "content": check_text(value, name)},)
    if not isinstance(value, list):
        raise bad_row(f"{name} is not a conversation", value, "a string or a list of messages")
    return tuple(_message(turn, f"{name}[{number}]") for number, turn in enumerate(value))


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise bad_row(f"{where} is not a message", turn, 'an object {"role", "content"}')
    fields = {name: value for name, value in turn.items() if value is not None}
    if set(fields) != {"role", "content"}:
        raise bad_row(f"{where} cannot be used", sorted(fields), "the fields role and content")
    if fields["role"] not in _ROLES:
        raise bad_row(f"{where} has an unknown role", fields["role"], f"one of {', '.join(_ROLES)}")
    content = check_text(fields["content"], f"the content of {where}")
    return {"role": fields["role"], "content": content}


def split_answer(value: Any, name: str) -> Answers:
    """Cut a whole conversation before its last message, which must be the assistant's."""
    if not isinstance(value, list):
        raise bad_row(f"{name} is not a conversation", value, "a list of messages")
    messages = as_messages(value, name, "user")
    if not messages or messages[-1]["role"] != "assistant":
        got = [message["role"] for message in messages]
        raise bad_row(f"{name} does not end with an answer", got, "an assistant turn at the end")
    return Answers(messages[:-1], messages[-1]["content"])


def answer_text(value: Any, name: str, prompt: Sequence[Message]) -> str:
    """The text of an answer given as text, as one assistant message, or after its whole prompt."""
    if isinstance(value, str):
        return check_text(value, name)
    if not isinstance(value, list):
        raise bad_row(f"{name} is not an answer", value, "a string or a list of messages")
    answer = split_answer(value, name)
    if answer.messages and answer.messages != tuple(prompt):
        raise bad_row(
            f"{name} has other turns before its answer than the prompt",
            [message["role"] for message in answer.messages],
            "one assistant message, or the prompt's own turns before it",
        )
    return answer.chosen


def check_prompt(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation before an answer: [system], then user and assistant by turns, user last.

    A blank system message is left out. Raises RowFault (bad_row, empty_prompt).
    """
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    roles = [message["role"] for message in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] * (len(roles) % 2):
        raise bad_row("the turns are out of order", roles, "user and assistant by turns")
    if roles and roles[-1] != "user":
        raise bad_row("the prompt does not end with the user", roles, "a user turn at the end")
    blank = [message for message in turns if not message["content"].strip()]
    if not turns or blank:
        got = f"a blank {blank[0]['role']} turn" if blank else "no turn"
        raise RowFault(
            DropReason.empty_prompt, f"the prompt is empty; got {got}; expected text in every turn"
        )
    return tuple(messages)


def require(row: Mapping[str, Any], name: str) -> Any:
    """The field `name` of a row, or RowFault."""
    if name not in row:
        raise bad_row(f"the field {name!r} is missing", sorted(row), f"a field {name!r}")
    return row[name]
