"""The settings of an OpenAI-compatible endpoint, and their checks."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from dataclasses import dataclass

import httpx

from nemo_selfpref.errors import ConfigError


@dataclass
class EndpointConfig:
    """How to reach an endpoint, and how it is to sample."""

    base_url: str = ""
    """Up to the version, as in https://api.openai.com/v1."""
    model: str = ""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key; null sends no key."""
    temperature: float = 0.7
    top_p: float = 1.0
    max_tokens: int = 1024
    max_concurrency: int = 8
    requests_per_minute: int = 0
    """0 sets no limit; retries count."""
    timeout_s: float = 120.0
    max_attempts: int = 6
    cache_path: str | None = None
    """JSONL of the answers so far; null keeps them in memory only."""
    allow_insecure_http: bool = False
    """Permit http:// to another machine, where prompts and key travel in the clear."""


def checked_url(config: EndpointConfig) -> httpx.URL:
    """Where the chat completions of a usable configuration are.

    Raises:
        ConfigError: a setting is out of range, or the URL is unsafe.
    """
    c = config
    rules = {
        "base_url": (bool(c.base_url), "a URL, as in https://host/v1"),
        "model": (bool(c.model), "a name"),
        "temperature": (0 <= c.temperature < math.inf, "0 or more"),
        "top_p": (0 < c.top_p <= 1, "above 0 and at most 1"),
        "max_tokens": (c.max_tokens >= 1, "1 or more"),
        "max_concurrency": (c.max_concurrency >= 1, "1 or more"),
        "requests_per_minute": (c.requests_per_minute >= 0, "0 or more"),
        "timeout_s": (0 < c.timeout_s < math.inf, "above 0"),
        "max_attempts": (c.max_attempts >= 1, "1 or more"),
    }
    for name, (good, expected) in rules.items():
        if not good:
            raise ConfigError(f"{name} is {getattr(c, name)!r}; expected {expected}")
    try:
        url = httpx.URL(c.base_url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"base_url is no URL ({error}); expected https://host/v1") from None
    # The URL is not repeated in these messages, since what is wrong in it may be a secret.
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError("base_url: expected http or https and a host, as in https://host/v1")
    if url.userinfo or url.query or url.fragment:
        raise ConfigError(
            "base_url carries a user, query or fragment; give host and path only, and the key in "
            "the environment variable named by api_key_env"
        )
    if url.scheme == "http" and not (is_loopback(url.host) or c.allow_insecure_http):
        raise ConfigError(
            f"base_url: http:// to {url.host} sends prompts and key in the clear; use https://, or "
            "set allow_insecure_http to true on a network you trust"
        )
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    return url.copy_with(path=f"{path}/chat/completions")


def is_loopback(host: str) -> bool:
    """Whether the host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def api_key(variable: str | None) -> str:
    """The key in the environment variable, "" where none is named.

    Raises:
        ConfigError: the variable is not set, or holds no key.
    """
    if variable is None:
        return ""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        # Not shown: it may be the key itself.
        raise ConfigError(
            "api_key_env is no name of an environment variable; put the key into a variable and "
            "give its name, as in api_key_env=OPENAI_API_KEY"
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"api_key_env: the environment variable {variable} is not set; export it")
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(
            f"api_key_env: {variable} holds a blank or non-ASCII character; copy the key again"
        )
    return key
