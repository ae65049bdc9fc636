"""What may be asked of an engine: one set of rules, for engines and for fleets of them."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_selfpref.errors import RolloutRefused
from nemo_selfpref.rollout.serving.wire import GenerateCall, Info, LabelsCall


def check_question(call: GenerateCall | LabelsCall, info: Info) -> None:
    """Refuse what no engine like `info` can answer. Which weights it holds is another matter.

    Raises:
        RolloutRefused: an empty or too long prompt, a token or label beyond the vocabulary, too
            many labels, or too high a temperature.
    """
    if isinstance(call, GenerateCall):
        _check_temperature(call.params.temperature, info)
        for number, request in enumerate(call.requests):
            _check_prompt(number, request.prompt_ids, call.limit(number), info)
    else:
        _check_labels(call.labels, info)
        for number, prompt in enumerate(call.prompts):
            _check_prompt(number, prompt, 1, info)


def tightest(infos: Sequence[Info]) -> dict[str, float | int | None]:
    """The bounds within which every one of several engines answers, as fields of Info."""
    temperatures = [i.max_temperature for i in infos if i.max_temperature is not None]
    labels = [i.max_labels for i in infos if i.max_labels is not None]
    return {
        "max_temperature": min(temperatures, default=None),
        "max_labels": min(labels, default=None),
    }


def _check_temperature(temperature: float, info: Info) -> None:
    if info.max_temperature is not None and temperature > info.max_temperature:
        raise RolloutRefused(
            f"the temperature is {temperature}; the engine samples at {info.max_temperature} at "
            "most. Lower rollout.temperature."
        )


def _check_labels(labels: Sequence[int], info: Info) -> None:
    if info.max_labels is not None and len(set(labels)) > info.max_labels:
        raise RolloutRefused(
            f"{len(labels)} labels were asked for; the engine weighs {info.max_labels} at most"
        )
    if max(labels) >= info.vocab_size:
        raise RolloutRefused(
            f"the label {max(labels)} is no token; the model knows {info.vocab_size}"
        )


def _check_prompt(number: int, prompt: Sequence[int], room: int, info: Info) -> None:
    if not prompt:
        raise RolloutRefused(f"prompt {number} is empty: expected at least one token")
    if len(prompt) + room > info.max_length:
        raise RolloutRefused(
            f"prompt {number} has {len(prompt)} tokens; with {room} to come that passes the "
            f"model's {info.max_length}. Lower rollout.max_new_tokens or data.max_prompt_length."
        )
    if max(prompt) >= info.vocab_size:
        raise RolloutRefused(
            f"prompt {number} holds the token {max(prompt)}; the model knows {info.vocab_size}"
        )
