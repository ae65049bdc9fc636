"""Losses and their gradients at literal inputs, computed with 50 digits by mpmath.

The same numbers as the project's specification of the losses (loss_vectors.json).
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_selfpref.objectives.objective import (
    DPOObjective,
    IPOObjective,
    NLLScope,
    Objective,
    ORPOObjective,
)


@dataclass(frozen=True)
class Vector:
    """logps: policy chosen, policy rejected, reference chosen, reference rejected; lengths: of
    chosen and rejected; grads: of the loss by the first two of logps."""

    name: str
    objective: Objective
    logps: tuple[float, float, float, float]
    lengths: tuple[int, int]
    loss: float
    grads: tuple[float, float]


VECTORS = [
    Vector(
        "dpo-1",
        DPOObjective(0.1),
        (-42.5, -50.25, -45.0, -48.0),
        (10, 12),
        0.4835890878708247,
        (-0.03834334954786807, 0.03834334954786807),
    ),
    Vector(
        "dpo-3-init",
        DPOObjective(0.1),
        (-30.0, -31.0, -30.0, -31.0),
        (10, 12),
        0.6931471805599453,
        (-0.05, 0.05),
    ),
    Vector(
        "dpo-4-sgpo-beta",
        DPOObjective(0.01),
        (-42.5, -50.25, -45.0, -48.0),
        (10, 12),
        0.6696791853000574,
        (-0.004881272322437472, 0.004881272322437472),
    ),
    Vector(
        "cdpo-1",
        DPOObjective(0.1, 0.1),
        (-42.5, -50.25, -45.0, -48.0),
        (10, 12),
        0.5310890878708248,
        (-0.02834334954786807, 0.02834334954786807),
    ),
    Vector(
        "ipo-sum-1",
        IPOObjective(0.1),
        (-42.5, -50.25, -45.0, -48.0),
        (10, 12),
        0.06249999999999986,
        (-0.49999999999999944, 0.49999999999999944),
    ),
    Vector(
        "ipo-sum-3-opt",
        IPOObjective(0.1),
        (-40.0, -50.0, -43.0, -48.0),
        (10, 12),
        7.703719777548942e-32,
        (5.551115123125783e-16, -5.551115123125783e-16),
    ),
    Vector(
        "ipo-mean-1",
        IPOObjective(0.1, length_normalized=True),
        (-42.5, -50.25, -45.0, -48.0),
        (20, 25),
        22.896224999999998,
        (-0.4785, 0.3828),
    ),
    Vector(
        "ipo-mean-3-eqlen",
        IPOObjective(0.1, length_normalized=True),
        (-42.5, -50.25, -45.0, -48.0),
        (10, 10),
        20.475624999999997,
        (-0.9049999999999999, 0.9049999999999999),
    ),
    Vector(
        "orpo-1",
        ORPOObjective(0.05, NLLScope.response),
        (-24.0, -40.0, 0.0, 0.0),
        (20, 25),
        1.2230897765000146,
        (-0.051323145974619046, 0.0009268192272266464),
    ),
    Vector(
        "orpo-3-equal",
        ORPOObjective(0.1, NLLScope.response),
        (-15.0, -30.0, 0.0, 0.0),
        (10, 20),
        1.5693147180559945,
        (-0.10643608458394434, 0.003218042291972171),
    ),
]
