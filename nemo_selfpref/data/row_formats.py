"""The row formats people have, and how each is read.

trl      prompt + chosen + rejected | chosen + rejected (whole conversations) | messages |
         prompt + completion
nemo_rl  context + completions: [{"rank": int, "completion": ...}], the lowest rank is best
aligner  prompt + chosen_response + rejected_response (+ chosen_reward, rejected_reward)
spin     real + generated, each a whole conversation
alpaca   instruction (+ input) + output, or + chosen + rejected, which then replace output
dolly    instruction (+ context) + response (+ category)

A text or a list of messages is accepted wherever a format has a prompt or an answer, except in an
instruction. The prompt of alpaca and dolly is the instruction, a blank line, and the input or
context where it is not blank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nemo_selfpref.config.schema import DropReason, RowFormat
from nemo_selfpref.data.conversation import (
    Answers,
    RowFault,
    answer_text,
    as_messages,
    bad_row,
    check_text,
    require,
    split_answer,
)

Row = Mapping[str, Any]

FIELDS: Mapping[RowFormat, frozenset[str]] = {
    RowFormat.trl: frozenset({"prompt", "chosen", "rejected", "messages", "completion"}),
    RowFormat.nemo_rl: frozenset({"context", "completions"}),
    RowFormat.aligner: frozenset(
        {"prompt", "chosen_response", "rejected_response", "chosen_reward", "rejected_reward"}
    ),
    RowFormat.spin: frozenset({"real", "generated"}),
    RowFormat.alpaca: frozenset({"instruction", "input", "output", "chosen", "rejected"}),
    RowFormat.dolly: frozenset({"instruction", "context", "response", "category"}),
}
"""Every field of each format."""

_SIGNATURES: tuple[tuple[RowFormat, tuple[str, ...]], ...] = (
    (RowFormat.spin, ("real", "generated")),
    (RowFormat.nemo_rl, ("context", "completions")),
    (RowFormat.aligner, ("prompt", "chosen_response", "rejected_response")),
    (RowFormat.alpaca, ("instruction", "output")),
    (RowFormat.alpaca, ("instruction", "chosen", "rejected")),
    (RowFormat.dolly, ("instruction", "response")),
    (RowFormat.trl, ("chosen", "rejected")),
    (RowFormat.trl, ("prompt", "completion")),
    (RowFormat.trl, ("messages",)),
)


def detect_format(row: Row) -> RowFormat:
    """The first format, in a fixed order, whose required fields the row has; else RowFault."""
    present = {name for name, value in row.items() if value is not None}
    for fmt, signature in _SIGNATURES:
        if present.issuperset(signature):
            return fmt
    known = "; ".join(f"{fmt.value}: {' + '.join(names)}" for fmt, names in _SIGNATURES)
    raise RowFault(
        DropReason.bad_row,
        f"no format fits the row; got the fields {sorted(present)}; expected those of one of "
        f"[{known}]; rename fields with data.columns",
    )


def read_answers(row: Row, fmt: RowFormat) -> Answers:
    """The conversation and answers of a row in format `fmt`; RowFault where it is malformed."""
    return _PARSERS[fmt](row)


def _trl(row: Row) -> Answers:
    if "messages" in row:
        _refuse_also(row, "messages", ("prompt", "chosen", "rejected", "completion"))
        return split_answer(row["messages"], "messages")
    if "completion" in row:
        _refuse_also(row, "completion", ("chosen", "rejected"))
        prompt = as_messages(require(row, "prompt"), "prompt", "user")
        return Answers(prompt, answer_text(row["completion"], "completion", prompt))
    if "prompt" in row:
        return _pair(row, "prompt", "chosen", "rejected")
    return _two_conversations(row, "chosen", "rejected")


def _refuse_also(row: Row, name: str, others: tuple[str, ...]) -> None:
    also = [other for other in others if other in row]
    if also:
        raise bad_row(f"the row has {name} and also {also[0]}", sorted(row), "one of the two")


def _pair(row: Row, prompt: str, chosen: str, rejected: str) -> Answers:
    messages = as_messages(require(row, prompt), prompt, "user")
    best = answer_text(require(row, chosen), chosen, messages)
    return Answers(messages, best, answer_text(require(row, rejected), rejected, messages))


def _two_conversations(row: Row, chosen: str, rejected: str) -> Answers:
    best = split_answer(require(row, chosen), chosen)
    worst = split_answer(require(row, rejected), rejected)
    if best.messages != worst.messages:
        raise bad_row(
            f"{chosen} and {rejected} differ before their last message",
            f"{len(best.messages)} and {len(worst.messages)} earlier turns",
            "the same earlier turns in both",
        )
    return Answers(best.messages, best.chosen, worst.chosen)


def _nemo_rl(row: Row) -> Answers:
    messages = as_messages(require(row, "context"), "context", "user")
    completions = require(row, "completions")
    if not isinstance(completions, list) or not completions:
        raise bad_row("completions cannot be used", completions, "a list with one or more entries")
    ranked = [_ranked(entry, f"completions[{number}]") for number, entry in enumerate(completions)]
    best, worst = min(ranked, key=_rank), max(ranked, key=_rank)
    chosen = answer_text(best[1], "completions", messages)
    if len(ranked) == 1:
        return Answers(messages, chosen)
    if best[0] == worst[0]:
        raise RowFault(
            DropReason.tied_pair,
            f"all completions have the same rank; got {best[0]}; expected two different ranks",
        )
    return Answers(messages, chosen, answer_text(worst[1], "completions", messages))


def _rank(entry: tuple[int, Any]) -> int:
    return entry[0]


def _ranked(entry: Any, where: str) -> tuple[int, Any]:
    if not isinstance(entry, dict) or set(entry) != {"rank", "completion"}:
        got = sorted(entry) if isinstance(entry, dict) else entry
        raise bad_row(f"{where} cannot be used", got, "the fields rank and completion")
    if isinstance(entry["rank"], bool) or not isinstance(entry["rank"], int):
        raise bad_row(f"the rank of {where} is not an integer", entry["rank"], "an integer")
    return entry["rank"], entry["completion"]


def _aligner(row: Row) -> Answers:
    return _pair(row, "prompt", "chosen_response", "rejected_response")


def _spin(row: Row) -> Answers:
    return _two_conversations(row, "real", "generated")


def _alpaca(row: Row) -> Answers:
    prompt = _instruction(row, "input")
    if "chosen" in row or "rejected" in row:
        return _pair({**row, "instruction": prompt}, "instruction", "chosen", "rejected")
    return _instructed(prompt, row, "output")


def _dolly(row: Row) -> Answers:
    return _instructed(_instruction(row, "context"), row, "response")


def _instruction(row: Row, extra: str) -> str:
    text = check_text(require(row, "instruction"), "instruction")
    more = check_text(row.get(extra, ""), extra)
    return f"{text}\n\n{more}" if more.strip() else text


def _instructed(prompt: str, row: Row, answer: str) -> Answers:
    messages = as_messages(prompt, "instruction", "user")
    return Answers(messages, answer_text(require(row, answer), answer, messages))


_PARSERS: Mapping[RowFormat, Callable[[Row], Answers]] = {
    RowFormat.trl: _trl,
    RowFormat.nemo_rl: _nemo_rl,
    RowFormat.aligner: _aligner,
    RowFormat.spin: _spin,
    RowFormat.alpaca: _alpaca,
    RowFormat.dolly: _dolly,
}
