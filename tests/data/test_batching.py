from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_selfpref.data.batching import (
    PackedBatch,
    StepPlan,
    collate,
    micro_batches,
    sequences_of,
)
from nemo_selfpref.types import Demonstration, PreferencePair, TrainingRow

PAIR = PreferencePair("p", (11, 12), (13, 14, 2), (15, 2))
DEMO = Demonstration("d", (), (21, 22), (23, 2), "x", "f:1")


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
    assert (batch.rows, batch.lengths, batch.num_sequences) == ((7,), (5, 4), 2)
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
    assert batch.lengths == (5, 4, 3) and batch.num_sequences == 2


def test_nothing_is_padded_where_it_fits() -> None:
    sequences = sequences_of([PAIR], paired=True)
    assert collate(sequences, [7], paired=True, pad_multiple=3).lengths == (5, 4)


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


def some_rows(count: int) -> list[TrainingRow]:
    return [PreferencePair(str(i), (100 + i,), (200 + i, 2), (300 + i, 2)) for i in range(count)]


def cut(
    numbers: list[int], replica: int, replicas: int, micro: int, rows: int = 20
) -> list[PackedBatch]:
    return micro_batches(
        some_rows(rows),
        numbers,
        replica=replica,
        num_replicas=replicas,
        micro_batch_size=micro,
        paired=True,
    )


def test_rows_go_round_the_replicas() -> None:
    numbers = [9, 4, 7, 1, 0]
    assert [b.rows for b in cut(numbers, 0, 2, 2)] == [(9, 7), (0,)]
    assert [b.rows for b in cut(numbers, 1, 2, 2)] == [(4, 1)]


@given(
    st.lists(st.integers(0, 19), min_size=1, max_size=20, unique=True),
    st.integers(1, 5),
    st.integers(1, 6),
)
def test_replicas_cover_each_row_exactly_once(
    numbers: list[int], replicas: int, micro: int
) -> None:
    batches = [b for replica in range(replicas) for b in cut(numbers, replica, replicas, micro)]
    counted = Counter(row for b in batches if b.counted for row in b.rows)
    assert counted == Counter(numbers)
    assert all(1 <= len(b.rows) <= micro for b in batches)


def test_a_replica_without_rows_gets_a_stand_in() -> None:
    assert [(b.rows, b.counted) for b in cut([8, 3], 1, 3, 4)] == [((3,), True)]
    assert [(b.rows, b.counted) for b in cut([8, 3], 2, 3, 4)] == [((8,), False)]


def test_batches_hold_the_tokens_of_their_rows() -> None:
    (batch,) = cut([2, 5], 0, 1, 4)
    assert batch.tokens.tolist() == [102, 202, 2, 105, 205, 2, 102, 302, 2, 105, 305, 2]


def test_steps_of_an_epoch_with_a_small_last_one() -> None:
    plan = StepPlan(num_rows=10, global_batch_size=4, max_epochs=2, shuffle=False)
    assert (plan.steps_per_epoch, plan.num_steps) == (3, 6)
    first = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [plan.rows_of_step(step) for step in range(6)] == first + first


@pytest.mark.parametrize(("limit", "steps"), [(-1, 6), (4, 4), (6, 6), (9, 6)])
def test_max_steps(limit: int, steps: int) -> None:
    assert StepPlan(10, 4, 2, max_steps=limit).num_steps == steps


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 2**31 - 1))
def test_an_epoch_holds_every_row_once(rows: int, batch: int, seed: int) -> None:
    plan = StepPlan(rows, batch, 2, seed=seed)
    for epoch in range(2):
        start = epoch * plan.steps_per_epoch
        steps = [plan.rows_of_step(start + i) for i in range(plan.steps_per_epoch)]
        assert sorted(row for step in steps for row in step) == list(range(rows))


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


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_a_step_has_the_same_rows_under_any_layout(replicas: int, micro: int) -> None:
    plan = StepPlan(20, 6, 1, seed=3)
    for step in range(plan.num_steps):
        numbers = plan.rows_of_step(step)
        batches = [b for r in range(replicas) for b in cut(numbers, r, replicas, micro)]
        assert sorted(row for b in batches if b.counted for row in b.rows) == sorted(numbers)
