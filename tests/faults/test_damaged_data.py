"""Data files cut off, half written or with flipped bytes: the error names file, line and byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_selfpref.config.schema import DataConfig, DropReason
from nemo_selfpref.data.dataset import load_demonstrations
from nemo_selfpref.data.readers import BadRow, read_rows
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import DataError

ROWS = [{"prompt": f"How much is {n}?", "completion": f"It is {n}, né?"} for n in range(6)]
WHOLE = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
LINE = len(WHOLE) // 6
"""Bytes of each line, its newline included."""


def write(folder: Path, data: bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def bad(path: Path) -> dict[str, str]:
    """The damaged rows by where they are."""
    rows = [row for row in read_rows(path) if isinstance(row.value, BadRow)]
    return {row.source: row.value.message for row in rows}


def test_a_last_row_cut_anywhere_is_reported(tmp_path: Path) -> None:
    assert all(len(line) == LINE for line in WHOLE.splitlines(keepends=True))
    for end in range(5 * LINE + 1, 6 * LINE - 1):
        path = write(tmp_path, WHOLE[:end])
        ((where, message),) = bad(path).items()
        assert where == f"{path}:6"
        assert f"the file ends in the middle of this row, at byte {end}: was it being" in message


def test_a_last_row_without_its_newline_is_whole(tmp_path: Path) -> None:
    assert bad(write(tmp_path, WHOLE[:-1])) == {}


def test_a_wrong_last_row_is_not_called_cut(tmp_path: Path) -> None:
    for line in (b'{"prompt": NaN}', b'{"prompt" 1, "completion": 2}', b'{"a": 1, "a": 2}'):
        ((_, message),) = bad(write(tmp_path, WHOLE + line)).items()
        assert "the line is not valid JSON" in message and "the file ends" not in message


def test_invalid_utf8_is_reported_with_its_byte_in_the_file(tmp_path: Path) -> None:
    data = bytearray(WHOLE)
    data[3 * LINE + 20] = 0xFF
    path = write(tmp_path, bytes(data))
    ((where, message),) = bad(path).items()
    assert where == f"{path}:4"
    assert "can't decode byte 0xff in position 20" in message
    assert f"(byte {3 * LINE + 20} of the file)" in message


def test_bytes_are_counted_behind_a_byte_order_mark(tmp_path: Path) -> None:
    ((_, message),) = bad(write(tmp_path, b'\xef\xbb\xbf{"prompt": "\xff"}\n')).items()
    assert "(byte 15 of the file)" in message  # 3 of the mark, 12 before the text


def test_a_page_of_zeros_is_reported(tmp_path: Path) -> None:
    start = LINE + 10
    data = WHOLE[:start] + bytes(2 * LINE) + WHOLE[start + 2 * LINE :]
    path = write(tmp_path, data)
    ((where, message),) = bad(path).items()
    assert where == f"{path}:2"
    assert f"{2 * LINE} zero bytes from byte {start} of the file on" in message
    assert "rows may be lost there" in message


def test_a_line_of_zeros_is_no_blank_line(tmp_path: Path) -> None:
    assert len(bad(write(tmp_path, WHOLE + bytes(4096)))) == 1


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (b"", "rows.jsonl", "the file has no rows"),
        (b"", "rows.json", "the file has no rows"),
        (b'[{"prompt": "a"}, {"prom', "rows.json", "the file ends in the middle of a row, at byte"),
        (b'[{"prompt": "a"}, {"p": 1}', "rows.json", "the file ends in the middle of a row, at"),
        (b'[{"prompt": "\xff"}]', "rows.json", "can't decode byte 0xff in position 13"),
        (b"\x1f\x8b", "rows.jsonl.gz", "unknown kind of file '.gz'; expected a .jsonl"),
        (b"", "rows.parquet", "not a readable Parquet file"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, data: bytes, name: str, message: str
) -> None:
    path = write(tmp_path, data, name)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


def test_a_file_that_may_not_be_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.symlink_to(tmp_path / "rows.jsonl")  # a loop: the system refuses to open it
    with pytest.raises(DataError, match=r"rows\.jsonl: "):
        list(read_rows(path))
    folder = tmp_path / "folder.jsonl"
    (folder / "a.jsonl").mkdir(parents=True)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: .*Is a directory"):
        list(read_rows(folder))


def parquet(folder: Path, compression: str = "snappy") -> Path:
    table = pa.Table.from_pylist(ROWS)
    options = {"compression": compression, "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, folder / "rows.parquet", **options)
    return folder / "rows.parquet"


def test_a_cut_parquet_file_is_named(tmp_path: Path) -> None:
    path = parquet(tmp_path)
    whole = path.read_bytes()
    for end in range(0, len(whole), 9):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file; got "):
            list(read_rows(path))


def test_a_byte_flipped_in_a_page_of_parquet_is_found_by_the_pages_own_sum(tmp_path: Path) -> None:
    path = parquet(tmp_path, "none")
    whole = path.read_bytes()
    place = whole.index(b"It is 3")  # text in a page, still valid text after the flip
    path.write_bytes(whole[:place] + b"i" + whole[place + 1 :])
    assert pq.read_table(path)["completion"][3].as_py() == ROWS[3]["completion"].replace("I", "i")
    with pytest.raises(DataError, match=r"rows\.parquet: not a readable Parquet file; got .*CRC"):
        list(read_rows(path))


def test_no_flipped_byte_of_parquet_ends_in_a_traceback(tmp_path: Path) -> None:
    path = parquet(tmp_path)
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x81]) + whole[place + 1 :])
        try:
            list(read_rows(path))
        except DataError as error:
            refused += str(error).startswith(f"{path}: not a readable Parquet file; got ")
    assert refused > len(whole) // 2


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda data: data[:-9],
    lambda data: data[: 2 * LINE] + b"\xff" + data[2 * LINE + 1 :],
    lambda data: data[: 2 * LINE] + b"\0" + data[2 * LINE + 1 :],
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_stops_the_run_or_is_dropped_and_counted(
    tmp_path: Path, tokenizer: ChatTokenizer, damage: Callable[[bytes], bytes]
) -> None:
    path = write(tmp_path, damage(WHOLE))
    with pytest.raises(DataError, match=r"rows\.jsonl:[36]: the line is not valid JSON"):
        load_demonstrations(DataConfig(train_path=[str(path)]), tokenizer)
    dropping = DataConfig(train_path=[str(path)], drop=[DropReason.bad_row])
    rows, report = load_demonstrations(dropping, tokenizer)
    assert len(rows) == 5 and report.dropped == {"bad_row": 1}
