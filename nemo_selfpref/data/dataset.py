"""Data files to training rows: read, checked, tokenised, and every drop counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from nemo_selfpref.config.schema import DataConfig, DropReason
from nemo_selfpref.data.conversation import RowFault, as_messages, bad_row, check_prompt
from nemo_selfpref.data.formats import (
    ParsedRow,
    as_object,
    parse_prompt,
    parse_row,
    row_id,
    with_system,
)
from nemo_selfpref.data.readers import RawRow, read_rows
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import DataError
from nemo_selfpref.types import Demonstration, DropReport, Message, PreferencePair

T = TypeVar("T", Demonstration, PreferencePair)


def load_demonstrations(
    config: DataConfig, tokenizer: ChatTokenizer
) -> tuple[list[Demonstration], DropReport]:
    """The rows of config.train_path as prompts with one answer each, for a pair the chosen one.

    Raises DataError at the first row with a fault that config.drop does not name, for two rows of
    the same id, and if no row is left.
    """

    def build(row: ParsedRow) -> Demonstration:
        prompt = tokenizer.encode_prompt(row.messages)
        response = tokenizer.encode_response(row.messages, row.chosen)
        _check_lengths(config, len(prompt), len(response))
        return Demonstration(row.id, row.messages, prompt, response, row.chosen, row.source)

    return _load(config, build)


def load_prompt_rows(
    config: DataConfig, tokenizer: ChatTokenizer
) -> tuple[list[Demonstration], DropReport]:
    """The rows of config.train_path as prompts; an answer may be there and is not read. Errors as
    in load_demonstrations."""

    def build(row: ParsedRow) -> Demonstration:
        prompt = tokenizer.encode_prompt(row.messages)
        _check_lengths(config, len(prompt), 0)
        return Demonstration(row.id, row.messages, prompt, (), "", row.source)

    return _load(config, build, parse_prompt)


def load_preferences(
    config: DataConfig, tokenizer: ChatTokenizer
) -> tuple[list[PreferencePair], DropReport]:
    """The rows of config.train_path as preference pairs; errors as in load_demonstrations.

    The provenance of a pair holds its source and, where the row has them, its scores.
    """

    def build(row: ParsedRow) -> PreferencePair:
        if row.rejected is None:
            raise bad_row("the row has no rejected answer", "one answer", "chosen and rejected")
        prompt = tokenizer.encode_prompt(row.messages)
        chosen = tokenizer.encode_response(row.messages, row.chosen)
        rejected = tokenizer.encode_response(row.messages, row.rejected)
        _check_lengths(config, len(prompt), len(chosen), len(rejected))
        return PreferencePair(
            row.id, prompt, chosen, rejected, provenance=_provenance(row), messages=row.messages
        )

    return _load(config, build)


def load_prompts(path: str | Path) -> list[tuple[str, tuple[Message, ...]]]:
    """Ids and conversations to answer, each ending in a user turn.

    From rows with `prompt` (text or messages) or `messages`, and optionally `id` and `system`;
    other fields are not read. From a .txt file, each line that is not blank is one prompt. Raises
    DataError at the first row that has no usable prompt, and for two rows of the same id.
    """
    prompts: list[tuple[str, tuple[Message, ...]]] = []
    sources: dict[str, str] = {}
    for raw in _text_lines(Path(path)) if Path(path).suffix == ".txt" else read_rows(path):
        try:
            name, messages = _prompt(raw)
        except RowFault as fault:
            raise DataError(f"{raw.source}: {fault.message}; correct or remove the row") from fault
        _check_new(name, raw.source, sources)
        prompts.append((name, messages))
    return prompts


def _load(
    config: DataConfig, build: Callable[[ParsedRow], T], parse: Callable[..., ParsedRow] = parse_row
) -> tuple[list[T], DropReport]:
    rows: list[T] = []
    report = DropReport()
    sources: dict[str, str] = {}
    for raw in _raw_rows(config):
        if config.limit is not None and len(rows) >= config.limit:
            break
        row = _build_or_drop(raw, config, build, parse, report)
        if row is not None:
            _check_new(row.id, raw.source, sources)
            rows.append(row)
            report.kept += 1
    if not rows:
        raise DataError(
            f"{', '.join(config.train_path)}: no row is left; got {report.summary()}; expected at "
            "least one; look at the reasons and at data.drop and data.limit"
        )
    return rows, report


def _raw_rows(config: DataConfig) -> Iterator[RawRow]:
    for path in config.train_path:
        yield from read_rows(path)


def _build_or_drop(
    raw: RawRow,
    config: DataConfig,
    build: Callable[[ParsedRow], T],
    parse: Callable[..., ParsedRow],
    report: DropReport,
) -> T | None:
    try:
        row = parse(raw, config.format, config.columns, config.ignore_fields)
        return build(_with_default_system(row, config.system_prompt))
    except RowFault as fault:
        if fault.reason not in config.drop:
            raise DataError(
                f"{raw.source}: {fault.message}; to drop and count such rows set "
                f"data.drop=[{fault.reason.value}]"
            ) from fault
        report.drop(fault.reason.value, raw.source)
    except DataError as error:
        raise DataError(f"{raw.source}: {error}") from error
    return None


def _with_default_system(row: ParsedRow, system: str | None) -> ParsedRow:
    if not system or row.messages[0]["role"] == "system":
        return row
    messages = ({"role": "system", "content": system}, *row.messages)
    return replace(row, messages=messages)


def _check_lengths(config: DataConfig, prompt: int, *answers: int) -> None:
    if prompt > config.max_prompt_length:
        raise RowFault(
            DropReason.prompt_too_long,
            f"the prompt is too long; got {prompt} tokens; expected at most "
            f"data.max_prompt_length={config.max_prompt_length}",
        )
    if prompt + max(answers) > config.max_length:
        raise RowFault(
            DropReason.too_long,
            f"prompt and answer are too long; got {prompt} + {max(answers)} tokens; expected at "
            f"most data.max_length={config.max_length}",
        )


def _provenance(row: ParsedRow) -> dict[str, Any]:
    scores = {"score_chosen": row.score_chosen, "score_rejected": row.score_rejected}
    return {"source": row.source} | {k: v for k, v in scores.items() if v is not None}


def _check_new(name: str, source: str, sources: dict[str, str]) -> None:
    if name in sources:
        raise DataError(
            f"{source}: the id {name!r} is taken; got it already at {sources[name]}; expected "
            "another; give each row its own id, or files without ids different names"
        )
    sources[name] = source


def _prompt(raw: RawRow) -> tuple[str, tuple[Message, ...]]:
    row = {name: value for name, value in as_object(raw).items() if value is not None}
    given = [name for name in ("prompt", "messages") if name in row]
    if len(given) != 1:
        raise bad_row("the row's prompt is unclear", sorted(row), "either prompt or messages")
    messages = as_messages(row[given[0]], given[0], "user")
    return row_id(row, raw.source), check_prompt(with_system(messages, row))


def _text_lines(path: Path) -> Iterator[RawRow]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; expected a UTF-8 text file") from error
    rows = [
        RawRow({"prompt": line.removesuffix("\r")}, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise DataError(f"{path}: the file has no prompts; expected one prompt per line")
    yield from rows
