"""What a run is made from: its files, the package's prompts, the versions of what computes.

RUN/inputs.json says it from the day the run is made. A run that is continued compares: other data
under the same cursor, or another prompt, would make one run out of two without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from nemo_selfpref.config.paths import prompts_dir
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.data.readers import data_files
from nemo_selfpref.files import sha256_of
from nemo_selfpref.rollout.targets import TargetsConfig, TargetSource

_WEIGHTS = ("*.safetensors", "weights/*.safetensors")
_OF_START = (
    "config.json",
    "model.safetensors.index.json",
    "checkpoint.json",
    "manifest.json",
    "weights/*.json",
)
_OF_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
)
_BLOCK, _BLOCKS = 1 << 16, 64
_READ_WHOLE = 4 * _BLOCK * _BLOCKS
"""Bytes up to which a weight file is read whole (16 MiB)."""


@dataclass(frozen=True)
class Input:
    """A file that a run reads.

    setting: which of the run's settings names it.
    sampled: too large to be read at every start; its sum is over a part of it.
    answers: answers to questions of the run itself, so it is written after the run has begun.
    """

    setting: str
    path: Path
    sampled: bool = False
    answers: bool = False


def inputs_of(cfg: RunConfig) -> dict[str, Input]:
    """Every file a run reads, by the name it is told of by."""
    found: dict[str, Input] = {}
    for item in (
        *_data("data.train_path", cfg.data.train_path),
        *_start(cfg.model.restore_from_path),
        *_tokenizer("model.tokenizer.path", cfg.model.tokenizer.path),
        *_file("model.tokenizer.chat_template", cfg.model.tokenizer.chat_template),
        *_of_settings("algorithm", cfg.algorithm),
    ):
        shipped = item.path.parent == prompts_dir()
        name = f"conf/prompts/{item.path.name}" if shipped else str(item.path)
        found.setdefault(name, item)
    return found


def _data(setting: str, paths: Sequence[str]) -> Iterator[Input]:
    for path in map(Path, paths):
        files = data_files(path) if path.exists() else [path]
        yield from (Input(setting, file) for file in files)


def _file(setting: str, path: str | None) -> Iterator[Input]:
    if path is not None:
        yield Input(setting, Path(path))


def _start(folder: str | None) -> Iterator[Input]:
    setting = "model.restore_from_path"
    if folder is not None:
        for pattern in (*_OF_START, *_WEIGHTS):
            for path in sorted(Path(folder).glob(pattern)):
                yield Input(setting, path, sampled=pattern in _WEIGHTS)
        yield from _tokenizer(setting, folder)
        yield from _tokenizer(setting, str(Path(folder, "tokenizer")))


def _tokenizer(setting: str, place: str | None) -> Iterator[Input]:
    if place is not None and Path(place).is_dir():
        for pattern in _OF_TOKENIZER:
            yield from (Input(setting, path) for path in sorted(Path(place).glob(pattern)))
    elif place is not None and Path(place).is_file():
        yield Input(setting, Path(place))


def _of_settings(name: str, settings: Any) -> Iterator[Input]:
    """Files and prompts that a method's settings name. Fields called `path`, `NAME_path`, `prompt`
    or `NAME_prompt` do."""
    if isinstance(settings, TargetsConfig):
        if settings.source is TargetSource.file and settings.path is not None:
            yield Input(f"{name}.path", Path(settings.path), answers=True)
        return
    for field in fields(settings):
        setting, value = f"{name}.{field.name}", getattr(settings, field.name)
        kind = field.name.rsplit("_", 1)[-1]
        if is_dataclass(value):
            yield from _of_settings(setting, value)
        elif kind == "prompt":
            yield from _prompt(setting, value)
        elif kind == "path" and field.name != "cache_path" and value:
            yield from _data(setting, [value] if isinstance(value, str) else list(value))


def _prompt(setting: str, name: str | None) -> Iterator[Input]:
    if name is None:  # the method chooses among those that are shipped
        yield from (Input(setting, path) for path in sorted(prompts_dir().glob("*.txt")))
    elif name.endswith(".txt"):
        yield Input(setting, Path(name).expanduser())
    elif (prompts_dir() / f"{name}.txt").is_file():
        yield Input(setting, prompts_dir() / f"{name}.txt")


def sums_of(inputs: dict[str, Input]) -> dict[str, dict[str, Any] | None]:
    """Size in bytes and SHA-256 of each input; None where there is no such file."""
    return {name: _sum(item) for name, item in inputs.items()}


def _sum(item: Input) -> dict[str, Any] | None:
    if not item.path.is_file():
        return None
    size = item.path.stat().st_size
    digest = sampled_sum(item.path, size) if item.sampled else sha256_of(item.path)
    return {"bytes": size, "sha256": digest}


def sampled_sum(path: Path, size: int) -> str:
    """SHA-256 over a safetensors file's size, its header and 64 blocks of 64 KiB spread evenly from
    its first byte to its last; of a small file over all of it.

    Other weights of the same shapes differ in every block. A byte changed between two blocks is not
    seen: reading 140 GB at every start would take minutes.
    """
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as handle:
        if size <= _READ_WHOLE:
            digest.update(handle.read())
            return digest.hexdigest()
        header = int.from_bytes(handle.read(8), "little")
        digest.update(handle.read(min(header, size)))
        for number in range(_BLOCKS):
            handle.seek(number * (size - _BLOCK) // (_BLOCKS - 1))
            digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


def has_grown(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether something was appended to a file, and nothing else changed."""
    if now["bytes"] <= before["bytes"]:
        return False
    digest, left = hashlib.sha256(), before["bytes"]
    with open(path, "rb") as handle:
        while block := handle.read(min(left, 1 << 22)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest() == before["sha256"]
