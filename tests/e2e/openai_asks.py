"""What the real OpenAI client gets from a server: URL TOKEN_FILE; prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import openai

HELLO: Any = [{"role": "user", "content": "user assistant"}]


def main() -> dict[str, Any]:
    url, token_file = sys.argv[1:]
    token = Path(token_file).read_text().strip()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)

    def chat(model: str, **more: Any) -> Any:
        settings = {"temperature": 0, "max_tokens": 8, **more}
        return client.chat.completions.create(model=model, messages=HELLO, **settings)

    greedy = {model: chat(model) for model in ("policy", "ema")}
    text = greedy["policy"].choices[0].message.content
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chat("policy", **options))
    found = {
        "models": [model.id for model in client.models.list()],
        "one": client.models.retrieve("ema").id,
        "texts": {model: reply.choices[0].message.content for model, reply in greedy.items()},
        "fingerprints": {model: reply.system_fingerprint for model, reply in greedy.items()},
        "streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
        "usage": chunks[-1].usage.completion_tokens,
        "two": [c.message.content for c in chat("ema", n=2, temperature=1.0, seed=1).choices],
        "cut": chat("policy", stop=text[3:5]).choices[0].message.content,
        "completion": client.completions.create(
            model="policy", prompt="user", max_tokens=4, temperature=0
        )
        .choices[0]
        .text,
        "errors": {},
    }
    wrong: dict[str, dict[str, Any]] = {
        "unknown model": {"model": "frozen"},
        "unsupported": {"model": "policy", "frequency_penalty": 1.0},
    }
    for name, settings in wrong.items():
        try:
            chat(**settings)
        except openai.APIStatusError as error:
            found["errors"][name] = [type(error).__name__, error.code, error.param]
    try:
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
    except openai.AuthenticationError:
        found["errors"]["token"] = "refused"
    return found


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
