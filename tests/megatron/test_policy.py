from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import MakePolicy

from nemo_selfpref.config.model_schema import OptimConfig
from nemo_selfpref.data.batching import PackedBatch, TokenSequence, collate, sequences_of
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.scoring import _by_tokens
from nemo_selfpref.objectives.inputs import PassLogps, StepInputs
from nemo_selfpref.objectives.objective import (
    DPOObjective,
    NLLScope,
    Objective,
    ORPOObjective,
    PairLogps,
    Pass,
    SFTObjective,
    SPCEObjective,
    SrDPOObjective,
)
from nemo_selfpref.types import PreferencePair

PAIRS = [
    PreferencePair("a", (5, 6, 7), (8, 9, 2), (10, 2)),
    PreferencePair("b", (30,), (31, 2), (32, 33, 34, 2)),
    PreferencePair("c", (40, 41, 42, 43), (44, 2), (45, 46, 2)),
]


def batch_of(*numbers: int, paired: bool = True, full: bool = False) -> PackedBatch:
    rows = [PAIRS[n] for n in numbers]
    return collate(sequences_of(rows, paired), numbers, paired=paired, prompt_targets=full)


@torch.no_grad()
def huggingface_logps(folder: Path, sequences: Sequence[TokenSequence]) -> list[float]:
    """Response log-prob sums by transformers, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    sums = []
    for prompt, response in sequences:
        ids = torch.tensor([prompt + response])
        logprobs = model(ids).logits[0].double().log_softmax(-1)
        at = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        sums.append(float(at[len(prompt) - 1 :].sum()))
    return sums


@pytest.mark.parametrize("tied", [False, True])
def test_score_equals_transformers(
    make_policy: MakePolicy, llama_folder: Path, tied_folder: Path, tied: bool
) -> None:
    folder = tied_folder if tied else llama_folder
    sequences = sequences_of(PAIRS, paired=True)
    found = make_policy(folder).score(sequences)
    assert found.sums.tolist() == pytest.approx(huggingface_logps(folder, sequences), abs=1e-4)
    assert found.lengths.tolist() == [3, 2, 2, 2, 4, 3]
    assert found.sums.dtype == torch.float64


def test_score_reports_its_progress(policy: Policy) -> None:
    seen: list[int] = []
    policy.score(sequences_of(PAIRS, paired=True), seen.append)
    assert sum(seen) == 6


def test_scoring_is_cut_by_tokens(policy: Policy) -> None:
    sequences = [((1,) * 5000, (2,)), ((1,) * 3000, (2,) * 100), ((1,) * 100, (2,))]
    # 5001 + 3100 = 8101 fit into 8192, 101 more do not; one too long goes alone.
    assert list(_by_tokens(sequences, [0, 1, 2])) == [[0, 1], [2]]
    assert list(_by_tokens([((1,) * 9000, (2,)), ((1,), (2,))], [0, 1])) == [[0], [1]]
    assert list(_by_tokens(sequences, [])) == []


REFERENCE = PassLogps(
    chosen=torch.tensor([-19.0, -12.0, -13.0]), rejected=torch.tensor([-12.0, -25.0, -18.0])
)
PASSES = {
    Pass.REFERENCE: REFERENCE,
    Pass.REFINED: PassLogps(torch.tensor([-17.0, -12.5, -11.0]), REFERENCE.rejected - 1),
    Pass.REFINED_REFERENCE: PassLogps(REFERENCE.chosen - 2, REFERENCE.rejected),
}
STRENGTH = [1.0, 0.6, 0.75]


def inputs(objective: Objective) -> StepInputs:
    """Of PAIRS, with the passes the loss asks for."""
    passes = {name: PASSES[name] for name in objective.passes - {Pass.POLICY}}
    return StepInputs(torch.tensor(STRENGTH), passes)


def test_a_pass_picks_the_rows_of_the_batch() -> None:
    policy = PairLogps(
        chosen=torch.tensor([-1.0, -2.0]),
        chosen_len=torch.tensor([3, 4]),
        rejected=torch.tensor([-3.0, -4.0]),
        rejected_len=torch.tensor([5, 6]),
        full_chosen=torch.tensor([-5.0, -6.0]),
        full_chosen_len=torch.tensor([7, 8]),
    )
    found = REFERENCE.of((2, 0), policy)
    assert found.chosen.tolist() == [-13.0, -19.0]
    assert found.rejected.tolist() == [-18.0, -12.0]
    assert found.chosen_len is policy.chosen_len


def test_metrics_of_a_batch(policy: Policy) -> None:
    objective = DPOObjective(0.1)
    score = policy.score(sequences_of(PAIRS, paired=True))
    chosen, rejected = score.sums[:3], score.sums[3:]
    h = (chosen - REFERENCE.chosen) - (rejected - REFERENCE.rejected)
    metrics = policy.train_batch([batch_of(0, 1), batch_of(2)], objective, inputs(objective))
    assert metrics["loss"] == pytest.approx(float(torch.log1p((-0.1 * h).exp()).mean()), rel=1e-5)
    assert metrics["logps/chosen"] == pytest.approx(float(chosen.mean()), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(float(0.1 * h.mean()), rel=1e-4)
    assert metrics["lengths/rejected"] == 3.0  # (2 + 4 + 3) / 3
    # Each prompt comes twice: 6 + 5, 3 + 5 and 6 + 7.
    assert metrics["tokens"] == 32


def test_every_row_has_its_own_strength(policy: Policy) -> None:
    """SPCE (OSP, eq. 8): -s log sigmoid(beta h) - (1 - s) log sigmoid(-beta h)."""
    score = policy.score(sequences_of(PAIRS, paired=True))
    chosen, rejected = score.sums[:3], score.sums[3:]
    h = (chosen - REFERENCE.chosen) - (rejected - REFERENCE.rejected)
    s = torch.tensor(STRENGTH)
    want = s * torch.log1p((-0.1 * h).exp()) + (1 - s) * torch.log1p((0.1 * h).exp())
    objective = SPCEObjective(0.1)
    # Not in the order of the rows.
    metrics = policy.train_batch([batch_of(2), batch_of(1, 0)], objective, inputs(objective))
    assert metrics["loss"] == pytest.approx(float(want.mean()), rel=1e-5)
    assert metrics["strength"] == pytest.approx(2.35 / 3)  # (1 + 0.6 + 0.75) / 3


def gradients(
    policy: Policy, batches: Sequence[PackedBatch], objective: Objective
) -> dict[str, torch.Tensor]:
    policy.train_batch(batches, objective, inputs(objective))
    named = policy.module.named_parameters()
    return {name: p.main_grad.clone() for name, p in named}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "objective",
    [
        DPOObjective(0.1),
        ORPOObjective(0.1),
        SFTObjective(),
        SPCEObjective(0.1),
        SrDPOObjective(1, 0.3),
    ],
    ids=lambda o: type(o).__name__,
)
def test_gradients_do_not_depend_on_the_cut_into_micro_batches(
    policy: Policy, objective: Objective
) -> None:
    def batch(*numbers: int) -> PackedBatch:
        full = getattr(objective, "nll_scope", None) is NLLScope.full
        return batch_of(*numbers, paired=objective.paired, full=full)

    whole = gradients(policy, [batch(0, 1, 2)], objective)
    cut = gradients(policy, [batch(2), batch(0, 1)], objective)
    assert sum(float(g.abs().sum()) for g in whole.values()) > 1.0
    for name, gradient in whole.items():
        torch.testing.assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 2])
def test_gradients_are_those_of_autograd(
    policy: Policy, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT over the response tokens, against plain backward on the same module, also once the
    optimizer has stepped: nothing of earlier gradients may be left."""
    batch = batch_of(0, 1, 2, paired=False)
    optimizer = PolicyOptimizer(policy, OptimConfig(lr=1e-3), 1.0)
    for _ in range(steps):
        gradients(policy, [batch], SFTObjective())
        optimizer.step()
    got = gradients(policy, [batch], SFTObjective())
    # Autograd gets the output layer's gradient too, instead of the optimizer's buffer.
    monkeypatch.setattr(policy.head, "output_grad_sink", lambda: None)
    batch, hidden = policy.forward(policy.module, batch)
    loss = -policy.response_logprobs(hidden, batch).sum() / 7  # 3 + 2 + 2 response tokens
    want = torch.autograd.grad(loss, list(policy.module.parameters()))
    for (name, gradient), exact in zip(got.items(), want, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6, msg=name)


