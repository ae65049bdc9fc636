"""One row of a data file in any known format, read into one shape.

The formats are described in row_formats.py. Besides its own fields, every format may carry id,
system, metadata, score_chosen and score_rejected. A null field counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_selfpref.config.schema import DropReason, RowFormat
from nemo_selfpref.data.conversation import (
    RowFault,
    as_messages,
    bad_row,
    check_prompt,
    check_text,
    show,
)
from nemo_selfpref.data.readers import BadRow, RawRow
from nemo_selfpref.data.row_formats import FIELDS, detect_format, read_answers
from nemo_selfpref.types import Message

__all__ = [
    "PASSTHROUGH",
    "ParsedRow",
    "RowFault",
    "parse_prompt",
    "parse_row",
    "row_id",
    "with_system",
]

PASSTHROUGH = frozenset({"id", "metadata", "score_chosen", "score_rejected", "system"})
"""Fields that every format accepts."""


@dataclass(frozen=True)
class ParsedRow:
    """A row in the one shape the rest of the system knows."""

    id: str
    messages: tuple[Message, ...]
    """The conversation before the answer; its last turn is the user's."""
    chosen: str
    rejected: str | None
    """None for a row with a single answer."""
    score_chosen: float | None
    score_rejected: float | None
    source: str


def parse_row(
    raw: RawRow,
    fmt: RowFormat = RowFormat.auto,
    columns: Mapping[str, str] | None = None,
    ignore_fields: Collection[str] = (),
) -> ParsedRow:
    """Read one row in format `fmt`, first leaving out `ignore_fields`, then renaming by `columns`.

    Raises RowFault, whose reason says which of the data.drop faults the row has.
    """
    row = _fields(raw, columns, ignore_fields)
    fmt = detect_format(row) if fmt is RowFormat.auto else fmt
    _check_known(row, fmt)
    row = {name: value for name, value in row.items() if value is not None}
    answers = read_answers(row, fmt)
    parsed = ParsedRow(
        id=row_id(row, raw.source),
        messages=check_prompt(with_system(answers.messages, row)),
        chosen=answers.chosen,
        rejected=answers.rejected,
        score_chosen=_score(row, "score_chosen", "chosen_reward"),
        score_rejected=_score(row, "score_rejected", "rejected_reward"),
        source=raw.source,
    )
    _check_answers(parsed)
    return parsed


def parse_prompt(
    raw: RawRow,
    fmt: RowFormat = RowFormat.auto,
    columns: Mapping[str, str] | None = None,
    ignore_fields: Collection[str] = (),
) -> ParsedRow:
    """As parse_row, for those who need no answer: a row may hold `prompt` alone, or `messages` that
    end in a user turn; its chosen answer is then the empty text."""
    row = _fields(raw, columns, ignore_fields)
    given = {name: value for name, value in row.items() if value is not None}
    own = given.keys() - PASSTHROUGH
    if fmt not in (RowFormat.auto, RowFormat.trl) or own not in ({"prompt"}, {"messages"}):
        return parse_row(raw, fmt, columns, ignore_fields)
    field = own.pop()
    messages = as_messages(given[field], field, "user")
    if messages and messages[-1]["role"] == "assistant":
        return parse_row(raw, fmt, columns, ignore_fields)
    prompt = check_prompt(with_system(messages, given))
    return ParsedRow(row_id(given, raw.source), prompt, "", None, None, None, raw.source)


def _fields(
    raw: RawRow, columns: Mapping[str, str] | None, ignore_fields: Collection[str]
) -> dict[str, Any]:
    row = {name: value for name, value in as_object(raw).items() if name not in ignore_fields}
    return _rename(row, columns or {})


def as_object(raw: RawRow) -> Mapping[str, Any]:
    """The fields of a row, or RowFault for a row that is no object or could not be read."""
    if isinstance(raw.value, BadRow):
        raise RowFault(DropReason.bad_row, raw.value.message)
    if not isinstance(raw.value, dict):
        raise bad_row("the row is not an object", raw.value, "an object with named fields")
    return raw.value


def row_id(row: Mapping[str, Any], source: str) -> str:
    """The row's own id, or its file name and place, which stay when the folder moves."""
    value = row.get("id")
    if value is None:
        return Path(source).name
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise bad_row("the id cannot be used", value, "a non-empty string or an integer")
    return str(value)


def with_system(messages: tuple[Message, ...], row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The messages after the row's own `system` field, where that is not blank."""
    text = check_text(row.get("system", ""), "system")
    if not text.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        raise bad_row("the row has two system messages", text, "one, in the messages or in system")
    return ({"role": "system", "content": text}, *messages)


def _rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    origin: dict[str, str] = {}
    for name in row:
        new = columns.get(name, name)
        if new in origin:
            raise RowFault(
                DropReason.bad_row,
                f"two fields become {new!r}; got {origin[new]!r} and {name!r}; expected one; "
                f"change data.columns or set data.ignore_fields=[{origin[new]}]",
            )
        origin[new] = name
    return {new: row[name] for new, name in origin.items()}


def _check_known(row: Mapping[str, Any], fmt: RowFormat) -> None:
    known = FIELDS[fmt] | PASSTHROUGH
    unknown = sorted(name for name in row if name not in known)
    if unknown:
        raise RowFault(
            DropReason.unknown_field,
            f"unknown field {unknown[0]!r}; got the fields {sorted(row)}; expected for format "
            f"{fmt.value} only {sorted(known)}; if it carries nothing you need, set "
            f"data.ignore_fields=[{','.join(unknown)}]",
        )


def _score(row: Mapping[str, Any], name: str, reward: str) -> float | None:
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise bad_row("metadata is not an object", metadata, "an object with named fields")
    for field in (name, reward):
        if field in row:
            if not _is_number(row[field]):
                raise bad_row(f"{field} is not a score", row[field], "a finite number")
            return float(row[field])
    return float(metadata[name]) if _is_number(metadata.get(name)) else None


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _check_answers(row: ParsedRow) -> None:
    for name, text in (("chosen", row.chosen), ("rejected", row.rejected)):
        if text is not None and not text.strip():
            raise RowFault(
                DropReason.empty_response,
                f"the {name} response is empty; got {show(text)}; expected some text",
            )
    if row.chosen == row.rejected:
        raise RowFault(
            DropReason.identical_pair,
            f"chosen and rejected are the same text; got {show(row.chosen)}; expected two answers",
        )
    if row.score_chosen is not None and row.score_chosen == row.score_rejected:
        raise RowFault(
            DropReason.tied_pair,
            f"the two answers have the same score; got {row.score_chosen:g} for both; "
            "expected two different scores",
        )
