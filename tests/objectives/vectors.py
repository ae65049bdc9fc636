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
    SPCEObjective,
    SrDPOObjective,
    SrIPOObjective,
)


@dataclass(frozen=True)
class Vector:
    """logps: policy chosen, policy rejected, reference chosen, reference rejected; lengths: of
    chosen and rejected; grads: of the loss by the first two of logps. The refined passes are
    those of REFINED in every vector."""

    name: str
    objective: Objective
    logps: tuple[float, float, float, float]
    lengths: tuple[int, int]
    loss: float
    grads: tuple[float, float]
    strength: float = 1.0


REFINED = (-43.0, -51.0, -44.5, -49.5)
"""Log-probs under the prompt-augmented prompt, in the order of Vector.logps: h(p+x) = 3."""

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
    Vector(
        "srdpo-lam0.1",
        SrDPOObjective(0.1, 0.1),
        (-42.5, -50.25, -45.0, -48.0),
        (10, 12),
        0.4951987229081253,
        (-0.03905502163716748, 0.03905502163716748),
    ),
    Vector(
        "srdpo-lam0.3",
        SrDPOObjective(0.1, 0.3),
        (-42.5, -50.25, -45.0, -48.0),
        (10, 12),
        0.5190619932824316,
        (-0.0404921526133866, 0.0404921526133866),
    ),
    Vector(
        "srdpo-lam0.5",
        SrDPOObjective(0.1, 0.5),
        (-42.5, -50.25, -45.0, -48.0),
        (10, 12),
        0.5437926039781781,
        (-0.041945769517934044, 0.041945769517934044),
    ),
    Vector(
        "srdpo-lam1.0",
        SrDPOObjective(0.1, 1.0),
        (-42.5, -50.25, -45.0, -48.0),
        (10, 12),
        0.6094704306630468,
        (-0.04563613127629212, 0.04563613127629212),
    ),
    Vector(
        "srdpo-8-lam0",
        SrDPOObjective(0.1, 0.0),
        (-42.5, -50.25, -45.0, -48.0),
        (10, 12),
        0.4835890878708247,
        (-0.03834334954786807, 0.03834334954786807),
    ),
    Vector(
        "sripo-1",
        SrIPOObjective(0.1, 0.3),
        (-42.5, -50.25, -45.0, -48.0),
        (20, 25),
        0.11559999999999981,
        (-0.6799999999999995, 0.6799999999999995),
    ),
    Vector(
        "sripo-2-nobeta",
        SrIPOObjective(0.1, 0.3, delta_beta=False),
        (-42.5, -50.25, -45.0, -48.0),
        (20, 25),
        1.3224999999999993,
        (-2.2999999999999994, 2.2999999999999994),
    ),
    Vector(
        "sripo-4-lam0",
        SrIPOObjective(0.1, 0.0),
        (-42.5, -50.25, -45.0, -48.0),
        (20, 25),
        0.06249999999999986,
        (-0.49999999999999944, 0.49999999999999944),
    ),
    Vector(
        "spce-1",
        SPCEObjective(0.1),
        (-42.5, -50.25, -45.0, -48.0),
        (10, 12),
        0.6260890878708247,
        (-0.008343349547868065, 0.008343349547868065),
        strength=0.7,
    ),
    Vector(
        "spce-3-p1",
        SPCEObjective(0.1),
        (-42.5, -50.25, -45.0, -48.0),
        (10, 12),
        0.4835890878708247,
        (-0.03834334954786807, 0.03834334954786807),
        strength=1.0,
    ),
    Vector(
        "spce-4-p.5-init",
        SPCEObjective(0.02),
        (-30.0, -31.0, -30.0, -31.0),
        (10, 12),
        0.6931471805599453,
        (0.0, 0.0),
        strength=0.5,
    ),
    Vector(
        "spce-5-tinybeta",
        SPCEObjective(0.001),
        (-42.5, -50.25, -45.0, -48.0),
        (10, 12),
        0.6925800008697939,
        (-0.00011881250223274236, 0.00011881250223274236),
        strength=0.62,
    ),
]
