from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_selfpref.data.batching import (
    PackedBatch,
    StepPlan,
    collate,
    sequences_of,
)
from nemo_selfpref.data.spans import ContextSlices, Span
from nemo_selfpref.types import Demonstration, PreferencePair

PAIR = PreferencePair("p", (11, 12), (13, 14, 2), (15, 2))
DEMO = Demonstration("d", (), (21, 22), (23, 2), "x", "f:1")


def lengths_of(batch: PackedBatch) -> list[int]:
    return [span.length for span in batch.spans]


def as_lists(batch: PackedBatch) -> dict[str, list[int]]:
    return {k: v.tolist() for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}


def test_a_pair_by_hand() -> None:
    # Chosen 11 12 | 13 14 2 at 0..4, rejected 11 12 | 15 2 at 5..8; each answer token is predicted
    # from the place before it.
    batch = collate(sequences_of([PAIR], paired=True), [7], paired=True)
    assert as_lists(batch) == {
        "tokens": [11, 12, 13, 14, 2, 11, 12, 15, 2],
        "positions": [0, 1, 2, 3, 4, 0, 1, 2, 3],
        "predict_from": [1, 2, 3, 6, 7],
        "targets": [13, 14, 2, 15, 2],
        "target_sequence": [0, 0, 0, 1, 1],
        "target_is_response": [True] * 5,
    }
    assert (batch.rows, lengths_of(batch), batch.num_sequences) == ((7,), [5, 4], 2)
    assert batch.paired and batch.counted


def test_prompt_targets_are_those_of_the_chosen_sequence_only() -> None:
    batch = collate(sequences_of([PAIR], paired=True), [7], paired=True, prompt_targets=True)
    assert batch.predict_from.tolist() == [0, 1, 2, 3, 6, 7]
    assert batch.targets.tolist() == [12, 13, 14, 2, 15, 2]
    assert batch.target_is_response.tolist() == [False, True, True, True, True, True]
    assert batch.target_sequence.tolist() == [0, 0, 0, 0, 1, 1]


def test_padding_is_a_sequence_that_no_target_reads() -> None:
    plain = as_lists(collate(sequences_of([PAIR], paired=True), [7], paired=True))
    batch = collate(sequences_of([PAIR], paired=True), [7], paired=True, pad_multiple=4)
    padded = as_lists(batch)
    assert padded.pop("tokens") == [*plain.pop("tokens"), 0, 0, 0]
    assert padded.pop("positions") == [*plain.pop("positions"), 0, 1, 2]
    assert padded == plain
    assert lengths_of(batch) == [5, 4, 3] and batch.num_sequences == 2


def test_nothing_is_padded_where_it_fits() -> None:
    sequences = sequences_of([PAIR], paired=True)
    assert lengths_of(collate(sequences, [7], paired=True, pad_multiple=3)) == [5, 4]


def test_demonstrations_have_one_sequence_each() -> None:
    batch = collate(sequences_of([DEMO, PAIR], paired=False), [0, 1], paired=False)
    assert batch.tokens.tolist() == [21, 22, 23, 2, 11, 12, 13, 14, 2]
    assert batch.targets.tolist() == [23, 2, 13, 14, 2]
    assert batch.num_sequences == 2


def test_pairs_first_chosen_then_rejected() -> None:
    other = PreferencePair("q", (31,), (32,), (33,))
    assert sequences_of([PAIR, other], paired=True) == [
        ((11, 12), (13, 14, 2)),
        ((31,), (32,)),
        ((11, 12), (15, 2)),
        ((31,), (33,)),
    ]


def test_demonstrations_are_no_pairs() -> None:
    with pytest.raises(AssertionError, match="given demonstrations"):
        sequences_of([DEMO], paired=True)


def test_the_first_token_of_a_sequence_without_prompt_is_no_target() -> None:
    batch = collate([((), (5, 6, 7))], [0], paired=False)
    assert batch.predict_from.tolist() == [0, 1] and batch.targets.tolist() == [6, 7]


def test_to_moves_every_tensor() -> None:
    moved = collate([((5,), (6,))], [0], paired=False).to(torch.device("meta"))
    assert moved.tokens.device.type == moved.targets.device.type == "meta"
    assert moved.rows == (0,)


