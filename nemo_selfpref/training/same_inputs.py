"""RUN/inputs.json: written when a run is made, compared when it is continued."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nemo_selfpref
from nemo_selfpref.config.schema import RolloutEngineName, RunConfig
from nemo_selfpref.errors import CheckpointError, ConfigError
from nemo_selfpref.files import sha256_of, write_json
from nemo_selfpref.training.inputs import Input, has_grown, inputs_of, sums_of
from nemo_selfpref.training.sums import own_sum, read_summed, short

RECORD = "inputs.json"
_PACKAGES = (
    "torch",
    "megatron-core",
    "nemo-toolkit",
    "lightning",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "pyarrow",
    "transformer-engine",
)
_ABSENT = "none"

Sums = Mapping[str, Mapping[str, Any] | None]


def versions_of(cfg: RunConfig) -> dict[str, str]:
    """Versions of everything whose numbers or text a run's result is made of."""
    found = {"python": platform.python_version(), "nemo_selfpref": nemo_selfpref.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = _ABSENT
    if cfg.rollout.engine is RolloutEngineName.vllm and not cfg.rollout.vllm.urls:
        found["vllm"] = _vllm_beside(Path(cfg.rollout.vllm.python).expanduser())
    return found


def _vllm_beside(python: Path) -> str:
    """The vLLM of another interpreter's environment, without starting it."""
    here = python.parent.parent.glob("lib/python*/site-packages/vllm-*.dist-info")
    names = sorted(path.name.removeprefix("vllm-").removesuffix(".dist-info") for path in here)
    return names[0] if names else _ABSENT


def write_record(run: Path, cfg: RunConfig, config_sum: str) -> None:
    """Say what a run is made from.

    Args:
        config_sum: SHA-256 of the run's config.yaml.
    """
    record = {"config": config_sum, "versions": versions_of(cfg), "files": _files(inputs_of(cfg))}
    _write(run, record)


def _files(inputs: dict[str, Input]) -> dict[str, Any]:
    sums = sums_of(inputs)
    return {name: {"setting": item.setting, "sum": sums[name]} for name, item in inputs.items()}


def _write(run: Path, record: Mapping[str, Any]) -> None:
    write_json(run / RECORD, {**record, "sum": own_sum(record)})


def read_record(run: Path) -> dict[str, Any] | None:
    """What the run was made from; None if it was made before this was kept.

    Raises:
        CheckpointError: inputs.json is not what the run wrote.
        ConfigError: config.yaml is not.
    """
    if not (run / RECORD).exists():
        return None
    record = read_summed(run / RECORD, "Give the file back as it was, or give the run another name")
    if {"config", "versions", "files"} - record.keys():
        raise CheckpointError(f"{run / RECORD} is damaged: it lacks what a run keeps there")
    found = sha256_of(run / "config.yaml")
    if found != record["config"]:
        raise ConfigError(
            f"{run / 'config.yaml'} is not what this run wrote: sha256 {short(record['config'])} "
            f"-> {short(found)}. Give the file back as it was: settings are changed on the command "
            "line, under another `name`."
        )
    return record


def check_record(run: Path, cfg: RunConfig, record: Mapping[str, Any] | None) -> list[str]:
    """Compare with what the run was made from; what is to be said though it is no obstacle.

    Raises:
        ConfigError: a file or a prompt is another one, is gone or is new; names all of them.
    """
    if record is None:
        write_record(run, cfg, sha256_of(run / "config.yaml"))
        return [
            f"{run} has no {RECORD}: an earlier version made it, or the file is lost. Whether its "
            "data and prompts changed cannot be known; from here on they are watched."
        ]
    inputs = inputs_of(cfg)
    before = {name: entry["sum"] for name, entry in record["files"].items()}
    now = sums_of(inputs)
    _let_answers_come(run, record, inputs, before, now)
    changed = _differences(record, inputs, before, now)
    if changed:
        raise ConfigError(
            f"{run} was made from other files:\n  "
            + "\n  ".join(changed)
            + "\nGive them back as they were, or give the run another `name`."
        )
    return _other_versions(record["versions"], versions_of(cfg))


def _let_answers_come(
    run: Path,
    record: Mapping[str, Any],
    inputs: Mapping[str, Input],
    before: dict[str, Any],
    now: Sums,
) -> None:
    """Answers to the run's own questions come after it was made: they are taken as they are until
    they were read, and may be added to afterwards."""
    read = any((path.parent / "done.json").is_file() for path in run.glob("stages/*/answers.json"))
    later = False
    for name in (n for n, item in inputs.items() if item.answers):
        was, found = before.get(name), now[name]
        grown = was is not None and found is not None and has_grown(inputs[name].path, was, found)
        if found != was and (not read or grown):
            before[name], later = found, True
            record["files"][name] = {"setting": inputs[name].setting, "sum": found}
    if later:
        _write(run, {key: value for key, value in record.items() if key != "sum"})


def _differences(
    record: Mapping[str, Any], inputs: Mapping[str, Input], before: Sums, now: Sums
) -> list[str]:
    lines = []
    for name in sorted({*before, *now}):
        was, found = before.get(name), now.get(name)
        if was != found:
            item = inputs.get(name)
            setting = item.setting if item else record["files"][name]["setting"]
            lines.append(f"{name} ({setting}): {_difference(item, was, found)}")
    return lines


def _difference(
    item: Input | None, was: Mapping[str, Any] | None, found: Mapping[str, Any] | None
) -> str:
    if found is None or item is None:
        assert was is not None
        return f"is gone; it had {was['bytes']} bytes, sha256 {short(was['sha256'])}"
    if was is None:
        return "is new: the run was made without it"
    line = (
        f"sha256 {short(was['sha256'])} -> {short(found['sha256'])}, "
        f"bytes {was['bytes']} -> {found['bytes']}"
    )
    if not item.sampled and has_grown(item.path, was, found):
        line += "; it has grown, what it held is unchanged: the cursor no longer fits, for the "
        line += "order of the steps depends on the number of rows"
    return line


def _other_versions(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    changed = [
        f"{name} {before.get(name, _ABSENT)} -> {now.get(name, _ABSENT)}"
        for name in sorted({*before, *now})
        if before.get(name, _ABSENT) != now.get(name, _ABSENT)
    ]
    if not changed:
        return []
    return [f"continued with other versions ({', '.join(changed)}): last bits may differ"]
