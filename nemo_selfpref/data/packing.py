"""Which rows of a global batch share a micro-batch, and which replica computes it.

The cut depends on the rows of the step alone, and the rows of a step on the seed, so a resumed run
packs every step as the first one did. Every replica gets the same number of micro-batches: under
expert and virtual-pipeline parallelism the ranks of different replicas move in step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemo_selfpref.data.batching import PackedBatch, TokenSequence, collate, sequences_of
from nemo_selfpref.types import TrainingRow


@dataclass(frozen=True)
class PackingRule:
    """How rows become micro-batches.

    micro_batch_size rows each, dealt round the replicas; or, with micro_batch_tokens, as many rows
    as that many tokens hold, of like load on every replica.
    """

    micro_batch_size: int
    micro_batch_tokens: int | None = None
    share_prompts: bool = False
    pad_multiple: int = 1
    """Every micro-batch is padded to a multiple of so many tokens."""
    count_multiple: int = 1
    """Every replica computes a multiple of so many micro-batches."""


def micro_batches(
    rows: Sequence[TrainingRow],
    row_numbers: Sequence[int],
    *,
    replica: int,
    num_replicas: int,
    rule: PackingRule,
    paired: bool,
    prompt_targets: bool = False,
) -> list[PackedBatch]:
    """This replica's micro-batches of the global batch `row_numbers`."""
    sequences = {n: sequences_of([rows[n]], paired) for n in row_numbers}
    cuts = _cut(sequences, row_numbers, num_replicas, rule)
    most = max(len(cut) for cut in cuts)
    count = -(-most // rule.count_multiple) * rule.count_multiple
    stand_in = min(row_numbers, key=lambda n: _num_tokens(sequences[n], rule.share_prompts))

    def pack(numbers: list[int], counted: bool) -> PackedBatch:
        batch = collate(
            sequences_of([rows[n] for n in numbers], paired),
            numbers,
            paired=paired,
            prompt_targets=prompt_targets,
            pad_multiple=rule.pad_multiple,
            share_prompts=rule.share_prompts,
        )
        return replace(batch, counted=counted)

    batches = [pack(numbers, True) for numbers in cuts[replica]]
    return batches + [pack([stand_in], False) for _ in range(count - len(batches))]


def _cut(
    sequences: dict[int, list[TokenSequence]],
    row_numbers: Sequence[int],
    num_replicas: int,
    rule: PackingRule,
) -> list[list[list[int]]]:
    """Row numbers by replica and micro-batch."""
    if rule.micro_batch_tokens is not None:
        items = _items(sequences, row_numbers, rule)
        bins = pack_by_length(items, rule.micro_batch_tokens, num_replicas)
        return [bins[replica::num_replicas] for replica in range(num_replicas)]
    size = rule.micro_batch_size
    dealt = [list(row_numbers[replica::num_replicas]) for replica in range(num_replicas)]
    return [[d[start : start + size] for start in range(0, len(d), size)] for d in dealt]


@dataclass(frozen=True)
class Item:
    """Rows that stay together, and the tokens they take."""

    rows: tuple[int, ...]
    tokens: int


def _items(
    sequences: dict[int, list[TokenSequence]], row_numbers: Sequence[int], rule: PackingRule
) -> list[Item]:
    """One item a row; where prompts are shared, one a prompt, cut where it gets too long."""
    budget = rule.micro_batch_tokens
    assert budget is not None
    items: list[Item] = []
    alone = [[number] for number in row_numbers]
    for numbers in _by_prompt(sequences, row_numbers) if rule.share_prompts else alone:
        held: list[int] = []
        for number in numbers:
            together = [s for n in (*held, number) for s in sequences[n]]
            if held and _num_tokens(together, rule.share_prompts) > budget:
                items.append(_item(held, sequences, rule.share_prompts))
                held = []
            held.append(number)
        items.append(_item(held, sequences, rule.share_prompts))
    return items


def _item(
    numbers: Sequence[int], sequences: dict[int, list[TokenSequence]], share_prompts: bool
) -> Item:
    return Item(
        tuple(numbers), _num_tokens([s for n in numbers for s in sequences[n]], share_prompts)
    )


def _by_prompt(
    sequences: dict[int, list[TokenSequence]], row_numbers: Sequence[int]
) -> list[list[int]]:
    groups: dict[object, list[int]] = {}
    for number in row_numbers:
        groups.setdefault(sequences[number][0][0], []).append(number)
    return list(groups.values())


def _num_tokens(sequences: Sequence[TokenSequence], share_prompts: bool) -> int:
    answers = sum(len(response) for _, response in sequences)
    prompts = [prompt for prompt, _ in sequences]
    return answers + sum(len(p) for p in (set(prompts) if share_prompts else prompts))


def pack_by_length(items: Sequence[Item], budget: int, multiple: int) -> list[list[int]]:
    """Pack items into bins of at most `budget` tokens; the number of bins is a multiple of
    `multiple` (or every item has a bin of its own), and neighbours in the list are of like load.

    The longest item goes first, each to the emptiest bin, so loads come out near each other. One
    longer than the budget (a sampled answer may be) gets a bin of its own.
    """
    ordered = sorted(items, key=lambda item: (-item.tokens, item.rows))
    num_bins = -(-sum(item.tokens for item in items) // budget)
    while True:
        num_bins = -(-num_bins // multiple) * multiple
        bins = _fill(ordered, budget, num_bins)
        if bins is not None:
            break
        num_bins += 1
    filled = sorted((b for b in bins if b.rows), key=lambda b: (-b.tokens, b.rows))
    return [list(b.rows) for b in filled]


def _fill(items: Sequence[Item], budget: int, num_bins: int) -> list[Item] | None:
    bins = [Item((), 0) for _ in range(num_bins)]
    for item in items:
        emptiest = min(range(num_bins), key=lambda n: (bins[n].tokens, n))
        held = bins[emptiest]
        if held.rows and held.tokens + item.tokens > budget:
            return None
        bins[emptiest] = Item(held.rows + item.rows, held.tokens + item.tokens)
    return bins
