from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nemo_selfpref.errors import ConfigError, DataError, RolloutError
from nemo_selfpref.rollout.teacher import (
    MAX_REPLY_BYTES,
    EndpointConfig,
    EndpointTeacher,
    FileTeacher,
    TeacherRequest,
    write_requests,
)

ROOT = Path(__file__).parents[2]
KEY = "sk-very-secret-0123456789"


@dataclass
class Reply:
    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    dribble: int = 0
    """Blanks sent ahead of the body, one every 50 ms."""


def chat(text: str | None, finish: str = "stop", **more: Any) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    return Reply({"choices": [{**choice, "finish_reason": finish}], "usage": usage} | more)


class Endpoint:
    """A chat completions server; `script(prompt, nth time of this prompt)` decides each reply."""

    def __init__(self) -> None:
        self.script: Callable[[str, int], Reply] = lambda prompt, nth: chat(f"re: {prompt}")
        self.seen: list[dict[str, Any]] = []
        self.active = self.peak = 0
        self.released = threading.Event()
        self._lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def prompts(self) -> list[str]:
        return [request["prompt"] for request in self.seen]

    def note(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[str, int]:
        prompt = body["messages"][0]["content"]
        with self._lock:
            self.active += 1
            self.peak = max(self.peak, self.active)
            seen = {"path": path, "headers": headers, "body": body, "prompt": prompt}
            self.seen.append(seen | {"at": time.monotonic()})
            return prompt, self.prompts.count(prompt)

    def done(self) -> None:
        with self._lock:
            self.active -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                reply = endpoint.script(*endpoint.note(self.path, dict(self.headers), body))
                raw = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body)
                data = raw if isinstance(raw, bytes) else raw.encode()
                endpoint.done()
                try:
                    self.send_response(reply.status)
                    length = str(len(data) + reply.dribble)
                    for name, value in {**reply.headers, "Content-Length": length}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    for _ in range(reply.dribble):
                        self.wfile.write(b" ")
                        time.sleep(0.05)
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                return

        return Handler


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.released.set()
    endpoint.server.shutdown()
    endpoint.server.server_close()


def config(endpoint: Endpoint, **changes: Any) -> EndpointConfig:
    return EndpointConfig(**{"base_url": endpoint.url, "model": "m", "timeout_s": 5.0} | changes)


def teacher(endpoint: Endpoint, **changes: Any) -> EndpointTeacher:
    return EndpointTeacher(config(endpoint, **changes), backoff_s=0.01)


def asks(*prompts: str) -> list[TeacherRequest]:
    return [TeacherRequest(f"id-{prompt}", prompt) for prompt in prompts]


def test_answers_by_id_with_the_sampling_settings(endpoint: Endpoint) -> None:
    done: list[int] = []
    ask = teacher(endpoint, temperature=0.3, top_p=0.9, max_tokens=77)
    assert ask.answer(asks("a", "b\u2028é\ud800"), done.append) == {
        "id-a": "re: a",
        "id-b\u2028é\ud800": "re: b\u2028é?",
    }
    assert done == [1, 2]
    assert endpoint.seen[0]["path"] == "/v1/chat/completions"
    body = endpoint.seen[0]["body"]
    assert body.pop("messages")[0]["role"] == "user"
    assert body == {"model": "m", "temperature": 0.3, "top_p": 0.9, "max_tokens": 77}
    assert "Authorization" not in endpoint.seen[0]["headers"]


