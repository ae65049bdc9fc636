"""Which reference a method trains against, as a setting that every method shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nemo_selfpref.algorithms.base import (
    Averaging,
    Reference,
    TrainSettings,
    check_positive,
)
from nemo_selfpref.config.schema import AlgorithmConfig, RefMode
from nemo_selfpref.errors import ConfigError

REF_EVERY, EMA_EVERY, EMA_ALPHA = 108, 2, 0.5
"""SAPO's own values (its section 4.1 and code)."""

_NEEDED = "the loss compares the policy with a reference; orpo is the loss without one"
ONE_STAGE = {
    RefMode.last: "there is one training stage, so the last iteration is where it starts: frozen",
    RefMode.none: _NEEDED,
}
ITERATED = {RefMode.none: _NEEDED}
REFERENCE_FREE = {
    mode: "the loss has no term for a reference" for mode in RefMode if mode is not RefMode.none
}


@dataclass
class ReferenceConfig(AlgorithmConfig):
    """Settings of a method whose loss has a reference."""

    ref: RefMode = RefMode.frozen
    """frozen (or fix): the weights the run starts from; last: the policy as the iteration begins;
    policy, ema: the policy or its moving average, taken anew every ref_every optimizer steps."""
    ref_every: int | None = None
    """Optimizer steps between two moves of the reference (policy, ema); null is 108."""
    ema_every: int | None = None
    """Optimizer steps between two updates of the moving average; null is 2."""
    ema_alpha: float | None = None
    """ema <- alpha ema + (1 - alpha) policy; null is 0.5."""


def check_ref(mode: RefMode, refused: Mapping[RefMode, str]) -> None:
    """Raise ConfigError for a mode that makes no sense here, with the reason."""
    if mode in refused:
        possible = ", ".join(m.name for m in RefMode if m not in refused)
        raise ConfigError(
            f"algorithm.ref={mode.name}: {refused[mode]}. Expected one of {possible}."
        )


def check_reference(
    config: ReferenceConfig, refused: Mapping[RefMode, str], samples_ema: bool = False
) -> None:
    """Raise ConfigError for a mode refused here, and for settings that nothing would use."""
    check_ref(config.ref, refused)
    averages = config.ref is RefMode.ema or samples_ema
    for name, used in (
        ("ref_every", config.ref.moves),
        ("ema_every", averages),
        ("ema_alpha", averages),
    ):
        value = getattr(config, name)
        if value is None:
            continue
        if not used:
            raise ConfigError(
                f"algorithm.{name}={value}: nothing uses it with algorithm.ref={config.ref.name}. "
                "Leave it out, or set algorithm.ref=ema."
            )
        check_positive(f"algorithm.{name}", value)
    if config.ema_alpha is not None and config.ema_alpha >= 1:
        raise ConfigError(f"algorithm.ema_alpha={config.ema_alpha}: expected less than 1")


def train_settings(config: ReferenceConfig, samples_ema: bool = False) -> TrainSettings:
    """The reference, and the moving average where the reference or the sampler is one."""
    averaging = None
    if config.ref is RefMode.ema or samples_ema:
        alpha = EMA_ALPHA if config.ema_alpha is None else config.ema_alpha
        averaging = Averaging(alpha, config.ema_every or EMA_EVERY)
    every = (config.ref_every or REF_EVERY) if config.ref.moves else 0
    return TrainSettings(reference=Reference(config.ref, every), averaging=averaging)
