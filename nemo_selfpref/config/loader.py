"""Composing a run's configuration with Hydra, strictly: what is not in the schema is refused."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nemo_selfpref.config.paths import conf_dir
from nemo_selfpref.config.safety import check_file, check_overrides, check_values, no_environment
from nemo_selfpref.config.schema import AlgorithmConfig, RolloutEngineName, RunConfig
from nemo_selfpref.errors import ConfigError


@dataclass
class _RunSchema(RunConfig):
    """The schema with the groups it is composed of, for Hydra; `rollout=vllm` picks another,
    `model=llama3_8b` the settings for one model. A method's own settings come after both."""

    defaults: list[Any] = field(
        default_factory=lambda: ["_self_", {"rollout": "embedded"}, {"model": None}]
    )


def register_schemas(algorithm_configs: dict[str, type[AlgorithmConfig]]) -> None:
    """Make the typed groups known to Hydra under the names that the YAML files build on."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=_RunSchema)
    for name, schema in algorithm_configs.items():
        store.store(group="algorithm", name=name, node=schema)


def load_config(
    config_name: str,
    overrides: Sequence[str],
    algorithm_configs: dict[str, type[AlgorithmConfig]],
    config_dir: Path | None = None,
    allow_missing: bool = False,
) -> DictConfig:
    """The resolved, typed configuration of a run.

    Args:
        config_name: a YAML file at the top of the configuration folder, without suffix.
        overrides: Hydra overrides, `key=value`.
        algorithm_configs: settings class of every algorithm, by name.
        config_dir: another folder of YAML files; ours stay reachable behind it.
        allow_missing: leave `???` where a value must still be given.

    Raises:
        ConfigError: no such config, unknown key, wrong type, value missing, or something that no
            configuration may say (safety.py).
    """
    register_schemas(algorithm_configs)
    folder = (config_dir or conf_dir()).resolve()
    _check_name(config_name, folder)
    check_overrides(overrides)
    check_file(folder / f"{config_name}.yaml")
    extra = [] if folder == conf_dir().resolve() else [f"hydra.searchpath=[file://{conf_dir()}]"]
    GlobalHydra.instance().clear()
    try:
        with no_environment():
            with initialize_config_dir(str(folder), version_base="1.3"):
                cfg = compose(config_name, overrides=[*extra, *overrides])
            OmegaConf.resolve(cfg)
        check_values(cfg)
        _refuse_additions(cfg, algorithm_configs)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(_explain(error, overrides, algorithm_configs)) from error
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing and not allow_missing:
        raise ConfigError(
            "no value for " + ", ".join(missing) + ". Give one: " + f"{missing[0]}=..."
        )
    return cfg


def _refuse_additions(cfg: DictConfig, algorithm_configs: dict[str, type[AlgorithmConfig]]) -> None:
    """Hydra's `+key=value` may add what the schema does not have; merging into it tells."""
    if cfg.algorithm.name not in algorithm_configs:
        raise ConfigError(
            f"algorithm.name={cfg.algorithm.name}: expected one of "
            f"{', '.join(sorted(algorithm_configs))}"
        )
    schema = OmegaConf.structured(RunConfig)
    schema.algorithm = algorithm_configs[cfg.algorithm.name]
    OmegaConf.merge(schema, OmegaConf.to_container(cfg))


def _check_name(config_name: str, folder: Path) -> None:
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    if config_name not in names:
        raise ConfigError(
            f"--config-name {config_name}: no such file in {folder}. There are: {', '.join(names)}."
            + _did_you_mean(config_name, names)
        )


def _explain(
    error: Exception,
    overrides: Sequence[str],
    algorithm_configs: dict[str, type[AlgorithmConfig]],
) -> str:
    """Hydra's and OmegaConf's messages in our words: the key, what it got, what is possible."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if refused := next((e for e in chain if isinstance(e, ConfigError)), None):
        return str(refused)
    text = " ".join(
        str(chain[-1] if isinstance(chain[-1], OmegaConfBaseException) else error).split("\n")
    )
    text = re.sub(r"\s+(object_type|reference_type)=\S+", "", text).strip()
    text = re.sub(r"^ConfigError raised while resolving interpolation: ", "", text)
    known = list(_known_keys(RunConfig))
    for schema in algorithm_configs.values():
        known.extend(_known_keys(schema, "algorithm."))
    option = re.search(r"Could not find '(\S+?)/(\S+)'", text)
    if option:
        group, value = option.groups()
        return f"{group}={value}: expected one of {', '.join(_options(group, algorithm_configs))}"
    found = re.search(r"Key '([^']+)' (?:is )?not in", text) or re.search(
        r"Could not override '([^']+)'", text
    )
    if found and "data.columns" in text:
        return "data.columns is a table of your own: write +data.columns.THEIR_NAME=OUR_NAME"
    if found:
        full = re.search(r"full_key: (\S+)", text)
        key = full.group(1) if full else found.group(1)
        return (
            f"unknown setting {key!r}." + _did_you_mean(key, known) + _from_override(key, overrides)
        )
    full = re.search(r"full_key: (\S+)", text)
    if full and "is not a ListConfig" in text:
        return f"{full.group(1)}: expected a list, as in {full.group(1)}=[one,two]"
    if full:
        text = text.replace(f"full_key: {full.group(1)}", "").strip()
        return f"{full.group(1)}: {text}"
    return text


def _options(group: str, algorithm_configs: Iterable[str]) -> list[str]:
    """What a group may be set to."""
    if group == "rollout":
        return [engine.name for engine in RolloutEngineName]
    if group == "model":
        return sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
    return sorted(algorithm_configs)


def _from_override(key: str, overrides: Sequence[str]) -> str:
    leaf = key.rsplit(".", 1)[-1]
    given = [o for o in overrides if o.split("=", 1)[0].lstrip("+~").endswith(leaf)]
    return f" It came from the override {given[0]!r}." if given else ""


def _known_keys(schema: type, prefix: str = "") -> Iterable[str]:
    for item in fields(cast(Any, schema)):
        yield prefix + item.name
        made = None
        if item.default_factory is not None and callable(item.default_factory):
            made = item.default_factory()
        if is_dataclass(made):
            yield from _known_keys(type(made), f"{prefix}{item.name}.")


def _did_you_mean(key: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        leaf = key.rsplit(".", 1)[-1]
        close = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
    return f" Did you mean {close[0]!r}?" if close else ""


def to_typed(cfg: DictConfig) -> RunConfig:
    """The configuration as dataclasses."""
    return cast(RunConfig, OmegaConf.to_object(cfg))
