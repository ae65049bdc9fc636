"""The options of a command that compares models on pairs, as the settings its parts know."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_selfpref.config.checks import check_config
from nemo_selfpref.config.model_schema import ModelConfig
from nemo_selfpref.config.schema import AlgorithmConfig, DataConfig, DropReason, RunConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError, DataError
from nemo_selfpref.training.session import Start, find_start

_SETTING = re.compile(
    r"\bdata\.(drop|ignore_fields|limit|max_length|max_prompt_length)\b(?:=\[([^\]]*)\])?"
)


def data_settings(args: argparse.Namespace) -> DataConfig:
    """The data settings in args: data, drop, ignore_fields, limit, max_length, max_prompt_length.

    Raises:
        ConfigError: an unknown reason, or a number out of range.
    """
    data = DataConfig(
        train_path=[str(args.data)],
        ignore_fields=args.ignore_fields,
        drop=[_reason(name) for name in args.drop],
        limit=args.limit,
    )
    if args.max_length is not None:
        data.max_length = args.max_length
        data.max_prompt_length = min(data.max_prompt_length, args.max_length - 1)
    if args.max_prompt_length is not None:
        data.max_prompt_length = args.max_prompt_length
    with settings_as_options():
        check_config(_run_settings(args.model, data))
    return data


def _reason(name: str) -> DropReason:
    known = [reason.value for reason in DropReason]
    if name not in known:
        raise ConfigError(f"--drop {name}: no such reason; expected {', '.join(known)}")
    return DropReason(name)


def _run_settings(folder: Path, data: DataConfig) -> RunConfig:
    model = ModelConfig(restore_from_path=str(folder))
    return RunConfig(name="evaluate", model=model, data=data, algorithm=AlgorithmConfig("none"))


def common_tokenizer(model: Path, reference: Path, data: DataConfig) -> ChatTokenizer:
    """The tokenizer of both models, found without loading them.

    Raises:
        ConfigError: no model there, data.max_length passes its positions, the two are one folder,
            or their tokenizers differ, so that they would not score the same tokens.
    """
    if model.resolve() == reference.resolve():
        raise ConfigError(
            f"--model and --reference are both {model}: every marginal would be 0; expected two "
            "folders; give the model that the policy was trained from as --reference"
        )
    tokenizer = _start("model", model, data).tokenizer
    ours = tokenizer.fingerprint()
    theirs = _start("reference", reference, data).tokenizer.fingerprint()
    if ours != theirs:
        raise ConfigError(
            f"--model {model} and --reference {reference} have different tokenizers; got the "
            f"fingerprints {ours[:12]} and {theirs[:12]}; expected the same vocabulary, control "
            "tokens and chat template, so that both score the same tokens; give the model that "
            "the policy was trained from as --reference"
        )
    return tokenizer


def _start(option: str, folder: Path, data: DataConfig) -> Start:
    with settings_as_options(option):
        return find_start(_run_settings(folder, data))


@contextmanager
def settings_as_options(folder_option: str = "model") -> Iterator[None]:
    """Let errors name the command's options in place of a training run's settings."""

    def option(match: re.Match[str]) -> str:
        name = f"--{match[1].replace('_', '-')}"
        return name if match[2] is None else f"{name} {match[2].replace(',', ' ')}"

    try:
        yield
    except (ConfigError, DataError) as error:
        text = str(error).replace("model.restore_from_path", f"--{folder_option}")
        raise type(error)(_SETTING.sub(option, text)) from error