def test_a_shared_prompt_is_laid_down_once() -> None:
    # Prompt 11 12 at 0..1, chosen 13 14 2 at 2..4, rejected 15 2 at 5..6: the first token of each
    # answer is predicted from the prompt's last place.
    batch = collate(sequences_of([PAIR], paired=True), [7], paired=True, share_prompts=True)
    assert as_lists(batch) == {
        "tokens": [11, 12, 13, 14, 2, 15, 2],
        "positions": [0, 1, 2, 3, 4, 2, 3],
        "predict_from": [1, 2, 3, 1, 5],
        "targets": [13, 14, 2, 15, 2],
        "target_sequence": [0, 0, 0, 1, 1],
        "target_is_response": [True] * 5,
    }
    assert batch.spans == (Span(0, 2), Span(2, 3, 0, 2), Span(5, 2, 0, 2))


def test_a_shared_prompt_is_a_target_of_each_chosen_sequence() -> None:
    batch = collate(
        sequences_of([PAIR], paired=True), [7], paired=True, prompt_targets=True, share_prompts=True
    )
    assert batch.predict_from.tolist() == [0, 1, 2, 3, 1, 5]
    assert batch.targets.tolist() == [12, 13, 14, 2, 15, 2]


def test_a_prompt_of_one_answer_is_not_cut_off() -> None:
    sequences = [((5,), (6, 2)), ((7,), (8, 2)), ((5,), (9, 2))]
    batch = collate(sequences, [0, 1, 2], paired=False, share_prompts=True)
    assert batch.tokens.tolist() == [5, 6, 2, 7, 8, 2, 9, 2]
    assert batch.spans == (Span(0, 1), Span(1, 2, 0, 1), Span(3, 3), Span(6, 2, 0, 1))
    assert batch.predict_from.tolist() == [0, 1, 3, 4, 0, 6]


@pytest.mark.parametrize("share", [False, True])
def test_context_parts_cover_every_target_once(share: bool) -> None:
    sequences = sequences_of([PAIR], paired=True)
    batch = collate(sequences, [7], paired=True, pad_multiple=4, share_prompts=share)
    parts = [batch.part(ContextSlices(batch.tokens.numel(), 2, rank)) for rank in range(2)]
    seen = []
    for rank, part in enumerate(parts):
        own = ContextSlices(batch.tokens.numel(), 2, rank).own_tokens()
        assert torch.equal(part.tokens, batch.tokens[own])
        assert torch.equal(part.positions, batch.positions[own])
        rows = own[part.predict_from].tolist()
        seen += list(zip(rows, part.targets.tolist(), part.target_sequence.tolist(), strict=True))
    columns = batch.predict_from, batch.targets, batch.target_sequence
    assert sorted(seen) == sorted(zip(*(c.tolist() for c in columns), strict=True))


def test_steps_of_an_epoch_with_a_small_last_one() -> None:
    plan = StepPlan(num_rows=10, global_batch_size=4, max_epochs=2, shuffle=False)
    assert (plan.steps_per_epoch, plan.num_steps) == (3, 6)
    first = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [plan.rows_of_step(step) for step in range(6)] == first + first


@pytest.mark.parametrize(("limit", "steps"), [(-1, 6), (4, 4), (6, 6), (9, 6)])
def test_max_steps(limit: int, steps: int) -> None:
    assert StepPlan(10, 4, 2, max_steps=limit).num_steps == steps


def test_the_order_is_fixed_by_the_seed() -> None:
    plan = StepPlan(6, 2, 2, seed=5)
    again = StepPlan(6, 2, 2, seed=5, max_steps=4)
    assert [plan.rows_of_step(s) for s in range(4)] == [again.rows_of_step(s) for s in range(4)]
    # The order does not move with the size of the steps.
    wide = StepPlan(6, 6, 2, seed=5)
    assert wide.rows_of_step(0) == [row for s in range(3) for row in plan.rows_of_step(s)]
    assert StepPlan(6, 6, 2, seed=6).rows_of_step(0) != wide.rows_of_step(0)


def test_epochs_differ() -> None:
    plan = StepPlan(20, 20, 3, seed=1)
    orders = {tuple(plan.rows_of_step(epoch)) for epoch in range(3)}
    assert len(orders) == 3


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 2**31 - 1))
def test_an_epoch_holds_every_row_once(rows: int, batch: int, seed: int) -> None:
    plan = StepPlan(rows, batch, 2, seed=seed)
    for epoch in range(2):
        start = epoch * plan.steps_per_epoch
        steps = [plan.rows_of_step(start + i) for i in range(plan.steps_per_epoch)]
        assert sorted(row for step in steps for row in step) == list(range(rows))
