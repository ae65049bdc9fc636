"""Rows of JSONL, JSON and Parquet files, each with the place it came from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_selfpref.errors import DataError

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class BadRow:
    """A line that could not be read; it travels as a row so that the caller drops or refuses it."""

    message: str


@dataclass(frozen=True)
class RawRow:
    """One row as the file holds it: any JSON value, or a BadRow."""

    value: Any
    source: str
    """`path:line` for JSONL, `path[row N]` otherwise; both count from 1."""


def read_rows(path: str | Path) -> Iterator[RawRow]:
    """Stream the rows of a .jsonl, .json or .parquet file, or of every such file in a folder.

    Raises DataError, before the first row, for a path that is missing or of no known kind; and
    while reading for a file that is damaged or has no rows. A bad JSONL line becomes a BadRow.
    """
    files = [(file, _reader(file)) for file in data_files(Path(path))]
    return (row for file, reader in files for row in _not_empty(file, reader))


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a folder in the order in which they are read.

    Raises DataError for a path that is missing and for a folder without data files.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected {_expected()}")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
    if not files:
        raise DataError(f"{path}: the folder holds no data file; expected {_expected()}")
    return files


def _reader(path: Path) -> Callable[[Path], Iterator[RawRow]]:
    if path.suffix not in _READERS:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; expected {_expected()}")
    return _READERS[path.suffix]


def _expected() -> str:
    return f"a {', '.join(_READERS)} file, or a folder of them"


def _not_empty(path: Path, reader: Callable[[Path], Iterator[RawRow]]) -> Iterator[RawRow]:
    empty = True
    try:
        for row in reader(path):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}; expected a readable file") from error
    if empty:
        raise DataError(f"{path}: the file has no rows; expected at least one")


def _read_jsonl(path: Path) -> Iterator[RawRow]:
    # Binary, because text mode and str.splitlines would also break a line at U+2028 or U+0085.
    start = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(_BOM) if number == 1 else line
            if text.strip():
                yield RawRow(_parse_line(text, start + len(line) - len(text)), f"{path}:{number}")
            start += len(line)


def _parse_line(line: bytes, start: int) -> Any:
    """The line's value; `start` is the number of bytes before it."""
    try:
        return _parse_json(line)
    except (ValueError, RecursionError) as error:
        where = _where(line, start, error)
        return BadRow(
            f"the line is not valid JSON; got {error}{where}; expected one JSON object per line"
        )


def _where(line: bytes, start: int, error: Exception) -> str:
    """What the bytes tell of how a line came to be damaged; all bytes are counted from 0."""
    zeros = line.find(b"\0")
    if zeros >= 0:
        return (
            f"; {line.count(0)} zero bytes from byte {start + zeros} of the file on: a part of it "
            "was never written, and rows may be lost there"
        )
    if not line.endswith(b"\n") and _is_cut(line, error):
        return (
            f"; the file ends in the middle of this row, at byte {start + len(line)}: was it being "
            "written, or cut off?"
        )
    if isinstance(error, UnicodeDecodeError):
        return f" (byte {start + error.start} of the file)"
    return ""


def _is_cut(content: bytes, error: Exception) -> bool:
    """Whether what is wrong is that something is missing at the end."""
    if isinstance(error, UnicodeDecodeError):
        return error.reason == "unexpected end of data"
    if not isinstance(error, json.JSONDecodeError):
        return False
    text = content.rstrip()
    return not text.endswith((b"}", b"]")) or error.pos >= len(text.decode())


def _read_json(path: Path) -> Iterator[RawRow]:
    content = path.read_bytes().removeprefix(_BOM)
    if not content.strip():
        return
    try:
        document = _parse_json(content)
    except (ValueError, RecursionError) as error:
        hint = " (JSON Lines belong in a .jsonl file)" if "Extra data" in str(error) else ""
        if _is_cut(content, error):
            hint = f": the file ends in the middle of a row, at byte {len(content)}"
        raise DataError(f"{path}: not valid JSON; got {error}; expected an array{hint}") from error
    rows = document.get("data") if isinstance(document, dict) else document
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: got a JSON {type(document).__name__} without a list of rows; "
            'expected an array of objects or {"data": [...]}'
        )
    for number, row in enumerate(rows, start=1):
        yield RawRow(row, f"{path}[row {number}]")


def _parse_json(content: bytes) -> Any:
    return json.loads(
        content.decode("utf-8"),
        object_pairs_hook=_unique_keys,
        parse_constant=_no_constant,
        parse_float=_finite,
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"duplicate keys {twice}")
    return row


def _no_constant(name: str) -> float:
    raise ValueError(f"the constant {name}, which JSON does not have")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text}, which is too large")
    return value


def _read_parquet(path: Path) -> Iterator[RawRow]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow") from error
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            number = 0
            for batch in parquet.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(row, f"{path}[row {number}]")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file; got {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
