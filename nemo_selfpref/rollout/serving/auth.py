"""Who may talk to a rollout server, and in what form: a bearer token on every route, bodies of
bounded size, JSON only."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Any

from nemo_selfpref.errors import ConfigError

MAX_BODY_BYTES = 256 * 2**20
_DRAIN_BYTES, _DRAIN_S = 2**20, 1.0
_Message = dict[str, Any]


def read_token(path: Path) -> str:
    """The token in a file that its owner alone can read.

    Raises:
        ConfigError: no such file, too open, or empty.
    """
    try:
        mode = path.stat().st_mode & 0o777
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the token file {path} cannot be read: {error}") from error
    if mode & 0o077:
        raise ConfigError(
            f"the token file {path} can be read by others (mode {mode:04o}): chmod 600 {path}"
        )
    if len(token) < 16:
        raise ConfigError(f"the token file {path} holds {len(token)} characters; expected 16 up")
    return token


def make_token(path: Path) -> str:
    """The file's token; a new one where there is no file yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_token(path)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(secrets.token_urlsafe(32) + "\n")
    return read_token(path)


class Guard:
    """ASGI middleware: 401 without the token, whatever the route, existing or not; 415 for a body
    that is not JSON; 413 for one that is too large. Nothing is parsed before."""

    def __init__(self, app: Any, token: str, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.app, self.token, self.max_body_bytes = app, token.encode(), max_body_bytes

    async def __call__(self, scope: _Message, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
            await _refuse(
                receive, send, 401, "a bearer token is needed: Authorization: Bearer TOKEN"
            )
            return
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        length = headers.get(b"content-length", b"0")
        has_body = scope["method"] not in ("GET", "HEAD") and (
            length != b"0" or b"transfer-encoding" in headers
        )
        if has_body and kind != b"application/json":
            await _refuse(receive, send, 415, "the body must be application/json")
            return
        if not length.isdigit() or int(length) > self.max_body_bytes:
            await _refuse(
                receive, send, 413, f"the body is larger than {self.max_body_bytes} bytes"
            )
            return
        await self._bounded(scope, receive, send)

    async def _bounded(self, scope: _Message, receive: Any, send: Any) -> None:
        """Count what comes too: a chunked body names no length."""
        seen, refused, started = 0, False, False

        async def count() -> _Message:
            nonlocal seen, refused
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body_bytes:
                refused = True
                return {"type": "http.disconnect"}
            return message

        async def answer(message: _Message) -> None:
            nonlocal started
            if refused and not started:
                return
            started = True
            await send(message)

        try:
            await self.app(scope, count, answer)
        except Exception:
            if not refused:
                raise
        if refused and not started:
            await _refuse(
                receive, send, 413, f"the body is larger than {self.max_body_bytes} bytes"
            )


async def _refuse(receive: Any, send: Any, status: int, message: str) -> None:
    """Answer, having read some of the body: a client that is cut off while it sends may never see
    the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            read, more = 0, True
            while more and read < _DRAIN_BYTES:
                part = await receive()
                read += len(part.get("body", b""))
                more = part["type"] == "http.request" and part.get("more_body", False)
    await _answer(send, status, message)


async def _answer(send: Any, status: int, message: str) -> None:
    body = ('{"error": {"kind": "refused", "message": "' + message + '"}}').encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
