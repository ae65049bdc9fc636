from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import KEY, Endpoint, Reply, asks, chat, teacher

from nemo_selfpref.errors import RolloutError
from nemo_selfpref.rollout.endpoint import MAX_REPLY_BYTES


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
    with pytest.raises(RolloutError, match=r"no whole reply in 0.3 s"):
        teacher(endpoint, timeout_s=0.3, max_attempts=1).answer(asks("a"))
    assert time.monotonic() - started < 2


def test_unreachable_server(endpoint: Endpoint) -> None:
    endpoint.server.server_close()
    with pytest.raises(RolloutError, match=r"ConnectError.*after 2 attempts"):
        teacher(endpoint, max_attempts=2).answer(asks("a"))


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[" * 100_000,
        [],
        {},
        {"choices": []},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": [1]}}]},
        {"error": {"message": "upstream"}},
    ],
    ids=str,
)
def test_malformed_reply_is_a_clear_error(endpoint: Endpoint, body: Any) -> None:
    endpoint.script = lambda prompt, nth: Reply(body)
    with pytest.raises(RolloutError, match=r"'id-a': no chat completion in HTTP 200 .*base_url"):
        teacher(endpoint).answer(asks("a"))
    assert len(endpoint.seen) == 1


def test_redirects_are_not_followed(endpoint: Endpoint) -> None:
    endpoint.script = lambda prompt, nth: Reply("", 307, {"Location": f"{endpoint.url}/elsewhere"})
    with pytest.raises(RolloutError, match=r"HTTP 307.*redirects are not followed"):
        teacher(endpoint).answer(asks("a"))
    assert len(endpoint.seen) == 1


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
