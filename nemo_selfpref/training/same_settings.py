"""Which settings a run may be continued with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.errors import ConfigError

FREE_ON_RESUME = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.nonfinite",
    "trainer.max_nonfinite_steps",
    "exp_manager",
    "export",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.expert_model_parallel_size",
    "model.sequence_parallel",
    "model.micro_batch_size",
    "model.micro_batch_tokens",
    "model.share_prompts",
    "model.recompute_granularity",
    "model.recompute_num_layers",
    "model.copies_on_cpu",
    "model.attention_backend",
    "model.logprob_backend",
    "model.logprob_chunk_size",
    "model.reference_cache_dir",
    "model.reference_cache_max_gb",
    "rollout.batch_size",
    "rollout.save_every",
    "rollout.placement",
    "rollout.vllm",
    "rollout.timeout_s",
    "rollout.max_staleness",
    "rollout.stale_samples",
    "rollout.check_samples",
    "rollout.logprob_alarm",
)
"""Settings that change how a run computes but not what; a resumed run may change them."""

_LAYOUT = {
    "TP": "model.tensor_model_parallel_size",
    "PP": "model.pipeline_model_parallel_size",
    "CP": "model.context_parallel_size",
    "EP": "model.expert_model_parallel_size",
}
_CURSOR = ("model.global_batch_size", "data.limit", "data.shuffle", "seed")
"""What the order of the steps is made of, beside the rows."""


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a run as they are written: nothing in them is looked up or run.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _damaged(path, " ".join(str(error).split())) from error
    if not isinstance(settings, dict):
        raise _damaged(path, f"expected settings, got {type(settings).__name__}")
    return settings


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read: {why}. Give the file back as it was, or give the run another "
        "`name`."
    )


def check_same(saved: Path, made: dict[str, Any], cfg: DictConfig) -> list[str]:
    """Compare settings with those a run was made with; what is to be said though it may go on.

    Args:
        saved: where the settings `made` lie.

    Raises:
        ConfigError: one that decides the result differs; shows old and new of each.
    """
    given = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    before, now = _deciding(_flat(made)), _deciding(_flat(given))
    changed = _changes(before, {key: now[key] for key in now.keys() - _newer(before, now, cfg)})
    if changed:
        raise ConfigError(
            f"{saved.parent} was made with other settings:\n  "
            + "\n  ".join(changed)
            + "\nGive the run another `name`, or go back to the old settings."
            + _cursor(before, now)
        )
    return _other_layout(_flat(made), _flat(given))


def _newer(before: Mapping[str, Any], now: Mapping[str, Any], cfg: DictConfig) -> set[str]:
    """Settings newer than the run, which was made without them, that are at their defaults."""
    missing = now.keys() - before.keys()
    if not missing:
        return set()
    defaults = _flat(OmegaConf.to_container(_defaults_of(cfg), resolve=True))
    return {key for key in missing if now[key] == defaults.get(key, ...)}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Old and new of each setting that differs, one above the other."""
    lines = []
    for key in sorted({*before, *now}):
        if before.get(key, ...) == now.get(key, ...):
            continue
        lines += [f"-{key}: {before[key]}"] if key in before else []
        lines += [f"+{key}: {now[key]}"] if key in now else []
    return lines


def _cursor(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [key for key in _CURSOR if before.get(key) != now.get(key)]
    if not names:
        return ""
    return f" The cursor no longer fits: the order of the steps depends on {', '.join(names)}."


def _other_layout(made: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    was, now = _layout(made), _layout(given)
    return [f"resharded: the run was made on {was}, it goes on with {now}"] if was != now else []


def _layout(flat: Mapping[str, Any]) -> str:
    split = " ".join(f"{short}{flat.get(name, 1)}" for short, name in _LAYOUT.items())
    count = flat.get("trainer.devices", 1) * flat.get("trainer.num_nodes", 1)
    return f"{split} on {count} process{'es' * (count != 1)}"


def _defaults_of(cfg: DictConfig) -> DictConfig:
    """The defaults of the settings' dataclasses, for the same algorithm."""
    config_class = algorithms()[cfg.algorithm.name].config_class
    defaults = OmegaConf.structured(RunConfig)
    OmegaConf.update(defaults, "name", cfg.name)
    return OmegaConf.merge(
        OmegaConf.create(OmegaConf.to_container(defaults, enum_to_str=True)),  # type: ignore[return-value]
        {"algorithm": OmegaConf.to_container(OmegaConf.structured(config_class), enum_to_str=True)},
    )


def _flat(settings: Any) -> dict[str, Any]:
    """Settings by their full name."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            flat[prefix] = node

    walk("", settings)
    return flat


def _deciding(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide a run's result."""
    free = tuple(f"{name}." for name in FREE_ON_RESUME)
    return {
        key: value
        for key, value in flat.items()
        if key not in FREE_ON_RESUME and not key.startswith(free)
    }
