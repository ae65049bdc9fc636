"""What no configuration may say, whoever wrote it: nothing is run, looked up in the environment or
put outside the run's folder because a value asks for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from nemo_selfpref.config.schema import ExpManagerConfig, RunConfig
from nemo_selfpref.errors import ConfigError

INSTANTIABLE: frozenset[str] = frozenset()
"""What a configuration may instantiate by name: nothing. Algorithms, losses and engines are picked
out of registries and enumerations; `_target_` is refused wherever it stands."""

_INSTANTIATING = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
"""What Hydra reads as instructions to instantiate."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SAME = ExpManagerConfig().name
"""The reference to `name`, where a configuration was not composed but built."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_OF_HYDRA = re.compile(r"[+~]*hydra(?:[./@:=]|$)")


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides of Hydra itself, and those that no terminal shows as they are.

    Raises:
        ConfigError: such an override; control characters are shown as escapes.
    """
    for override in overrides:
        if _CONTROL.search(override):
            raise ConfigError(f"the override {override!r} holds control characters; remove them")
        if _OF_HYDRA.match(override):
            raise ConfigError(
                f"{override}: settings of Hydra itself are not settings of a run. Give a folder of "
                "YAML files by --config-dir."
            )


def check_file(path: Path) -> None:
    """Refuse a configuration file that is no plain YAML, or that configures Hydra itself.

    Raises:
        ConfigError: the file cannot be read, has Python tags, or a `hydra` section.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    if isinstance(content, dict) and "hydra" in content:
        raise ConfigError(
            f"{path}: a `hydra` section, which a run does not use. Give a folder of YAML files by "
            "--config-dir."
        )


@contextmanager
def no_environment() -> Iterator[None]:
    """While it lasts ${oc.env:...} is refused: its value would be written into the run's folder
    and shown in messages."""

    def refuse(*arguments: Any) -> str:
        raise ConfigError(
            f"${{oc.env:{arguments[0]}}}: values are not taken from the environment, since they "
            "would be written to RUN/config.yaml. Let the shell put it in (key=$VARIABLE); a key "
            "of an endpoint is named by api_key_env."
        )

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def check_values(cfg: DictConfig) -> None:
    """Refuse what must not be in a resolved configuration: names to instantiate, control
    characters, and references that would be resolved a second time.

    Raises:
        ConfigError: names the setting.
    """
    for where, value in _leaves("", OmegaConf.to_container(cfg, resolve=False)):
        key = where.rsplit(".", 1)[-1]
        if key in _INSTANTIATING and value not in INSTANTIABLE:
            raise ConfigError(f"{where}={value!r}: a configuration instantiates nothing. Remove it")
        for text in (where, value):
            if isinstance(text, str) and _CONTROL.search(text):
                raise ConfigError(f"{where!r} holds control characters: {value!r}. Remove them")
        if isinstance(value, str) and "${" in value:
            raise ConfigError(f"{where}={value!r}: '${{' cannot be part of a value. Leave it out")


def _leaves(where: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(f"{where}.{key}" if where else str(key), value)
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(where, value)
    else:
        yield where, node


def names(cfg: RunConfig) -> Iterator[str]:
    """A run's names become folders: they stay inside exp_manager.exp_dir."""
    for where, name in (("name", cfg.name), ("exp_manager.name", cfg.exp_manager.name)):
        if name != _SAME and not _NAME.fullmatch(name):
            yield (
                f"{where}={name!r}: expected letters, digits, '.', '_' and '-', beginning with a "
                "letter or digit, at most 128. Folders belong in exp_manager.exp_dir."
            )


def server_urls(cfg: RunConfig) -> Iterator[str]:
    """Rollout servers are named by host and port; what else is in a URL may be a secret, so it is
    not repeated."""
    for number, text in enumerate(cfg.rollout.vllm.urls, 1):
        try:
            url = urlsplit(text)
            good = url.scheme in ("http", "https") and url.hostname and (url.port or True)
        except ValueError:
            url, good = urlsplit(""), False
        if not good or "@" in url.netloc or url.query or url.fragment:
            yield (
                f"rollout.vllm.urls: entry {number} is not of the form http://HOST:PORT; the token "
                "belongs in rollout.vllm.token_file"
            )
