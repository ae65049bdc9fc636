"""ServerClient against a server that says what a test wants said, right or wrong."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nemo_selfpref import errors
from nemo_selfpref.errors import (
    RolloutCancelled,
    RolloutError,
    RolloutRefused,
    RolloutTimeout,
    StaleWeightsError,
    WeightSyncError,
)
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving import client as module
from nemo_selfpref.rollout.serving.client import ServerClient
from nemo_selfpref.rollout.serving.wire import GenerateCall, ParamsRecord, RequestRecord, Stamp
from nemo_selfpref.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    LabelScores,
    SamplingParams,
    WeightSet,
)

TOKEN = "secret of sixteen and more"
HELD = Stamp(version=4, digest="held")
ASKED = [GenerationRequest("b", (5, 6), 1), GenerationRequest("a", (7,), 2, 9)]
PARAMS = SamplingParams(max_new_tokens=16, temperature=0.5)
Say = Callable[[Any], None]


class ScriptedServer:
    """Answers every call with what `script` says: it is given what was asked, and `say`, which
    sends one line. A value that is not a string goes out as JSON."""

    def __init__(self) -> None:
        self.script: Callable[[dict[str, Any], Say], None] = lambda asked, say: None
        self.status, self.asked, self.tokens = 200, [], []
        self.over = threading.Event()
        self.hung_up = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked = {"path": self.path, **(json.loads(body) if body else {})}
                outer.asked.append(asked)
                outer.tokens.append(self.headers["Authorization"])
                self.send_response(outer.status)
                self.end_headers()
                try:
                    outer.script(asked, self.say)
                except OSError:
                    outer.hung_up.set()

            do_GET = do_POST

            def say(self, line: Any) -> None:
                text = line if isinstance(line, str) else json.dumps(line)
                self.wfile.write(text.encode() + b"\n")
                self.wfile.flush()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def lines(self, *lines: Any) -> None:
        def script(asked: dict[str, Any], say: Say) -> None:
            for line in lines:
                say(line)

        self.script = script

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


@pytest.fixture
def client(server: ScriptedServer) -> Iterator[ServerClient]:
    client = ServerClient(server.url + "/", TOKEN)
    yield client
    client.close()


def completion(id: str, token: int = 9, **changes: Any) -> dict[str, Any]:
    record = {
        "id": id,
        "token_ids": [token, 2],
        "logprobs": [-0.5, -0.25],
        "finish_reason": "stop",
        "weight_set": "policy",
        "weight_version": HELD.version,
        "weight_digest": HELD.digest,
    }
    return {"completion": {**record, **changes}}


def label(index: int, *logprobs: float) -> dict[str, Any]:
    return {"label": {"index": index, "logprobs": logprobs or (-1.0, -2.0), "best": -0.5}}


def test_answers_come_back_in_the_order_asked(server: ScriptedServer, client: ServerClient) -> None:
    server.lines({}, completion("1", 8, cached_tokens=3), {}, completion("0", 7), {"done": 2})
    seen: list[tuple[int, int]] = []
    found = client.generate(ASKED, PARAMS, on_done=lambda *done: seen.append(done))
    rest = (2,), (-0.5, -0.25), FinishReason.STOP, WeightSet.POLICY, 4
    assert found == [
        Completion("b", (7, *rest[0]), *rest[1:]),
        Completion("a", (8, *rest[0]), *rest[1:], cached_tokens=3),
    ]
    assert seen == [(1, 2), (1, 2)]


def test_what_is_asked(server: ScriptedServer, client: ServerClient) -> None:
    server.lines(completion("0"), completion("1"), {"done": 2})
    client.generate(ASKED, PARAMS)
    assert server.tokens == [f"Bearer {TOKEN}"]
    assert server.asked[0] == {
        "path": "/rollout/generate",
        "weight_set": "policy",
        "expect": None,
        "timeout_s": None,
        "requests": [
            {"id": "0", "prompt_ids": [5, 6], "seed": 1, "max_new_tokens": None},
            {"id": "1", "prompt_ids": [7], "seed": 2, "max_new_tokens": 9},
        ],
        "params": {
            "max_new_tokens": 16,
            "temperature": 0.5,
            "top_p": 1.0,
            "top_k": 0,
            "stop_token_ids": [],
        },
    }
    client.generate(ASKED, PARAMS, until=Until.within(30.0))
    assert 0 < server.asked[1]["timeout_s"] <= 30.0


def test_ids_may_repeat(server: ScriptedServer, client: ServerClient) -> None:
    server.lines(completion("1", 8), completion("0", 7), {"done": 2})
    found = client.generate([GenerationRequest("x", (5,)), GenerationRequest("x", (6,))], PARAMS)
    assert [(c.id, c.token_ids[0]) for c in found] == [("x", 7), ("x", 8)]


def test_label_scores(server: ScriptedServer, client: ServerClient) -> None:
    server.lines(label(1, -3.0, -4.0), {}, label(0, -1.0, -2.0), {"done": 2})
    seen: list[tuple[int, int]] = []
    found = client.label_scores(
        [(5,), (6, 7)], (10, 11), WeightSet.EMA, on_done=lambda *done: seen.append(done)
    )
    assert found == [LabelScores((-1.0, -2.0), -0.5), LabelScores((-3.0, -4.0), -0.5)]
    assert seen == [(1, 0), (1, 0)]
    asked = server.asked[0]
    assert asked["path"] == "/rollout/labels" and asked["weight_set"] == "ema"
    assert (asked["prompts"], asked["labels"]) == ([[5], [6, 7]], [10, 11])


def test_nothing_to_ask_is_not_asked(server: ScriptedServer, client: ServerClient) -> None:
    assert client.generate([], PARAMS) == [] and client.label_scores([], (10, 11)) == []
    assert server.asked == []


@pytest.mark.parametrize(
    ("request_", "params", "message"),
    [
        (GenerationRequest("x", (-1,)), PARAMS, r"prompt_ids\.0: .* got -1"),
        (GenerationRequest("x", (5,), seed=2**63), PARAMS, "seed: "),
        (GenerationRequest("x", (5,), max_new_tokens=0), PARAMS, "max_new_tokens: "),
        (GenerationRequest("x", (5,)), SamplingParams(0), "max_new_tokens: "),
        (GenerationRequest("x", (5,)), SamplingParams(4, temperature=-1.0), "temperature: "),
        (GenerationRequest("x", (5,)), SamplingParams(4, top_p=0.0), "top_p: "),
    ],
    ids=lambda value: str(value)[:70],
)
def test_what_cannot_be_asked_is_not(
    server: ScriptedServer,
    client: ServerClient,
    request_: GenerationRequest,
    params: SamplingParams,
    message: str,
) -> None:
    with pytest.raises(RolloutError, match=f"this cannot be asked of {server.url}: {message}"):
        client.generate([request_], params)
    with pytest.raises(RolloutError, match="cannot be asked"):
        client.label_scores([(5,)], ())
    assert server.asked == []


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([completion("2")], "an answer nobody asked for"),
        ([completion("0"), completion("0")], "an answer nobody asked for"),
        ([completion("b")], "an answer nobody asked for"),
        ([label(0)], "an answer nobody asked for"),
        ([completion("0"), {"done": 2}], "1 of 2 answers did not come"),
        ([{"done": 0}], "2 of 2 answers did not come"),
        ([completion("0"), completion("1")], "the reply was cut short"),
        ([], "the reply was cut short"),
        ([{}, {}], "the reply was cut short"),
        ([completion("0", logprobs=[-0.5])], "2 tokens with 1 log-probs"),
        ([completion("0", token_ids=[], logprobs=[])], "0 tokens with 0 log-probs"),
        ([completion("0", token_ids=[-1, 2])], "token_ids"),
        ([completion("0", logprobs=[float("nan"), 0.0])], "logprobs"),
        ([completion("0", finish_reason="abort")], "finish_reason"),
        ([completion("0", more=1)], "more"),
        (["not JSON"], "JSON"),
        (['{"completion": {"id": "0", "tok'], "JSON"),
        (["[]"], "object"),
        (["null"], "object"),
    ],
    ids=lambda value: str(value)[:70],
)
def test_a_server_that_breaks_the_contract_is_not_believed(
    server: ScriptedServer, client: ServerClient, lines: list[Any], message: str
) -> None:
    server.lines(*lines)
    with pytest.raises(RolloutError, match=f"{server.url} broke the contract: .*{message}"):
        client.generate(ASKED, PARAMS)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([label(2)], "a score nobody asked for"),
        ([label(0), label(0)], "a score nobody asked for"),
        ([label(-1)], "a score nobody asked for"),
        ([completion("0")], "a score nobody asked for"),
        ([label(0, -1.0)], "1 scores for 2 labels"),
        ([label(0, -1.0, -2.0, -3.0)], "3 scores for 2 labels"),
        ([label(1), {"done": 1}], "1 of 2 scores did not come"),
        ([label(0), label(1)], "the reply was cut short"),
    ],
    ids=lambda value: str(value)[:70],
)
def test_nor_are_its_scores(
    server: ScriptedServer, client: ServerClient, lines: list[Any], message: str
) -> None:
    server.lines(*lines)
    with pytest.raises(RolloutError, match=f"{server.url} broke the contract: {message}"):
        client.label_scores([(5,), (6,)], (10, 11))


def test_answers_of_other_weights_are_refused(server: ScriptedServer) -> None:
    client = ServerClient(server.url, TOKEN, expect=lambda name: HELD)
    server.lines(completion("0"), completion("1"), {"done": 2})
    assert len(client.generate(ASKED, PARAMS)) == 2
    assert server.asked[0]["expect"] == {"version": 4, "digest": "held"}
    for change in (
        {"weight_version": 3},
        {"weight_version": 5},
        {"weight_digest": "other"},
        {"weight_set": "ema"},
    ):
        server.lines(completion("0"), completion("1", **change), {"done": 2})
        with pytest.raises(
            StaleWeightsError, match=r"asked for policy version 4 .*: the answer is"
        ):
            client.generate(ASKED, PARAMS)
    client.close()


def test_without_an_expectation_the_set_still_counts(
    server: ScriptedServer, client: ServerClient
) -> None:
    server.lines(completion("0", weight_version=7), completion("1"), {"done": 2})
    assert client.generate(ASKED, PARAMS)[0].weight_version == 7
    server.lines(completion("0", weight_set="ema"))
    with pytest.raises(StaleWeightsError, match=r"answered with ema version 4 .*asked for policy"):
        client.generate(ASKED, PARAMS)


def test_an_id_twice_in_one_call_is_refused(server: ScriptedServer, client: ServerClient) -> None:
    twin = RequestRecord(id="x", prompt_ids=[5])
    call = GenerateCall(requests=[twin, twin], params=ParamsRecord(max_new_tokens=1))
    with pytest.raises(RolloutError, match="id comes twice in one call"):
        next(client.stream_generate(call))
    assert server.asked == []


# -- errors that the server tells -----------------------------------------------------------------

KINDS = [
    ("RolloutError", RolloutError),
    ("RolloutTimeout", RolloutTimeout),
    ("RolloutCancelled", RolloutCancelled),
    ("RolloutRefused", RolloutRefused),
    ("StaleWeightsError", StaleWeightsError),
    ("WeightSyncError", WeightSyncError),
    ("ConfigError", RolloutError),
    ("SelfPrefError", RolloutError),
    ("annotations", RolloutError),
    ("KeyError", RolloutError),
    ("__name__", RolloutError),
]


@pytest.mark.parametrize(("kind", "wanted"), KINDS)
def test_an_error_keeps_its_kind(
    server: ScriptedServer, client: ServerClient, kind: str, wanted: type[RolloutError]
) -> None:
    said = {"error": {"kind": kind, "message": "what was wrong"}}
    server.lines(completion("0"), said)
    with pytest.raises(RolloutError, match=f"{server.url}: what was wrong") as caught:
        client.generate(ASKED, PARAMS)
    assert type(caught.value) is wanted
    server.status = 409
    server.lines(said)
    for ask in (lambda: client.generate(ASKED, PARAMS), client.health, client.sleep):
        with pytest.raises(RolloutError, match=f"{server.url}: what was wrong") as caught:
            ask()
        assert type(caught.value) is wanted


def test_every_kind_of_ours_is_known() -> None:
    ours = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, RolloutError)
    }
    assert ours <= {name for name, kind in KINDS if kind.__name__ == name}


@pytest.mark.parametrize("text", ["<html>no</html>", "", "{}", '{"error": 3}', "[]", '{"error": {'])
def test_an_error_that_is_none_of_ours(
    server: ScriptedServer, client: ServerClient, text: str
) -> None:
    server.status = 502
    server.lines(text)
    for ask in (lambda: client.generate(ASKED, PARAMS), client.info):
        with pytest.raises(RolloutError, match=f"{server.url}: status 502: "):
            ask()


@pytest.mark.parametrize(
    ("status", "said", "wanted"),
    [
        (422, {"error": {"kind": "invalid", "message": "what was wrong"}}, RolloutRefused),
        (422, {"error": {"kind": "RolloutRefused", "message": "no"}}, RolloutRefused),
        (400, {"error": {"kind": "DataError", "message": "no"}}, RolloutRefused),
        (413, {"error": {"kind": "refused", "message": "too large"}}, RolloutRefused),
        (415, "<html>no</html>", RolloutRefused),
        # What another server, or this one later, may answer all the same.
        (422, {"error": {"kind": "RolloutError", "message": "it is quarantined"}}, RolloutError),
        (401, {"error": {"kind": "refused", "message": "a token is needed"}}, RolloutError),
        (404, "<html>no</html>", RolloutError),
        (409, {"error": {"kind": "other", "message": "no"}}, RolloutError),
        (429, "", RolloutError),
        (500, {"error": {"kind": "KeyError", "message": "no"}}, RolloutError),
    ],
)
def test_a_callers_mistake_is_told_from_a_servers_trouble(
    server: ScriptedServer,
    client: ServerClient,
    status: int,
    said: Any,
    wanted: type[RolloutError],
) -> None:
    server.status = status
    server.lines(said)
    for ask in (lambda: client.generate(ASKED, PARAMS), client.info):
        with pytest.raises(RolloutError, match=server.url) as caught:
            ask()
        assert type(caught.value) is wanted


def test_another_address_is_not_followed(server: ScriptedServer, client: ServerClient) -> None:
    server.status = 307
    with pytest.raises(RolloutError, match="status 307"):
        client.generate(ASKED, PARAMS)
    assert len(server.asked) == 1


def test_a_reply_of_another_form(server: ScriptedServer, client: ServerClient) -> None:
    server.lines({"status": "well"})
    with pytest.raises(RolloutError, match="broke the contract"):
        client.health()


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = ServerClient(url, TOKEN)
    for ask in (lambda: client.generate(ASKED, PARAMS), client.health):
        with pytest.raises(RolloutError, match=f"{url}.*ConnectError"):
            ask()
    client.close()


# -- giving up ------------------------------------------------------------------------------------


def hang(server: ScriptedServer, *first: Any) -> None:
    """Say these lines and then nothing more, without hanging up."""

    def script(asked: dict[str, Any], say: Say) -> None:
        for line in first:
            say(line)
        server.over.wait(60)

    server.script = script


def beat(server: ScriptedServer, *first: Any) -> None:
    """Say these lines and then only that work goes on."""

    def script(asked: dict[str, Any], say: Say) -> None:
        for line in first:
            say(line)
        while not server.over.wait(0.02):
            say({})

    server.script = script


@pytest.mark.parametrize("behave", [hang, beat])
def test_a_deadline_is_kept_whatever_the_server_does(
    server: ScriptedServer, client: ServerClient, behave: Callable[..., None]
) -> None:
    behave(server, completion("0"))
    with pytest.raises(RolloutTimeout, match="not done by the deadline"):
        client.generate(ASKED, PARAMS, until=Until.within(0.3))
    behave(server, label(0))
    with pytest.raises(RolloutTimeout, match="not done by the deadline"):
        client.label_scores([(5,), (6,)], (10, 11), until=Until.within(0.3))


@pytest.mark.parametrize("behave", [hang, beat])
def test_a_cancellation_too(
    server: ScriptedServer, client: ServerClient, behave: Callable[..., None]
) -> None:
    behave(server, completion("0"))
    seen: list[int] = []
    with pytest.raises(RolloutCancelled):
        client.generate(
            ASKED,
            PARAMS,
            on_done=lambda answers, _: seen.append(answers),
            until=Until(cancelled=lambda: bool(seen)),
        )
    assert seen == [1]


def test_what_is_over_is_not_asked(server: ScriptedServer, client: ServerClient) -> None:
    with pytest.raises(RolloutTimeout):
        client.generate(ASKED, PARAMS, until=Until.within(0.0))
    with pytest.raises(RolloutCancelled):
        client.label_scores([(5,)], (10, 11), until=Until(cancelled=lambda: True))
    assert server.asked == []


def test_a_server_that_falls_silent_is_taken_for_dead(
    server: ScriptedServer, client: ServerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.3)
    hang(server, completion("0"))
    with pytest.raises(RolloutTimeout, match="no answer in time"):
        client.generate(ASKED, PARAMS)
    with pytest.raises(RolloutTimeout, match=r"no answer within 0\.2 s"):
        client.health(timeout_s=0.2)


def slowly(server: ScriptedServer) -> None:
    def script(asked: dict[str, Any], say: Say) -> None:
        for _ in range(6):
            time.sleep(0.1)
            say({})
        for line in (completion("0"), completion("1"), {"done": 2}):
            say(line)

    server.script = script


def test_a_server_that_is_slow_is_waited_for(
    server: ScriptedServer, client: ServerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.5)
    slowly(server)
    assert len(client.generate(ASKED, PARAMS)) == 2


def test_whoever_gives_up_hangs_up(server: ScriptedServer, client: ServerClient) -> None:
    """So that the server can end the work."""
    beat(server, completion("0"))

    def fail(answers: int, tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.generate(ASKED, PARAMS, on_done=fail)
    assert server.hung_up.wait(30)
    server.hung_up.clear()
    with pytest.raises(RolloutTimeout):
        client.generate(ASKED, PARAMS, until=Until.within(0.2))
    assert server.hung_up.wait(30)
    server.hung_up.clear()
    server.script = lambda asked, say: [say(completion("7")) for _ in iter(int, 1)]  # no end
    with pytest.raises(RolloutError, match="nobody asked for"):
        client.generate(ASKED, PARAMS)
    assert server.hung_up.wait(30)


def test_calls_at_once(server: ScriptedServer, client: ServerClient) -> None:
    """Every call has its own lines."""
    barrier = threading.Barrier(8, timeout=30)

    def script(asked: dict[str, Any], say: Say) -> None:
        barrier.wait()
        for request in asked["requests"]:
            say(completion(request["id"], request["prompt_ids"][0]))
        say({"done": 2})

    server.script = script
    found: dict[int, list[Completion]] = {}

    def ask(number: int) -> None:
        asked = [GenerationRequest("x", (100 * number + i,)) for i in range(2)]
        found[number] = client.generate(asked, PARAMS)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {n: [c.token_ids[0] for c in made] for n, made in found.items()} == {
        n: [100 * n, 100 * n + 1] for n in range(8)
    }
