from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_server import Endpoint, asks, teacher

from nemo_selfpref.errors import DataError, RolloutError
from nemo_selfpref.rollout.teacher import FileTeacher, TeacherRequest, write_requests


def test_written_requests_come_back_as_answers(tmp_path: Path) -> None:
    requests = asks("a\u2028b\n{}", "é")
    path = tmp_path / "new" / "requests.jsonl"
    write_requests(path, requests)
    write_requests(path, requests)
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert rows == [{"id": r.id, "prompt": r.prompt} for r in requests]
    assert [file.name for file in path.parent.iterdir()] == ["requests.jsonl"]
    lines = [json.dumps({**row, "answer": "ok\u2028"}, ensure_ascii=False) for row in rows]
    answers = tmp_path / "answers.jsonl"
    answers.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode())
    done: list[int] = []
    assert FileTeacher(answers).answer(requests, done.append) == {
        r.id: "ok\u2028" for r in requests
    }
    assert done == [2]


def test_requests_that_cannot_be_written_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "x.jsonl"):
        with pytest.raises(RolloutError, match="cannot be written"):
            write_requests(path, asks("a"))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert [file for file in tmp_path.parent.iterdir() if "partial" in file.name] == []


def test_file_teacher_names_missing_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(
        '{"id": "id-a", "answer": " "}\n{"id": "half", "answer": "\\ud800!"}\n'
        '{"id": "other", "answer": "x"}\n'
    )
    assert FileTeacher(path).answer(asks("a")) == {"id-a": ""}
    assert FileTeacher(path).answer([TeacherRequest("half", "p")]) == {"half": "?!"}
    with pytest.raises(
        RolloutError, match=r"no answer to 4 of 5 .*id-b, id-c, id-d; run the request"
    ):
        FileTeacher(path).answer(asks(*"abcde"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "a", "answer": "y"}', "'a' occurs twice"),
        ('{"id": 1, "answer": "y"}', "no text under 'id'"),
        ('{"id": "b", "answer": null}', "no text under 'answer'"),
        ('{"id": "b"}', "no text under 'answer'"),
        ('["b"]', "expected an object"),
        ("{", "not JSON"),
    ],
)
def test_file_teacher_refuses_bad_rows(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": "a", "answer": "x"}\n' + row)
    with pytest.raises(DataError, match=rf"answers\.jsonl:2: .*{message}"):
        FileTeacher(path)


def test_file_teacher_without_a_file(tmp_path: Path) -> None:
    """The run writes its questions first, so the answers may not be there yet."""
    with pytest.raises(RolloutError, match=r"absent: no answer to 2 of 2 requests"):
        FileTeacher(tmp_path / "absent").answer(asks("a", "b"))


def test_request_ids_are_unique(endpoint: Endpoint, tmp_path: Path) -> None:
    for act in (teacher(endpoint).answer, lambda r: write_requests(tmp_path / "r", r)):
        with pytest.raises(RolloutError, match="'id-a'"):
            act(asks("a", "b", "a"))
    assert endpoint.seen == []
