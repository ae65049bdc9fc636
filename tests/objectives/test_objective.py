from __future__ import annotations

import math

import pytest
import torch
from one_pair import EVERY_PAIRED, USUAL, Evaluated, evaluate, pair_logps
from vectors import VECTORS, Vector

from nemo_selfpref.errors import ConfigError
from nemo_selfpref.objectives.objective import (
    DPOObjective,
    IPOObjective,
    NLLScope,
    Objective,
    ORPOObjective,
    Pass,
    SFTObjective,
    SPCEObjective,
    SrDPOObjective,
    SrIPOObjective,
)

by_name = pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v.name)


def evaluate_vector(vector: Vector, dtype: torch.dtype) -> Evaluated:
    return evaluate(vector.objective, vector.logps, vector.lengths, dtype, strength=vector.strength)


@by_name
def test_value_and_gradients_of_the_literal_vectors(vector: Vector) -> None:
    found = evaluate_vector(vector, torch.float64)
    assert found.value == pytest.approx(vector.loss, rel=1e-12, abs=1e-30)
    assert found.chosen == pytest.approx(vector.grads[0], rel=1e-12, abs=1e-15)
    assert found.rejected == pytest.approx(vector.grads[1], rel=1e-12, abs=1e-15)
    assert found.refined == [0.0, 0.0, 0.0, 0.0]
    assert found.result.weight.tolist() == [1]


@by_name
def test_the_literal_vectors_in_float32(vector: Vector) -> None:
    found = evaluate_vector(vector, torch.float32)
    assert found.result.loss.dtype == torch.float32
    assert found.value == pytest.approx(vector.loss, rel=1e-6, abs=1e-12)
    assert found.chosen == pytest.approx(vector.grads[0], rel=2e-6, abs=1e-6)
    assert found.rejected == pytest.approx(vector.grads[1], rel=2e-6, abs=1e-6)


def test_there_is_a_vector_of_every_kind() -> None:
    assert len(VECTORS) == 22
    assert {type(v.objective) for v in VECTORS} == {type(o) for o in EVERY_PAIRED}


@pytest.mark.parametrize("objective", EVERY_PAIRED, ids=repr)
def test_half_precision_gives_float32(objective: Objective) -> None:
    result = evaluate(objective, USUAL, dtype=torch.bfloat16, strength=0.5).result
    assert result.loss.dtype == torch.float32
    assert result.weight.dtype == torch.int64


@pytest.mark.parametrize("scope", list(NLLScope))
@pytest.mark.parametrize(("pc", "pr"), [(0.0, -3.0), (-3.0, 0.0), (0.0, 0.0), (-1e-30, -5e4)])
def test_orpo_of_a_certain_answer_is_finite(pc: float, pr: float, scope: NLLScope) -> None:
    objective = ORPOObjective(0.1, scope)
    found = evaluate(objective, (pc, pr, 0.0, 0.0), dtype=torch.float32)
    assert math.isfinite(found.value)
    assert math.isfinite(found.chosen) and math.isfinite(found.rejected)


def test_orpo_likelihood_over_prompt_and_response() -> None:
    # pair_logps: the whole chosen sequence sums to -24 - 6 over 20 + 3 tokens.
    full = evaluate(ORPOObjective(0.05), (-24.0, -40.0, 0.0, 0.0), (20, 25))
    response = evaluate(ORPOObjective(0.05, NLLScope.response), (-24.0, -40.0, 0.0, 0.0), (20, 25))
    odds_ratio_term = 0.02308977650001455
    assert full.value == pytest.approx(30 / 23 + odds_ratio_term, rel=1e-12)
    assert response.value == pytest.approx(24 / 20 + odds_ratio_term, rel=1e-12)
    assert full.metrics["nll_loss"] == pytest.approx(30 / 23, rel=1e-12)
    # The likelihood term's slope by pc goes from -1/20 to -1/23.
    assert full.chosen - response.chosen == pytest.approx(1 / 20 - 1 / 23, rel=1e-12)


COMMON = {
    "rewards/chosen": 0.25,
    "rewards/rejected": -0.225,
    "rewards/margins": 0.475,
    "rewards/accuracies": 1.0,
    "logps/chosen": -42.5,
    "logps/rejected": -50.25,
    "lengths/chosen": 20.0,
    "lengths/rejected": 25.0,
}
"""beta 0.1: rewards 0.1 * 2.5 and 0.1 * -2.25."""


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        (DPOObjective(0.1), {}),
        (IPOObjective(0.1), {}),
        # sigmoid(0.1 * 4.75).
        (SPCEObjective(0.1), {"strength": 0.7, "strength/predicted": 0.6165665045213193}),
        (
            SrDPOObjective(0.1, 0.3),
            {"marginal": 4.75, "augmented/marginal": 3.0, "augmented/accuracies": 1.0},
        ),
        (
            SrIPOObjective(0.1, 0.3),
            {"marginal": 4.75, "augmented/marginal": 3.0, "augmented/accuracies": 1.0},
        ),
    ],
    ids=repr,
)
def test_metrics(objective: Objective, more: dict[str, float]) -> None:
    found = evaluate(objective, USUAL, (20, 25), strength=0.7)
    assert found.metrics == pytest.approx(COMMON | more)
    assert not any(value.requires_grad for value in found.result.metrics.values())


