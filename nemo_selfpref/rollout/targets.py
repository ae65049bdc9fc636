"""Where SGPO's target answers come from: an OpenAI-compatible endpoint, or a file of answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from nemo_selfpref.errors import ConfigError
from nemo_selfpref.rollout.endpoint import EndpointTeacher
from nemo_selfpref.rollout.endpoint_config import EndpointConfig
from nemo_selfpref.rollout.teacher import FileTeacher, Teacher


class TargetSource(Enum):
    endpoint = "endpoint"
    file = "file"


@dataclass
class TargetsConfig:
    source: TargetSource = TargetSource.endpoint
    path: str | None = None
    """For source=file: JSONL of {"id", "answer"}. The run writes the questions to
    RUN/target_requests.jsonl, so they can be answered offline."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


def make_teacher(config: TargetsConfig) -> Teacher:
    """The configured source of answers.

    Raises:
        ConfigError: a setting that the source needs is missing.
    """
    if config.source is TargetSource.file:
        if config.path is None:
            raise ConfigError(
                "algorithm.targets.source=file needs algorithm.targets.path, a JSONL file of "
                'rows {"id": ..., "answer": ...}'
            )
        return FileTeacher(config.path)
    for name in ("base_url", "model"):
        if not getattr(config.endpoint, name):
            raise ConfigError(
                f"algorithm.targets.endpoint.{name} is not set: give the OpenAI-compatible "
                "endpoint that writes the target answers, or use algorithm.targets.source=file"
            )
    return EndpointTeacher(config.endpoint)
