"""Writes nemo_selfpref/objectives/selftest_vectors.json:

    python tests/objectives/make_vectors.py > nemo_selfpref/objectives/selftest_vectors.json

Every loss is written down here once more, from the papers, in mpmath's numbers of 50 digits;
gradients are numerical derivatives of it. Nothing of the package is used.
"""

from __future__ import annotations

import json
from typing import Any

from mpmath import diff, exp, log, mp, mpf

mp.dps = 50
Inputs = dict[str, Any]
USUAL = {"pc": -42.5, "pr": -50.25, "rc": -45.0, "rr": -48.0}
SAME = {"pc": -30.0, "pr": -31.0, "rc": -30.0, "rr": -31.0}
FAR = {"pc": -900.0, "pr": -40.0, "rc": -45.0, "rr": -48.0}
REFINED = {"apc": -43.0, "apr": -51.0, "arc": -44.5, "arr": -49.5}
LENGTHS = {"nc": 20, "nr": 25}


def softplus(x: Any) -> Any:
    """-log sigmoid(-x)."""
    return log(1 + exp(x))


def h(v: Inputs) -> Any:
    return (v["pc"] - v["rc"]) - (v["pr"] - v["rr"])


def dpo(v: Inputs) -> Any:
    z, e = v["beta"] * h(v), v.get("label_smoothing", mpf(0))
    return (1 - e) * softplus(-z) + e * softplus(z)


def ipo_sum(v: Inputs) -> Any:
    return (h(v) - 1 / (2 * v["beta"])) ** 2


def ipo_mean(v: Inputs) -> Any:
    per_token = (v["pc"] - v["rc"]) / v["nc"] - (v["pr"] - v["rr"]) / v["nr"]
    return (per_token - 1 / (2 * v["beta"])) ** 2


def spce(v: Inputs) -> Any:
    z = v["beta"] * h(v)
    return v["p"] * softplus(-z) + (1 - v["p"]) * softplus(z)


def orpo(v: Inputs) -> Any:
    chosen, rejected = v["pc"] / v["nc"], v["pr"] / v["nr"]
    odds = [exp(mean) / (1 - exp(mean)) for mean in (chosen, rejected)]
    return -chosen + v["lam"] * softplus(-log(odds[0] / odds[1]))


def augmented(v: Inputs) -> Any:
    """Of constants: the losses stop the gradient here."""
    return mpf(REFINED["apc"]) - REFINED["arc"] - (mpf(REFINED["apr"]) - REFINED["arr"])


def sr_dpo(v: Inputs) -> Any:
    return softplus(-(v["beta"] * h(v) - v["lam"] * v["beta"] * augmented(v)))


def sr_ipo(v: Inputs) -> Any:
    delta = augmented(v) * (v["beta"] if v["delta_beta"] else 1)
    return (h(v) - v["lam"] * delta - 1 / (2 * v["beta"])) ** 2


CASES: list[tuple[str, Any, Inputs]] = [
    ("dpo", dpo, {"beta": 0.1, **USUAL}),
    ("dpo-same", dpo, {"beta": 0.1, **SAME}),
    ("dpo-far", dpo, {"beta": 0.1, **FAR}),
    ("cdpo", dpo, {"beta": 0.1, "label_smoothing": 0.1, **USUAL}),
    ("ipo-sum", ipo_sum, {"beta": 0.1, **USUAL}),
    ("ipo-mean", ipo_mean, {"beta": 0.1, **LENGTHS, **USUAL}),
    ("orpo", orpo, {"lam": 0.05, "pc": -24.0, "pr": -40.0, **LENGTHS}),
    ("sr-dpo", sr_dpo, {"beta": 0.1, "lam": 0.3, "delta_beta": True, **USUAL, **REFINED}),
    ("sr-ipo", sr_ipo, {"beta": 0.1, "lam": 0.3, "delta_beta": True, **USUAL, **REFINED}),
    ("sr-ipo-plain", sr_ipo, {"beta": 0.1, "lam": 0.3, "delta_beta": False, **USUAL, **REFINED}),
    ("spce", spce, {"beta": 0.1, "p": 0.7, **USUAL}),
    ("spce-certain", spce, {"beta": 0.1, "p": 1.0, **USUAL}),
]


def exact(inputs: Inputs) -> Inputs:
    """The decimal numbers as written; log-probs and lengths are whole or binary fractions."""
    return {k: v if isinstance(v, bool) else mpf(v) for k, v in inputs.items()}


def slope(formula: Any, inputs: Inputs, name: str) -> float:
    return float(diff(lambda x: formula({**inputs, name: x}), inputs[name]))


def case(name: str, formula: Any, inputs: Inputs) -> dict[str, Any]:
    values = exact(inputs)
    grads = {name: slope(formula, values, name) for name in ("pc", "pr")}
    grads |= {name: 0.0 for name in ("apc", "apr") if name in inputs}
    expected = {"loss": float(formula(values)), "grads": grads}
    return {"id": name, "loss": formula.__name__, "inputs": inputs, "expected": expected}


def vectors() -> dict[str, Any]:
    return {"schema": 1, "cases": [case(*given) for given in CASES]}


if __name__ == "__main__":
    print(json.dumps(vectors(), indent=1))
