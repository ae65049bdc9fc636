"""The demo's external model: an OpenAI-compatible endpoint on loopback, answering by rule.

It stands in for the large model of SGPO's first step, and like one it is good but not perfect: most
improvements reach the right answer, the others repair a part.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from nemo_selfpref.demo.task import corrupt, oracle

MODEL = "demo-teacher"
_FULL_REPAIR = 0.85
_RIGHT_ANSWER = 0.9
_SLOT = r"<{0}>\n(.*?)\n</{0}>"


def reply(prompt: str) -> str:
    """The teacher's answer; the same prompt always gets the same one."""
    rng = random.Random(hashlib.sha256(prompt.encode()).digest())
    instruction = _slot("instruction", prompt)
    if instruction is None:
        right = oracle(prompt)
        return right if rng.random() < _RIGHT_ANSWER else corrupt(right, rng)
    right, draft = oracle(instruction).split(), (_slot("response_b", prompt) or "").split()
    if rng.random() < _FULL_REPAIR:
        return " ".join(right)
    return " ".join(_repair_a_part(right, draft))


def _slot(name: str, prompt: str) -> str | None:
    found = re.search(_SLOT.format(name), prompt, re.DOTALL)
    return found[1] if found else None


def _repair_a_part(right: list[str], draft: list[str]) -> list[str]:
    """The draft with its first wrong word put right."""
    for place, word in enumerate(right):
        if place >= len(draft):
            return [*draft, word]
        if draft[place] != word:
            return [*draft[:place], word, *draft[place + 1 :]]
    return right


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        if self.path != "/v1/chat/completions":
            self.send_error(404)
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        text = reply(prompt)
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text.split())}
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self._send({"object": "chat.completion", "choices": [choice], "usage": usage})

    def _send(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are counted by the run that makes them."""


@contextmanager
def serving() -> Iterator[str]:
    """Runs the endpoint on a free loopback port; yields its base URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