def test_key_comes_from_the_environment(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    full_url = f"{endpoint.url}/chat/completions/"
    teacher(endpoint, api_key_env="MY_KEY", base_url=full_url).answer(asks("a"))
    assert endpoint.seen[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert endpoint.seen[0]["path"] == "/v1/chat/completions"


@pytest.mark.parametrize("value", [None, " ", f"{KEY} x", f"{KEY}\u00e9"])
def test_unusable_key_is_named_but_not_shown(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ConfigError, match="MY_KEY") as caught:
        teacher(endpoint, api_key_env="MY_KEY")
    assert KEY not in str(caught.value)


def test_401_is_not_retried_and_hides_the_key(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    # The key straddles the place where a long message is cut.
    endpoint.script = lambda prompt, nth: Reply(b"x" * 330 + KEY.encode() * 4, 401)
    with pytest.raises(RolloutError, match=r"'id-a': HTTP 401 .*api_key_env") as caught:
        teacher(endpoint, api_key_env="MY_KEY").answer(asks("a"))
    assert "sk-very" not in str(caught.value) and "[API key]" in str(caught.value)
    assert len(endpoint.seen) == 1


def test_retry_after_is_honoured(endpoint: Endpoint) -> None:
    limited = Reply({"error": "slow down"}, 429, {"Retry-After": "1"})
    endpoint.script = lambda prompt, nth: limited if nth == 1 else chat("ok")
    assert teacher(endpoint).answer(asks("a")) == {"id-a": "ok"}
    assert endpoint.seen[1]["at"] - endpoint.seen[0]["at"] >= 1.0


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, 529])
def test_transient_status_twice_then_ok(endpoint: Endpoint, status: int) -> None:
    headers = {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}
    endpoint.script = lambda prompt, nth: Reply("no", status, headers) if nth < 3 else chat("ok")
    assert teacher(endpoint).answer(asks("a")) == {"id-a": "ok"}
    assert len(endpoint.seen) == 3


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e9", "", "soon"])
def test_a_nonsensical_retry_after_is_ignored(endpoint: Endpoint, value: str) -> None:
    limited = Reply("no", 429, {"Retry-After": value})
    endpoint.script = lambda prompt, nth: limited if nth == 1 else chat("ok")
    started = time.monotonic()
    assert teacher(endpoint).answer(asks("a")) == {"id-a": "ok"}
    assert time.monotonic() - started < 2


def test_a_reply_without_end_is_given_up(endpoint: Endpoint) -> None:
    endpoint.script = lambda prompt, nth: Reply(b" " * (MAX_REPLY_BYTES + 2**16))
    with pytest.raises(RolloutError, match="more than"):
        teacher(endpoint).answer(asks("a"))
    assert len(endpoint.seen) == 1


def test_attempts_are_bounded(endpoint: Endpoint) -> None:
    endpoint.script = lambda prompt, nth: Reply("overloaded", 500)
    with pytest.raises(RolloutError, match=r"'id-a': HTTP 500 .*overloaded.*after 3 attempts"):
        teacher(endpoint, max_attempts=3).answer(asks("a"))
    assert len(endpoint.seen) == 3


def test_hanging_connection_times_out_and_is_retried(endpoint: Endpoint) -> None:
    def script(prompt: str, nth: int) -> Reply:
        if nth == 1:
            endpoint.released.wait(10)
        return chat("ok")

    endpoint.script = script
    assert teacher(endpoint, timeout_s=0.3).answer(asks("a")) == {"id-a": "ok"}
    assert len(endpoint.seen) == 2


def test_dribbling_reply_meets_the_deadline(endpoint: Endpoint) -> None:
    endpoint.script = lambda prompt, nth: Reply(b"{}", dribble=100)
    started = time.monotonic()
    with pytest.raises(RolloutError, match="no whole reply in 0.3 s"):
        teacher(endpoint, timeout_s=0.3, max_attempts=1).answer(asks("a"))
    assert time.monotonic() - started < 2


def test_unreachable_server(endpoint: Endpoint) -> None:
    endpoint.server.server_close()
    with pytest.raises(RolloutError, match="ConnectError.*after 2 attempts"):
        teacher(endpoint, max_attempts=2).answer(asks("a"))


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"[" * 100_000, [], {}, {"choices": []}, {"choices": [{"message": None}]}]
    + [{"choices": [{"message": {"content": [1]}}]}, {"error": {"message": "upstream"}}],
    ids=str,
)
def test_malformed_reply_is_a_clear_error(endpoint: Endpoint, body: Any) -> None:
    endpoint.script = lambda prompt, nth: Reply(body)
    with pytest.raises(RolloutError, match=r"'id-a': no chat completion in HTTP 200 .*base_url"):
        teacher(endpoint).answer(asks("a"))
    assert len(endpoint.seen) == 1


