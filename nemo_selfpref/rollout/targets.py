"""Where SGPO's target answers come from: an OpenAI-compatible endpoint, or a file of answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from nemo_selfpref.errors import ConfigError
from nemo_selfpref.rollout.endpoint import EndpointTeacher
from nemo_selfpref.rollout.endpoint_config import EndpointConfig, api_key, checked_url
from nemo_selfpref.rollout.teacher import FileTeacher, Teacher


class TargetSource(Enum):
    endpoint = "endpoint"
    file = "file"


@dataclass
class TargetsConfig:
    source: TargetSource = TargetSource.endpoint
    path: str | None = None
    """For source=file: JSONL of {"id", "answer"}. The run writes its questions to
    RUN/stages/02-targets/requests.jsonl, so they can be answered offline."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


def check_targets(config: TargetsConfig) -> None:
    """Raise ConfigError for settings the source cannot work with; opens and sends nothing."""
    if config.source is TargetSource.file:
        if config.path is None:
            raise ConfigError(
                "algorithm.targets.source=file needs algorithm.targets.path, a JSONL file of "
                'rows {"id": ..., "answer": ...}'
            )
        return
    try:
        checked_url(config.endpoint)
        api_key(config.endpoint.api_key_env)
    except ConfigError as error:
        raise ConfigError(
            f"algorithm.targets.endpoint.{error} (or use algorithm.targets.source=file)"
        ) from None


def make_teacher(config: TargetsConfig) -> Teacher:
    """The configured source of answers, settings checked."""
    check_targets(config)
    if config.path is not None and config.source is TargetSource.file:
        return FileTeacher(config.path)
    return EndpointTeacher(config.endpoint)
