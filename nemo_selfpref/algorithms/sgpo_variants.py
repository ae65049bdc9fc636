"""SGPO's settings, and the variants that its paper compares (tables 3 to 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from nemo_selfpref.algorithms.improver import KINDS, ImproverConfig
from nemo_selfpref.algorithms.reference import ReferenceConfig
from nemo_selfpref.config.schema import RefMode
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.rollout.targets import TargetsConfig


class Variant(Enum):
    sgpo = "sgpo"
    dagger = "dagger"
    """Improver and policy are separate models."""
    double_dagger = "double_dagger"
    """Separate models, the improver taught external answers only."""
    diamond = "diamond"
    """The data's answer chosen, the policy's rejected: no improvement by the policy itself."""
    v1 = "v1"
    """Table 5: separate, external answers only."""
    v2 = "v2"
    """Table 5: one model, external answers only."""
    v3 = "v3"
    """Table 5: separate, with improved answers."""
    all_ref = "all_ref"
    """The reference answer in the improver's training prompt too."""
    no_ref = "no_ref"
    """The reference answer in no prompt of the model's own."""


@dataclass
class SGPOConfig(ReferenceConfig):
    name: str = "sgpo"
    beta: float = 0.01
    ref: RefMode = RefMode.last
    """last is the improver's checkpoint, where preference training starts."""
    variant: Variant = Variant.sgpo
    extra_step2: int = 0
    """How often step 2 is repeated from the new policy, the improver not trained again."""
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    improver: ImproverConfig = field(default_factory=ImproverConfig)
    target_prompt: str = "sgpo_target"
    improve_prompt: str | None = None
    """p_imp; null is sgpo_improve, or sgpo_refine for the variant all_ref."""
    refine_prompt: str | None = None
    """p_ref; null is sgpo_refine, or sgpo_improve for the variant no_ref."""
    drop_truncated_chosen: bool = True
    """Leave out pairs whose improved answer ran into rollout.max_new_tokens."""


@dataclass(frozen=True)
class Choices:
    """What a variant does otherwise.

    separate: the answers are the starting policy's and preference training starts from it; the
    improver only improves. kinds: what the external model is asked for.
    """

    separate: bool = False
    kinds: Sequence[str] = KINDS
    improved_chosen: bool = True
    improve_prompt: str = "sgpo_improve"
    refine_prompt: str = "sgpo_refine"


_SGPO = Choices()
_DAGGER = replace(_SGPO, separate=True)
_DOUBLE_DAGGER = replace(_DAGGER, kinds=("answer",))
VARIANTS = {
    Variant.sgpo: _SGPO,
    Variant.dagger: _DAGGER,
    Variant.double_dagger: _DOUBLE_DAGGER,
    Variant.diamond: replace(_SGPO, improved_chosen=False),
    Variant.v1: _DOUBLE_DAGGER,
    Variant.v2: replace(_SGPO, kinds=("answer",)),
    Variant.v3: _DAGGER,
    Variant.all_ref: replace(_SGPO, improve_prompt="sgpo_refine"),
    Variant.no_ref: replace(_SGPO, refine_prompt="sgpo_improve"),
}


def check_variant(variant: Variant, extra_step2: int) -> None:
    """Raise ConfigError for a number of extra steps that cannot be."""
    if extra_step2 < 0:
        raise ConfigError(f"algorithm.extra_step2={extra_step2}: expected 0 or more")
    if extra_step2 and VARIANTS[variant].separate:
        raise ConfigError(
            f"algorithm.extra_step2={extra_step2}: variant {variant.name} keeps the improver apart "
            "from the policy, and the policy cannot improve its own answers. Use sgpo, v2, all_ref "
            "or no_ref."
        )