def test_redirects_are_not_followed(endpoint: Endpoint) -> None:
    endpoint.script = lambda prompt, nth: Reply("", 307, {"Location": f"{endpoint.url}/elsewhere"})
    with pytest.raises(RolloutError, match="HTTP 307.*redirects are not followed"):
        teacher(endpoint).answer(asks("a"))
    assert len(endpoint.seen) == 1


@pytest.mark.parametrize(
    "reply",
    [
        chat(""),
        chat(" \n"),
        chat(None),
        chat("half an ans", "content_filter"),
        Reply({"error": {"code": "content_filter"}}, 400),
    ],
)
def test_empty_and_refused_answers(endpoint: Endpoint, tmp_path: Path, reply: Reply) -> None:
    endpoint.script = lambda prompt, nth: reply
    cache = str(tmp_path / "cache.jsonl")
    for _ in range(2):
        assert teacher(endpoint, cache_path=cache).answer(asks("a")) == {"id-a": ""}
    assert len(endpoint.seen) == 1


def test_costs_are_counted_and_equal_prompts_asked_once(endpoint: Endpoint) -> None:
    endpoint.script = lambda prompt, nth: chat(prompt, "length") if prompt == "b" else chat("x")
    ask = teacher(endpoint)
    twins = [TeacherRequest("1", "a" * 9), TeacherRequest("2", "a" * 9), TeacherRequest("3", "b")]
    assert ask.estimate_tokens(twins) == 3 + 1
    assert ask.answer(twins) == {"1": "x", "2": "x", "3": "b"}
    cost = ask.cost()
    assert (cost.calls, cost.prompt_tokens, cost.completion_tokens) == (2, 6, 10)
    assert (cost.cached, cost.cut_off) == (0, 1)
    ask.answer(twins)
    assert (ask.cost().calls, ask.cost().cached) == (2, 3)
    assert ask.estimate_tokens(twins) == 0


@pytest.mark.parametrize("usage", [None, "many", {"prompt_tokens": -1, "completion_tokens": 2.5}])
def test_a_server_that_does_not_count_is_fine(endpoint: Endpoint, usage: Any) -> None:
    endpoint.script = lambda prompt, nth: chat("ok", usage=usage)
    ask = teacher(endpoint)
    assert ask.answer(asks("a")) == {"id-a": "ok"}
    assert (ask.cost().prompt_tokens, ask.cost().completion_tokens) == (0, 0)


def test_concurrency_stays_at_the_limit(endpoint: Endpoint) -> None:
    def script(prompt: str, nth: int) -> Reply:
        time.sleep(0.02)
        return chat("ok")

    endpoint.script = script
    done: list[int] = []
    teacher(endpoint, max_concurrency=3).answer(asks(*map(str, range(30))), done.append)
    assert endpoint.peak == 3
    assert done == list(range(1, 31))


def test_requests_per_minute_spaces_the_requests(endpoint: Endpoint) -> None:
    teacher(endpoint, requests_per_minute=1200).answer(asks(*"abcdef"))
    times = [request["at"] for request in endpoint.seen]
    assert max(times) - min(times) >= 0.2


