from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import KEY, Endpoint, Reply, asks, chat, teacher
from omegaconf import OmegaConf

from nemo_selfpref.errors import ConfigError
from nemo_selfpref.rollout.endpoint import EndpointTeacher
from nemo_selfpref.rollout.endpoint_config import EndpointConfig
from nemo_selfpref.rollout.teacher import TeacherRequest


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
    [
        "",
        "ftp://h/v1",
        "h/v1",
        "https://",
        f"https://u:{KEY}@h/v1",
        f"https://h/v1?key={KEY}",
        f"https://h/v1#{KEY}",
        "https://h:port/v1",
    ],
)
def test_bad_urls_are_refused_without_showing_them(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url") as caught:
        EndpointTeacher(EndpointConfig(url, "m"))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model": ""},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"max_tokens": 0},
        {"max_concurrency": 0},
        {"requests_per_minute": -1},
        {"timeout_s": 0.0},
        {"max_attempts": 0},
    ],
    ids=str,
)
def test_settings_out_of_range(endpoint: Endpoint, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        teacher(endpoint, **change)


@pytest.mark.parametrize("name", ["base_url", "model"])
def test_missing_settings_are_named(endpoint: Endpoint, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is "):
        teacher(endpoint, **{name: ""})


def test_config_without_values_is_a_structured_config() -> None:
    settings = OmegaConf.structured(EndpointConfig())
    assert (settings.base_url, settings.model) == ("", "")
    with pytest.raises(ConfigError, match="base_url"):
        EndpointTeacher(EndpointConfig())
    settings.base_url, settings.model = "https://host/v1", "m"
    EndpointTeacher(OmegaConf.to_object(settings))
