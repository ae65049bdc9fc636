"""Losses at literal inputs: a file of numbers that others computed, against what is computed here.

    {"schema": 1, "cases": [{"id": NAME, "loss": KIND, "inputs": {...},
                             "expected": {"loss": VALUE, "grads": {INPUT: VALUE}}}]}

Inputs: log-prob sums pc, pr (policy, of the chosen and of the rejected answer), rc, rr (reference),
apc, apr, arc, arr (both under the augmented prompt); lengths nc, nr in tokens; beta, lam, p and the
other settings of a loss. Whatever else a file holds is not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_selfpref.errors import DataError
from nemo_selfpref.objectives.objective import (
    DPOObjective,
    IPOObjective,
    NLLScope,
    Objective,
    ORPOObjective,
    PairLogps,
    Pass,
    SPCEObjective,
    SrDPOObjective,
    SrIPOObjective,
)

OWN_VECTORS = Path(__file__).with_name("selftest_vectors.json")
FIRST_STEP = DPOObjective(beta=0.1)
"""A loss that is FIRST_STEP_LOSS for every pair where policy and reference are the same."""
FIRST_STEP_LOSS = math.log(2.0)

_PASSES = {
    Pass.POLICY: ("pc", "pr"),
    Pass.REFERENCE: ("rc", "rr"),
    Pass.REFINED: ("apc", "apr"),
    Pass.REFINED_REFERENCE: ("arc", "arr"),
}
_LOGPS = frozenset(name for names in _PASSES.values() for name in names)
_LENGTHS = ("nc", "nr")
_LENGTH, _STRENGTH = 10.0, 1.0
"""Where a case gives none; its loss does not look at them then."""


@dataclass(frozen=True)
class Vector:
    """One case. logps: by name of the input; grads: of the loss, by the same names."""

    name: str
    objective: Objective
    logps: Mapping[str, float]
    lengths: tuple[float, float]
    strength: float
    loss: float
    grads: Mapping[str, float]


def read_vectors(path: Path) -> tuple[list[Vector], list[str]]:
    """The cases of a file, and the names of those whose loss is none of ours.

    Raises:
        DataError: it cannot be read, is in another format, or a case lacks or adds an input.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        cases = [(str(c["id"]), str(c["loss"]), c) for c in found["cases"]]
        schema = found["schema"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is no file of loss vectors ({type(error).__name__}: {error}): expected "
            '{"schema": 1, "cases": [{"id", "loss", "inputs", "expected"}, ...]}'
        ) from error
    if schema != 1:
        raise DataError(f"{path}: got schema {schema!r}, expected 1")
    vectors = [_vector(path, name, case) for name, kind, case in cases if kind in _KINDS]
    if not vectors:
        raise DataError(f"{path}: no case of a loss known here; expected {', '.join(_KINDS)}")
    return vectors, [f"{name} ({kind})" for name, kind, _ in cases if kind not in _KINDS]


def _vector(path: Path, name: str, case: Mapping[str, Any]) -> Vector:
    try:
        inputs = dict(case["inputs"])
        logps = {key: float(inputs.pop(key)) for key in sorted(_LOGPS & inputs.keys())}
        nc, nr = (float(inputs.pop(key, _LENGTH)) for key in _LENGTHS)
        strength = float(inputs.pop("p", _STRENGTH))
        objective = _KINDS[case["loss"]](inputs)
        if inputs:
            raise ValueError(f"unknown inputs {sorted(inputs)}")
        needed = {key for which in objective.passes for key in _PASSES[which]}
        if missing := sorted(needed - logps.keys()):
            raise ValueError(f"inputs {missing} are missing")
        expected = case["expected"]
        grads = {str(k): float(v) for k, v in expected["grads"].items()}
        if strange := sorted(grads.keys() - logps.keys()):
            raise ValueError(f"gradients by {strange}, which are no inputs")
        loss = float(expected["loss"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: case {name}: {type(error).__name__}: {error}") from error
    return Vector(name, objective, logps, (nc, nr), strength, loss, grads)


_Settings = dict[str, Any]


def _refined(settings: _Settings) -> Objective:
    if not settings.pop("delta_beta", True):
        raise ValueError("delta_beta=false is no setting of this loss")
    return SrDPOObjective(settings.pop("beta"), settings.pop("lam"))


_KINDS: dict[str, Callable[[_Settings], Objective]] = {
    "dpo": lambda s: DPOObjective(s.pop("beta"), s.pop("label_smoothing", 0.0)),
    "ipo_sum": lambda s: IPOObjective(s.pop("beta")),
    "ipo_mean": lambda s: IPOObjective(s.pop("beta"), length_normalized=True),
    "orpo": lambda s: ORPOObjective(s.pop("lam"), NLLScope.response),
    "spce": lambda s: SPCEObjective(s.pop("beta")),
    "sr_dpo": _refined,
    "sr_ipo": lambda s: SrIPOObjective(
        s.pop("beta"), s.pop("lam"), s.pop("delta_beta", True), s.pop("length_norm", False)
    ),
}


def error_of(vector: Vector, device: torch.device) -> float:
    """Largest difference of value and gradients from those expected, computed in float64; relative
    to the expected number where that is above 1. NaN where something is not a number."""
    leaves = {
        name: torch.tensor([value], dtype=torch.float64, device=device, requires_grad=True)
        for name, value in vector.logps.items()
    }
    strength = torch.tensor([vector.strength], dtype=torch.float64, device=device)
    passes = {which: _logps(vector, which, leaves) for which in vector.objective.passes}
    loss = vector.objective(passes, strength).loss.sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    slopes = {
        name: 0.0 if slope is None else slope.item()
        for name, slope in zip(leaves, found, strict=True)
    }
    pairs = [(loss.item(), vector.loss), *((slopes[k], v) for k, v in vector.grads.items())]
    errors = [abs(got - expected) / max(1.0, abs(expected)) for got, expected in pairs]
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _logps(vector: Vector, which: Pass, leaves: Mapping[str, Tensor]) -> PairLogps:
    chosen, rejected = (leaves[name] for name in _PASSES[which])
    of_chosen, of_rejected = (chosen.detach().new_tensor([n]) for n in vector.lengths)
    return PairLogps(chosen, of_chosen, rejected, of_rejected, chosen, of_chosen)