def test_one_failure_stops_the_rest_and_keeps_what_came(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.script = lambda prompt, nth: Reply("bad", 400) if prompt == "5" else chat("ok")
    cache = tmp_path / "deep" / "cache.jsonl"
    many = asks(*map(str, range(200)))
    with pytest.raises(RolloutError, match="'id-5': HTTP 400"):
        teacher(endpoint, max_concurrency=2, cache_path=str(cache)).answer(many)
    assert len(endpoint.seen) < 200
    saved = cache.read_text().count("\n")
    assert saved == len(endpoint.seen) - 1
    endpoint.script = lambda prompt, nth: chat("ok")
    resumed = teacher(endpoint, cache_path=str(cache))
    assert set(resumed.answer(many).values()) == {"ok"}
    assert (resumed.cost().cached, resumed.cost().calls) == (saved, 200 - saved)


def test_one_failure_ends_the_waits_of_the_others(endpoint: Endpoint) -> None:
    def script(prompt: str, nth: int) -> Reply:
        if prompt == "wait":
            return Reply("later", 429, {"Retry-After": "60"})
        time.sleep(0.2)
        return Reply("bad", 400)

    endpoint.script = script
    started = time.monotonic()
    with pytest.raises(RolloutError, match="'id-bad': HTTP 400"):
        teacher(endpoint).answer(asks("wait", "bad"))
    assert time.monotonic() - started < 5
    assert endpoint.prompts.count("wait") == 1


def test_an_error_of_the_caller_stops_the_run(endpoint: Endpoint) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher(endpoint, max_concurrency=1).answer(asks(*map(str, range(200))), interrupt)
    sent = len(endpoint.seen)
    time.sleep(0.1)
    assert len(endpoint.seen) == sent < 200


def test_killed_run_asks_only_for_what_was_in_flight(endpoint: Endpoint, tmp_path: Path) -> None:
    def script(prompt: str, nth: int) -> Reply:
        if prompt in "de" and nth == 1:
            endpoint.released.wait(20)
        return chat(f"re: {prompt}")

    endpoint.script = script
    cache = tmp_path / "cache.jsonl"
    code = (
        "import sys; from nemo_selfpref.rollout.teacher import *\n"
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
    with pytest.raises(DataError, match="cache.jsonl:2: .*delete the line"):
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


def test_loopback_ignores_a_proxy(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert teacher(endpoint, max_attempts=1).answer(asks("a")) == {"id-a": "re: a"}


@pytest.mark.parametrize("host", ["example.com", "10.0.0.1", "127.0.0.1.example.com", "0.0.0.0"])
def test_plain_http_leaves_the_machine_only_on_request(host: str) -> None:
    with pytest.raises(ConfigError, match=f"http:// to {host}.*allow_insecure_http"):
        EndpointTeacher(EndpointConfig(f"http://{host}/v1", "m"))
    EndpointTeacher(EndpointConfig(f"http://{host}/v1", "m", allow_insecure_http=True))
    EndpointTeacher(EndpointConfig(f"https://{host}/v1", "m"))
    EndpointTeacher(EndpointConfig("http://[::1]:8000/v1", "m"))


@pytest.mark.parametrize(
    "url",
    ["", "ftp://h/v1", "h/v1", "https://", f"https://u:{KEY}@h/v1", f"https://h/v1?key={KEY}"]
    + [f"https://h/v1#{KEY}", "https://h:port/v1"],
)
def test_bad_urls_are_refused_without_showing_them(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url") as caught:
        EndpointTeacher(EndpointConfig(url, "m"))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"model": ""}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}]
    + [{"top_p": 1.1}, {"max_tokens": 0}, {"max_concurrency": 0}, {"requests_per_minute": -1}]
    + [{"timeout_s": 0.0}, {"max_attempts": 0}],
    ids=str,
)
def test_settings_out_of_range(endpoint: Endpoint, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        teacher(endpoint, **change)


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
        RolloutError, match="no answer to 4 of 5 .*id-b, id-c, id-d; run the request"
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
    with pytest.raises(DataError, match="absent"):
        FileTeacher(tmp_path / "absent")


def test_request_ids_are_unique(endpoint: Endpoint, tmp_path: Path) -> None:
    for act in (teacher(endpoint).answer, lambda r: write_requests(tmp_path / "r", r)):
        with pytest.raises(RolloutError, match="'id-a'"):
            act(asks("a", "b", "a"))
    assert endpoint.seen == []