def test_a_stand_in_batch_counts_for_nothing(policy: Policy) -> None:
    objective = SFTObjective()
    alone = gradients(policy, [batch_of(0, paired=False)], objective)
    stand_in = replace(batch_of(1, paired=False), counted=False)
    metrics = policy.train_batch(
        [batch_of(0, paired=False), stand_in], objective, inputs(objective)
    )
    for name, p in policy.module.named_parameters():
        torch.testing.assert_close(p.main_grad, alone[name], rtol=1e-5, atol=1e-7)  # type: ignore[attr-defined]
    assert metrics["lengths/chosen"] == 3.0 and metrics["tokens"] == 6


def test_pair_logps_of_prompt_and_response(policy: Policy) -> None:
    batch = batch_of(0, 2, full=True)
    with torch.no_grad():
        logps = policy.pair_logps(policy.forward(policy.module, batch)[1], batch)
    assert logps.chosen_len.tolist() == [3, 2] and logps.rejected_len.tolist() == [2, 3]
    # The first prompt token has nothing before it: 6 - 1 and 6 - 1 targets.
    assert logps.full_chosen_len.tolist() == [5, 5]
    whole = [((5,), (6, 7, 8, 9, 2)), ((40,), (41, 42, 43, 44, 2))]
    want = policy.score(whole).sums.tolist()
    assert logps.full_chosen.tolist() == pytest.approx(want, abs=1e-4)
