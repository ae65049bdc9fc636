"""Keys and tokens are not shown, even where others repeat them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from echo_server import EchoServer, echoing
from payloads import ENVIRONMENT, KEY, TOKEN

from nemo_selfpref.errors import RolloutError
from nemo_selfpref.redact import HIDDEN, is_secret_name, redact
from nemo_selfpref.rollout.endpoint import EndpointTeacher
from nemo_selfpref.rollout.endpoint_config import EndpointConfig
from nemo_selfpref.rollout.serving.client import ServerClient
from nemo_selfpref.rollout.serving.launcher import ChildProcess, engine_environment
from nemo_selfpref.rollout.teacher import TeacherRequest


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/v1?x=1, a@b.c", "https://host/v1?x=1, a@b.c"),
        ("at https://user:pass@host/v1", f"at https://{HIDDEN}@host/v1"),
        ("at http://token@host:1/x", f"at http://{HIDDEN}@host:1/x"),
        ("{'Authorization': 'Bearer abc.def-ghi'}", f"{{'Authorization': 'Bearer {HIDDEN}'}}"),
        ("authorization: bearer xyzxyzxyz", f"authorization: bearer {HIDDEN}"),
        ("a basic knowledge, bearer of it", "a basic knowledge, bearer of it"),
        ("Bearer [hidden]", "Bearer [hidden]"),
        ("'Authorization': 'Basic dXNlcjpwYXNz=='", f"'Authorization': 'Basic {HIDDEN}'"),
        ("Incorrect API key provided: sk-abcdefgh12345.", f"Incorrect API key provided: {HIDDEN}."),
        ("hf_abcdefghijklmnop", HIDDEN),
        ("risk-free, task-force, half_baked", "risk-free, task-force, half_baked"),
        ("own-secret and own-secret-too", f"{HIDDEN} and {HIDDEN}"),
        ("value-of-variable", HIDDEN),
        ("short of eight: abc", "short of eight: abc"),
    ],
)  # fmt: skip
def test_what_is_hidden(text: str, shown: str) -> None:
    environment = {"MY_TOKEN": "value-of-variable", "KEY": "abc", "PATH": "no secret at all"}
    assert redact(text, ["own-secret", "own-secret-too"], environment) == shown


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("OPENAI_API_KEY", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("db_password", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("KEYBOARD", False),
        ("MONKEY", False),
        ("PATH", False),
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret


def test_engines_are_given_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    made = engine_environment()
    assert not ENVIRONMENT.keys() & made.keys()
    assert made["TOKENIZERS_PARALLELISM"] == "false" and made["PATH"] == os.environ["PATH"]


# -- what others say ------------------------------------------------------------------------------


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    with echoing() as server:
        yield server


def test_a_teacher_that_repeats_the_key(echo: EchoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    config = EndpointConfig(base_url=echo.url, model="m", api_key_env="TEACHER_API_KEY")
    with pytest.raises(RolloutError, match=r"HTTP 401 .*Authorization") as refused:
        EndpointTeacher(config).answer([TeacherRequest("a", "b")])
    assert echo.keys == {f"Bearer {KEY}"}
    assert KEY not in str(refused.value) and KEY not in repr(refused.value.__context__)


def test_a_rollout_server_that_repeats_the_token(echo: EchoServer) -> None:
    """Neither in what it refuses with nor in what is no answer."""
    said = json.dumps({"a": f"Token {TOKEN}"})
    for status, body in (
        (500, f"<html>{TOKEN}</html>"),
        (422, json.dumps({"error": {"kind": "refused", "message": f"no: {TOKEN}"}})),
        (200, said),
        (200, TOKEN),
    ):
        client = ServerClient("http://127.0.0.1:9", TOKEN)
        client._http = httpx.Client(
            base_url=client.url,
            transport=httpx.MockTransport(
                lambda _, status=status, body=body: httpx.Response(status, text=body)
            ),
        )
        with pytest.raises(RolloutError) as refused:
            client.info()
        shown = f"{refused.value} {refused.value.__cause__!r}"
        assert TOKEN not in shown and HIDDEN in shown


def test_the_end_of_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT["HF_TOKEN"])
    code = f"print('pull from https://me:{KEY}@host with {ENVIRONMENT['HF_TOKEN']}')"
    command = [sys.executable, "-c", code]
    ready, log = tmp_path / "ready", tmp_path / "log"
    with ChildProcess(command, ready_file=ready, log=log, env=os.environ) as child:
        child._process.wait(timeout=60)
        assert child.tail() == f"pull from https://{HIDDEN}@host with {HIDDEN}"
