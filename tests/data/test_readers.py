from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_selfpref.data.readers import BadRow, RawRow, read_rows
from nemo_selfpref.errors import DataError

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def test_jsonl_rows_carry_path_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"x": 1}\n\n  \n{"x": 2}\r\n{"x": 3}')
    assert list(read_rows(path)) == [
        RawRow({"x": 1}, f"{path}:1"),
        RawRow({"x": 2}, f"{path}:4"),
        RawRow({"x": 3}, f"{path}:5"),
    ]


def test_jsonl_splits_on_newline_only(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\u0085four\x0cfive"
    path = write(tmp_path, "a.jsonl", '{"x": "' + text.replace("\x0c", "\\f") + '"}\n{"x": "b"}\n')
    assert [row.value for row in read_rows(path)] == [{"x": text}, {"x": "b"}]


def test_byte_order_mark_is_tolerated(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", '{"x": 1}\n'), ("b.json", '[{"x": 1}]')):
        path = write(tmp_path, name, b"\xef\xbb\xbf" + content.encode())
        assert [row.value for row in read_rows(path)] == [{"x": 1}]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b'{"x": 1', "Expecting ',' delimiter"),
        (b'{"x": NaN}', "the constant NaN"),
        (b'{"x": -Infinity}', "the constant -Infinity"),
        (b'{"x": 1e999}', "the number 1e999, which is too large"),
        (b'{"x": "\xff"}', "can't decode byte 0xff"),
        (b'{"x": 1, "x": 2}', "duplicate keys ['x']"),
        (b'{"x": {"y": 1, "y": 1}}', "duplicate keys ['y']"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_bad_line_becomes_bad_row_and_reading_goes_on(
    tmp_path: Path, line: bytes, part: str
) -> None:
    path = write(tmp_path, "a.jsonl", line + b'\n{"x": 5}\n')
    bad, good = read_rows(path)
    assert isinstance(bad.value, BadRow)
    assert bad.source == f"{path}:1"
    assert "the line is not valid JSON; got " in bad.value.message
    assert part in bad.value.message
    assert good.value == {"x": 5}


@given(rows=st.lists(JSON_VALUES, min_size=1, max_size=5))
def test_jsonl_json_and_data_wrapper_agree(
    tmp_path_factory: pytest.TempPathFactory, rows: list[object]
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    lines = "\n".join(json.dumps(row, ensure_ascii=True) for row in rows)
    files = [
        write(folder, "a.jsonl", lines),
        write(folder, "b.json", json.dumps(rows)),
        write(folder, "c.json", json.dumps({"data": rows})),
    ]
    for path in files:
        assert [row.value for row in read_rows(path)] == rows


def test_parquet_streams_all_row_groups(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    table = pa.table({"n": list(range(2500)), "m": [[{"role": "user"}]] * 2500})
    pq.write_table(table, path, row_group_size=700)
    rows = list(read_rows(path))
    assert [row.value["n"] for row in rows] == list(range(2500))
    assert rows[2499] == RawRow({"n": 2499, "m": [{"role": "user"}]}, f"{path}[row 2500]")


def test_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", '{"x": 2}')
    write(tmp_path, "a.json", '[{"x": 1}]')
    write(tmp_path, "README.md", "not data")
    assert [row.source for row in read_rows(tmp_path)] == [
        f"{tmp_path}/a.json[row 1]",
        f"{tmp_path}/b.jsonl:1",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x\n1\n", "a.csv: unknown kind of file '.csv'; expected a .jsonl, .json"),
        ("a.jsonl", "", "a.jsonl: the file has no rows; expected at least one"),
        ("a.jsonl", "\n \n", "a.jsonl: the file has no rows; expected at least one"),
        ("a.json", "", "a.json: the file has no rows; expected at least one"),
        ("a.json", "[]", "a.json: the file has no rows; expected at least one"),
        ("a.json", '{"rows": []}', "a.json: got a JSON dict without a list of rows; expected"),
        ("a.json", '"text"', "a.json: got a JSON str without a list of rows; expected"),
        ("a.json", "[1,", "a.json: not valid JSON; got Expecting value"),
        ("a.json", "{}\n{}", "expected an array (JSON Lines belong in a .jsonl file)"),
        ("a.parquet", "PAR?", "a.parquet: not a readable Parquet file; got "),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as error:
        list(read_rows(path))
    assert message in str(error.value)


def test_missing_file_is_refused_before_the_first_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder; expected a .jsonl, .json"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"the folder holds no data file; expected a .jsonl"):
        read_rows(tmp_path)


def test_real_file_with_line_separator(real_data: Path) -> None:
    rows = list(read_rows(real_data / "eval/arena_hard/v2.0_question.jsonl"))
    assert len(rows) == 750
    assert not any(isinstance(row.value, BadRow) for row in rows)
    assert sum("\u2028" in row.value["prompt"] for row in rows) == 1
