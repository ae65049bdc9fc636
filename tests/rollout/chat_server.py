"""A chat completions server for the tests of what talks to one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nemo_selfpref.rollout.endpoint import EndpointTeacher
from nemo_selfpref.rollout.endpoint_config import EndpointConfig
from nemo_selfpref.rollout.teacher import TeacherRequest

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


def config(endpoint: Endpoint, **changes: Any) -> EndpointConfig:
    return EndpointConfig(**{"base_url": endpoint.url, "model": "m", "timeout_s": 5.0} | changes)


def teacher(endpoint: Endpoint, **changes: Any) -> EndpointTeacher:
    return EndpointTeacher(config(endpoint, **changes), backoff_s=0.01)


def asks(*prompts: str) -> list[TeacherRequest]:
    return [TeacherRequest(f"id-{prompt}", prompt) for prompt in prompts]
