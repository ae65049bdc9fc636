"""Keeping secrets out of what is shown: text of others (a server's reply, a process's log) may
repeat a key or a password."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

HIDDEN = "[hidden]"
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE
)
_SHORTEST = 8
"""A shorter value is no secret, and hiding it would garble the text around it."""
_SHAPES = (
    re.compile(r"(://)[^\s/@\"'<>]+(?=@)"),  # user:password@ of a URL
    re.compile(r"(?i)(\bbearer\s+)[^\s\"',;\[\]]{8,}"),
    re.compile(r"(?i)(\bauthorization\W{1,6}basic\s+)[A-Za-z0-9+/=]{4,}"),
    # keys with a prefix of their own: Hugging Face, OpenAI and its like, GitHub, NVIDIA
    re.compile(r"()\b(?:hf_|sk-|ghp_|github_pat_|nvapi-)[A-Za-z0-9_-]{8,}"),
)
"""What looks like a credential; the first group stays."""


def is_secret_name(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret: HF_TOKEN, OPENAI_API_KEY."""
    return _SECRET_NAME.search(variable) is not None


def redact(
    text: str, secrets: Iterable[str] = (), environment: Mapping[str, str] = os.environ
) -> str:
    """The text with `secrets`, the values of secret environment variables, and what looks like a
    credential replaced by "[hidden]". Call it before the text is cut, or half a key may stay."""
    own = (value for name, value in environment.items() if is_secret_name(name))
    known = {value.strip() for value in (*secrets, *own)}
    # The longest first: one secret may begin with another.
    for value in sorted(known, key=len, reverse=True):
        if len(value) >= _SHORTEST:
            text = text.replace(value, HIDDEN)
    for shape in _SHAPES:
        text = shape.sub(rf"\g<1>{HIDDEN}", text)
    return text
