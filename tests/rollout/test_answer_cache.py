from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import Endpoint, Reply, asks, chat, teacher

from nemo_selfpref.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


def test_killed_run_asks_only_for_what_was_in_flight(endpoint: Endpoint, tmp_path: Path) -> None:
    def script(prompt: str, nth: int) -> Reply:
        if prompt in "de" and nth == 1:
            endpoint.released.wait(20)
        return chat(f"re: {prompt}")

    endpoint.script = script
    cache = tmp_path / "cache.jsonl"
    code = (
        "import sys\n"
        "from nemo_selfpref.rollout.endpoint import EndpointTeacher\n"
        "from nemo_selfpref.rollout.endpoint_config import EndpointConfig\n"
        "from nemo_selfpref.rollout.teacher import TeacherRequest\n"
        "c = EndpointConfig(sys.argv[1], 'm', cache_path=sys.argv[2], max_concurrency=2)\n"
        "EndpointTeacher(c).answer([TeacherRequest(f'id-{p}', p) for p in 'abcde'])\n"
    )
    command = [sys.executable, "-c", code, endpoint.url, str(cache)]
    run = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    deadline = time.monotonic() + 15
    while len(endpoint.seen) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait(10) == -signal.SIGKILL
    answers = teacher(endpoint, cache_path=str(cache)).answer(asks(*"abcde"))
    assert answers == {f"id-{prompt}": f"re: {prompt}" for prompt in "abcde"}
    assert sorted(endpoint.prompts[5:]) == ["d", "e"]
    teacher(endpoint, cache_path=str(cache)).answer(asks(*"abcde"))
    assert len(endpoint.seen) == 7


def test_torn_last_line_is_asked_again(endpoint: Endpoint, tmp_path: Path) -> None:
    cache = tmp_path / "cache.jsonl"
    teacher(endpoint, cache_path=str(cache), max_concurrency=1).answer(asks("a", "b"))
    whole = cache.read_bytes()
    first = whole.index(b"\n") + 1
    for size in (first + 1, first + 12, len(whole) - 1):
        cache.write_bytes(whole[:size])
        endpoint.seen.clear()
        teacher(endpoint, cache_path=str(cache)).answer(asks("a", "b"))
        assert endpoint.prompts == ["b"]
        assert cache.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"{torn\n", b"\xff\n", b'{"key": "k", "answer": 1}\n', b"[]\n"])
def test_damaged_middle_line_is_an_error(endpoint: Endpoint, tmp_path: Path, damage: bytes) -> None:
    cache = tmp_path / "cache.jsonl"
    teacher(endpoint, cache_path=str(cache)).answer(asks("a"))
    line = cache.read_bytes()
    cache.write_bytes(line + damage + line)
    with pytest.raises(DataError, match=r"cache.jsonl:2: .*delete the line"):
        teacher(endpoint, cache_path=str(cache))


@pytest.mark.parametrize("text", ['{"a": 1}', "my notes", '{"a": 1}\nnotes'])
def test_a_file_that_is_no_cache_is_left_alone(
    endpoint: Endpoint, tmp_path: Path, text: str
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(DataError):
        teacher(endpoint, cache_path=str(path))
    assert path.read_text() == text


def test_cache_path_that_cannot_be_used(endpoint: Endpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cache_path"):
        teacher(endpoint, cache_path=str(tmp_path))


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"temperature": 0.0}, {"top_p": 0.5}, {"max_tokens": 9}]
)
def test_cache_is_keyed_by_the_settings(
    endpoint: Endpoint, tmp_path: Path, change: dict[str, Any]
) -> None:
    cache = str(tmp_path / "cache.jsonl")
    for more in ({}, change, {"max_concurrency": 2, "timeout_s": 9.0, **change}, {}):
        teacher(endpoint, cache_path=cache, **more).answer(asks("a"))
    assert len(endpoint.seen) == 2
    for _ in range(2):
        other = endpoint.url.replace("/v1", "/v2")
        teacher(endpoint, cache_path=cache, base_url=other).answer(asks("a"))
    assert len(endpoint.seen) == 3
