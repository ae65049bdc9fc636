"""Nobody gets past the token, on any route; and nothing that is sent is run."""

from __future__ import annotations

import http.client
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from app_server import TOKEN, ModelBackend, running
from fastapi import FastAPI

from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.rollout.serving.auth import make_token, read_token
from nemo_selfpref.rollout.serving.front_process import front_app
from nemo_selfpref.training.convert import single_process_policy
from nemo_selfpref.training.session import embedded_engine

MAX_BODY = 10_000
JSON = {"Content-Type": "application/json"}
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def backend(llama_folder: Path) -> ModelBackend:
    stop = frozenset({0, 2})
    engine = embedded_engine(single_process_policy(llama_folder)[0], stop, 8)
    return ModelBackend({"policy": engine}, stop)


@pytest.fixture(scope="module")
def app(backend: ModelBackend, tokenizer: ChatTokenizer) -> FastAPI:
    return front_app(backend, TOKEN, tokenizer, list, max_body_bytes=MAX_BODY)


@pytest.fixture(scope="module")
def url(app: FastAPI) -> Iterator[str]:
    with running(app) as url:
        yield url


def every_route(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of all that the app answers, parameters filled in."""
    found = [
        (method, re.sub(r"\{[^}]*\}", "policy", route.path))
        for route in app.routes
        for method in sorted(route.methods)  # type: ignore[attr-defined]
    ]
    paths = {path for _, path in found}
    assert {"/rollout/weights", "/rollout/fleet", "/v1/models/policy", "/v1/completions"} <= paths
    assert len(found) >= 12
    return found


def test_every_route_asks_for_the_token(app: FastAPI, url: str) -> None:
    strangers: list[dict[str, str]] = [
        {},
        {"Authorization": f"Bearer {TOKEN[:-1]}x"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"X-Api-Key": TOKEN},
    ]
    unknown = [("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/nothing")]
    others = [("HEAD", "/v1/models"), ("OPTIONS", "/rollout/weights"), ("DELETE", "/rollout/info")]
    for method, path in [*every_route(app), *unknown, *others]:
        for headers in strangers:
            assert raw(url, method, path, headers) == 401, (method, path, headers)
            # Refused before its body is read, however large that says it is.
            assert raw(url, method, path, {**headers, "Content-Length": "1000000000"}) == 401
    with httpx.Client(base_url=url) as client:
        assert client.get("/rollout/info").headers["www-authenticate"] == "Bearer"
        assert client.post("/v1/completions", json={"model": "policy"}).status_code == 401


def raw(
    url: str, method: str, path: str, headers: dict[str, str], pieces: tuple[bytes, ...] = ()
) -> int:
    """The status of a request whose body is not sent to its end: these chunks of it, or nothing."""
    where = urlsplit(url)
    with closing(http.client.HTTPConnection(where.hostname or "", where.port, timeout=20)) as to:
        to.putrequest(method, path)
        for name, value in {**JSON, **headers}.items():
            to.putheader(name, value)
        to.endheaders()
        for piece in pieces:
            to.send(b"%x\r\n%s\r\n" % (len(piece), piece))
        return to.getresponse().status


def test_the_token_opens_every_route(app: FastAPI, url: str) -> None:
    with httpx.Client(base_url=url, headers=BEARER) as client:
        for method, path in every_route(app):
            content = b"{}" if method == "POST" else b""
            reply = client.request(method, path, headers=JSON, content=content)
            assert reply.status_code not in (401, 404, 405, 413, 415), (method, path)


def test_no_description_of_the_routes_is_handed_out(url: str) -> None:
    with httpx.Client(base_url=url, headers=BEARER) as client:
        for path in ("/docs", "/redoc", "/openapi.json"):
            assert client.get(path).status_code == 404


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "boom")))  # noqa: S301
    assert (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", {400, 422}),
        ("application/octet-stream", {415}),
        ("application/x-pickle", {415}),
        ("multipart/form-data; boundary=x", {415}),
    ],
)
def test_a_pickle_is_never_opened(
    app: FastAPI, url: str, tmp_path: Path, kind: str, status: set[int]
) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "boom"))
    with httpx.Client(base_url=url, headers={**BEARER, "Content-Type": kind}) as client:
        takes = [path for method, path in every_route(app) if method == "POST"]
        for path in takes:
            reply = client.post(path, content=bomb)
            # These two take no body and look at none.
            takes_none = path in ("/rollout/sleep", "/rollout/wake") and "json" in kind
            assert reply.status_code in (status | {200} if takes_none else status), path
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("path", ["/rollout/generate", "/v1/chat/completions", "/rollout/weights"])
def test_a_body_that_is_too_large_is_refused(url: str, path: str) -> None:
    assert raw(url, "POST", path, {**BEARER, "Content-Length": str(MAX_BODY + 1)}) == 413
    assert raw(url, "POST", path, {**BEARER, "Content-Length": "-1"}) in (400, 413)
    # Chunks name no length: refused once they are too many, before there is an end to them.
    pieces = (b'{"model": "', *[b"x" * 1000] * (MAX_BODY // 1000))
    chunked = {**BEARER, "Transfer-Encoding": "chunked"}
    assert raw(url, "POST", path, chunked, pieces) == 413


def test_a_body_of_the_largest_size_is_read(url: str) -> None:
    body = b'{"model": "policy", "prompt": "a", "max_tokens": 1}'.ljust(MAX_BODY)
    with httpx.Client(base_url=url, headers={**BEARER, **JSON}) as client:
        assert client.post("/v1/completions", content=body).status_code == 200


def test_a_token_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "token"
    token = make_token(path)
    assert path.stat().st_mode & 0o777 == 0o600 and len(token) >= 32
    assert make_token(path) == read_token(path) == token
    for mode in (0o644, 0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600 {path}"):
            read_token(path)
        with pytest.raises(ConfigError, match="can be read by others"):
            make_token(path)
    path.chmod(0o600)
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="holds 5 characters"):
        read_token(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "none")