def test_a_tie_is_not_accurate() -> None:
    tie = (-1.0, -2.0, -1.0, -2.0)
    metrics = evaluate(SrDPOObjective(0.1, 0.3), tie, refined=tie).metrics
    assert metrics["rewards/accuracies"] == metrics["augmented/accuracies"] == 0.0


def test_length_normalised_rewards() -> None:
    # 0.1 * 2.5 / 20 and 0.1 * -2.25 / 25.
    metrics = evaluate(IPOObjective(0.1, length_normalized=True), USUAL, (20, 25)).metrics
    assert metrics["rewards/chosen"] == pytest.approx(0.0125)
    assert metrics["rewards/rejected"] == pytest.approx(-0.009)


@pytest.mark.parametrize(
    ("delta_beta", "loss", "grads"),
    [
        # h = 2.5/20 + 2.25/25 = 0.215, h(p+x) = 1.5/20 + 1.5/25 = 0.135.
        # 0.215 - 0.3 * 0.1 * 0.135 - 5 = -4.78905; slopes 2 * that / 20 and -2 * that / 25.
        (True, 22.9349999025, (-0.478905, 0.383124)),
        # 0.215 - 0.3 * 0.135 - 5 = -4.8255.
        (False, 23.28545025, (-0.48255, 0.38604)),
    ],
)
def test_length_normalised_refinement(
    delta_beta: bool, loss: float, grads: tuple[float, float]
) -> None:
    objective = SrIPOObjective(0.1, 0.3, delta_beta, length_normalized=True)
    found = evaluate(objective, USUAL, (20, 25))
    assert found.value == pytest.approx(loss, rel=1e-12)
    assert (found.chosen, found.rejected) == pytest.approx(grads, rel=1e-12)
    assert found.metrics["marginal"] == pytest.approx(0.215)
    assert found.metrics["augmented/marginal"] == pytest.approx(0.135)


def test_the_singular_sr_ipo_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"singular: got lam = 1.0 with delta_beta = false and beta = 0.1"
    ):
        SrIPOObjective(0.1, 1.0, delta_beta=False)
    with pytest.raises(ConfigError, match=r"got lam = 2.0 with delta_beta = true and beta = 0.5"):
        SrIPOObjective(0.5, 2.0)
    SrIPOObjective(0.1, 1.0)
    SrIPOObjective(0.1, 0.5, delta_beta=False)


def test_only_spce_reads_the_strength() -> None:
    for objective in EVERY_PAIRED:
        weak, strong = (evaluate(objective, USUAL, strength=p).value for p in (0.2, 0.9))
        assert (weak == strong) == (not isinstance(objective, SPCEObjective))


def test_every_pair_has_its_own_strength() -> None:
    # h = 4.75, beta 0.1: spce-1 and spce-3-p1 of the vectors in one batch.
    policy = pair_logps(torch.tensor([-42.5, -42.5]), torch.tensor([-50.25, -50.25]), (10, 12))
    reference = pair_logps(torch.tensor([-45.0, -45.0]), torch.tensor([-48.0, -48.0]), (10, 12))
    passes = {Pass.POLICY: policy, Pass.REFERENCE: reference}
    result = SPCEObjective(0.1)(passes, torch.tensor([0.7, 1.0]))
    assert result.loss.tolist() == pytest.approx([0.6260890878708247, 0.4835890878708247])
    assert result.metrics["strength"].tolist() == pytest.approx([0.7, 1.0])
    assert result.weight.tolist() == [1, 1]


def test_sft_weighs_by_response_tokens() -> None:
    chosen = torch.tensor([-6.0, -2.0], requires_grad=True)
    rows = pair_logps(chosen, torch.empty(0), (3, 0))
    result = SFTObjective()({Pass.POLICY: rows}, torch.ones(2))
    result.loss.sum().backward()
    assert result.loss.tolist() == [6.0, 2.0]
    assert result.weight.tolist() == [3, 3]
    assert chosen.grad is not None and chosen.grad.tolist() == [-1.0, -1.0]


def test_which_passes_each_loss_needs() -> None:
    assert SFTObjective.passes == ORPOObjective.passes == {"policy"}
    for kind in (DPOObjective, IPOObjective, SPCEObjective):
        assert kind.passes == {"policy", "reference"}
    for kind in (SrDPOObjective, SrIPOObjective):
        assert kind.passes == {"policy", "reference", "refined", "refined_reference"}
    assert [o for o in (*EVERY_PAIRED, SFTObjective()) if not o.paired] == [SFTObjective()]
