from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_selfpref.data.batching import PackedBatch, StepPlan
from nemo_selfpref.data.packing import Item, PackingRule, micro_batches, pack_by_length
from nemo_selfpref.types import PreferencePair, TrainingRow


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
        rule=PackingRule(micro),
        paired=True,
    )


def test_rows_go_round_the_replicas() -> None:
    numbers = [9, 4, 7, 1, 0]
    assert [b.rows for b in cut(numbers, 0, 2, 2)] == [(9, 7), (0,)]
    second = cut(numbers, 1, 2, 2)
    # The second replica has no third row: it computes one that does not count, to stay in step.
    assert [(b.rows, b.counted) for b in second] == [((4, 1), True), ((9,), False)]


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


def pairs_of(lengths: list[int], prompts: int = 100) -> list[TrainingRow]:
    """Pairs of 2 prompt tokens and answers of these lengths; `prompts` different prompts."""
    return [
        PreferencePair(str(i), (i % prompts, 1), (5,) * n, (6,) * n) for i, n in enumerate(lengths)
    ]


def pack(
    rows: list[TrainingRow], replica: int, replicas: int, budget: int, share: bool = False
) -> list[PackedBatch]:
    return micro_batches(
        rows,
        list(range(len(rows))),
        replica=replica,
        num_replicas=replicas,
        rule=PackingRule(1, micro_batch_tokens=budget, share_prompts=share),
        paired=True,
    )


def test_rows_are_packed_by_length() -> None:
    # A row of answers of n tokens takes 2 n + 4: 44, 24, 14, 14 tokens, 96 in all, two bins of 50.
    rows = pairs_of([20, 5, 10, 5])
    assert [b.rows for b in pack(rows, 0, 1, 60)] == [(2, 1, 3), (0,)]
    assert [b.num_tokens for b in pack(rows, 0, 1, 60)] == [52, 44]


def test_every_replica_gets_as_many_batches_of_like_load() -> None:
    rows = pairs_of([20, 19, 3, 3, 2, 2])  # 44 42 10 10 8 8
    both = [pack(rows, replica, 2, 100) for replica in range(2)]
    assert [[b.rows for b in batches] for batches in both] == [[(0, 3, 5)], [(1, 2, 4)]]
    assert [b[0].num_tokens for b in both] == [62, 60]


def test_rows_of_one_prompt_stay_together_where_prompts_are_shared() -> None:
    # Rows 0 and 2 have one prompt, 1 and 3 another: 2 + 4 * 4 = 18 tokens each.
    rows = pairs_of([4, 4, 4, 4], prompts=2)
    batches = pack(rows, 0, 1, 20, share=True)
    assert [b.rows for b in batches] == [(0, 2), (1, 3)]
    assert [b.num_tokens for b in batches] == [18, 18]
    # Too many answers for one batch: the prompt is computed in two.
    assert [b.rows for b in pack(pairs_of([4] * 3, prompts=1), 0, 1, 20, share=True)] == [
        (0, 1),
        (2,),
    ]


def test_a_row_longer_than_the_budget_is_alone() -> None:
    # 8, 44 and 8 tokens, a budget of 40.
    assert [b.rows for b in pack(pairs_of([2, 20, 2]), 0, 1, 40)] == [(1,), (0, 2)]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(50, 120),
    st.integers(1, 5),
)
def test_bins_hold_every_item_once_within_the_budget(
    sizes: list[int], budget: int, multiple: int
) -> None:
    items = [Item((n,), size) for n, size in enumerate(sizes)]
    bins = pack_by_length(items, budget, multiple)
    assert sorted(n for b in bins for n in b) == list(range(len(sizes)))
    loads = [sum(sizes[n] for n in b) for b in bins]
    assert all(load <= budget for load in loads) and loads == sorted(loads, reverse=True)
    assert len(bins) % multiple == 0 or len(bins) == len(sizes)
    assert pack_by_length(list(reversed(items)), budget, multiple) == bins


def test_the_count_of_batches_is_filled_up() -> None:
    rows = pairs_of([1, 2, 3])
    rule = PackingRule(1, count_multiple=2)
    batches = micro_batches(rows, [0, 1, 2], replica=0, num_replicas=1, rule=rule, paired=True)
    assert [(b.rows, b.counted) for b in batches] == [
        ((0,), True),
        ((1,), True),
        ((2,), True),
        ((0,), False),
    ]


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_a_step_has_the_same_rows_under_any_layout(replicas: int, micro: int) -> None:
    plan = StepPlan(20, 6, 1, seed=3)
    for step in range(plan.num_steps):
        numbers = plan.rows_of_step(step)
        batches = [b for r in range(replicas) for b in cut(numbers, r, replicas, micro)]
        assert sorted(row for b in batches if b.counted for row in b.rows) == sorted(numbers)
