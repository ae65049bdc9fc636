"""Which rows make which step, and how their sequences are packed into one batch of tokens.

The order of rows depends on the seed and the global batch size alone, never on the parallel
layout, so a run can resume at any step under any data-parallel size and see the same batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_selfpref.data.spans import ContextSlices, Span
from nemo_selfpref.types import PreferencePair, TokenIds, TrainingRow


@dataclass(frozen=True)
class StepPlan:
    """Rows of every optimizer step of a stage; the last step of an epoch may be smaller."""

    num_rows: int
    global_batch_size: int
    max_epochs: int
    max_steps: int = -1
    seed: int = 0
    shuffle: bool = True

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.global_batch_size)

    @property
    def num_steps(self) -> int:
        steps = self.steps_per_epoch * self.max_epochs
        return steps if self.max_steps < 0 else min(steps, self.max_steps)

    def rows_of_step(self, step: int) -> list[int]:
        """Row numbers of one global batch."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        return order[index * self.global_batch_size : (index + 1) * self.global_batch_size]

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_rows))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.num_rows, generator=generator).tolist()


@dataclass(frozen=True)
class PackedBatch:
    """Sequences laid end to end, without padding between them; where prompts are shared, each
    prompt once and the answers to it after it.

    For B pairs the sequences are chosen 0..B-1, then rejected 0..B-1; for B demonstrations the B
    sequences. tokens, positions: int64 [T]; spans: who attends to whom, covering all T.
    predict_from: int64 [N] row of the hidden state that predicts targets [N]; target_sequence:
    int64 [N] sequence of each target; target_is_response: bool [N].
    """

    rows: tuple[int, ...]
    paired: bool
    tokens: Tensor
    positions: Tensor
    spans: tuple[Span, ...]
    predict_from: Tensor
    targets: Tensor
    target_sequence: Tensor
    target_is_response: Tensor
    padding: int = 0
    """How many of the tokens are padding, a span of its own at the end."""
    counted: bool = True
    """False for a stand-in that keeps a replica without rows in step with the others."""

    @property
    def num_sequences(self) -> int:
        return len(self.rows) * (2 if self.paired else 1)

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding left out."""
        return self.tokens.numel() - self.padding

    def to(self, device: torch.device) -> PackedBatch:
        tensors = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def padded(self, total: int) -> PackedBatch:
        """With padding up to `total` tokens."""
        extra = total - self.tokens.numel()
        if extra == 0:
            return self
        return replace(
            self,
            tokens=torch.cat([self.tokens, self.tokens.new_zeros(extra)]),
            positions=torch.cat([self.positions, torch.arange(extra)]),
            spans=(*self.spans, Span(self.tokens.numel(), extra)),
            padding=self.padding + extra,
        )

    def part(self, slices: ContextSlices) -> PackedBatch:
        """The tokens `slices` leaves on this rank, and the targets their states predict. The spans
        stay those of the whole batch."""
        if slices.size == 1:
            return self
        own, place = slices.own_tokens(), slices.place_here()
        rows = place[self.predict_from]
        here = rows >= 0
        return replace(
            self,
            tokens=self.tokens[own],
            positions=self.positions[own],
            predict_from=rows[here],
            targets=self.targets[here],
            target_sequence=self.target_sequence[here],
            target_is_response=self.target_is_response[here],
        )


TokenSequence = tuple[TokenIds, TokenIds]
"""(prompt, response) token ids."""


def sequences_of(rows: Sequence[TrainingRow], paired: bool) -> list[TokenSequence]:
    """(prompt, response) of every sequence in PackedBatch order."""
    if not paired:
        return [
            (r.prompt_ids, r.chosen_ids if isinstance(r, PreferencePair) else r.response_ids)
            for r in rows
        ]
    pairs = [r for r in rows if isinstance(r, PreferencePair)]
    assert len(pairs) == len(rows), "a paired batch was given demonstrations"
    chosen = [(p.prompt_ids, p.chosen_ids) for p in pairs]
    return chosen + [(p.prompt_ids, p.rejected_ids) for p in pairs]


class _Packer:
    """Lays token runs end to end."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.spans: list[Span] = []

    def add(self, ids: TokenIds, context: Span | None = None) -> Span:
        """Lay down one run, continuing `context` where there is one."""
        before = context.length if context else 0
        span = Span(len(self.tokens), len(ids), context.start if context else 0, before)
        self.tokens.extend(ids)
        self.positions.extend(range(before, before + len(ids)))
        self.spans.append(span)
        return span


def collate(
    sequences: Sequence[TokenSequence],
    row_numbers: Sequence[int],
    *,
    paired: bool,
    prompt_targets: bool = False,
    pad_multiple: int = 1,
    share_prompts: bool = False,
) -> PackedBatch:
    """Pack the sequences of some rows into one micro-batch.

    With prompt_targets the prompt tokens of the chosen sequences are targets too (ORPO's
    likelihood over the whole sequence). With share_prompts, sequences of one prompt have it
    computed once. Padding up to pad_multiple is a span of its own at the end that no target reads.
    """
    packer = _Packer()
    shared: dict[TokenIds, Span] = {}
    repeated = _repeated_prompts(sequences) if share_prompts else frozenset()
    predict_from: list[int] = []
    targets: list[int] = []
    target_sequence: list[int] = []
    is_response: list[bool] = []
    for index, (prompt, response) in enumerate(sequences):
        if prompt in repeated:
            if prompt not in shared:
                shared[prompt] = packer.add(prompt)
            start = shared[prompt].start
            answer = packer.add(response, shared[prompt]).start if response else 0
        else:
            start = packer.add(prompt + response).start
            answer = start + len(prompt)
        wants_prompt = prompt_targets and index < len(row_numbers)
        split, end = len(prompt), len(prompt) + len(response)
        first = 1 if wants_prompt else max(split, 1)
        # The state that predicts token t is that of token t - 1, in the prompt or in the answer.
        predict_from.extend(range(start + first - 1, start + min(split, end - 1)))
        predict_from.extend(range(answer + max(first - 1, split) - split, answer + end - 1 - split))
        targets.extend((prompt + response)[first:])
        target_sequence.extend([index] * (end - first))
        is_response.extend(position >= split for position in range(first, end))
    batch = PackedBatch(
        rows=tuple(row_numbers),
        paired=paired,
        tokens=torch.tensor(packer.tokens, dtype=torch.int64),
        positions=torch.tensor(packer.positions, dtype=torch.int64),
        spans=tuple(packer.spans),
        predict_from=torch.tensor(predict_from, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        target_sequence=torch.tensor(target_sequence, dtype=torch.int64),
        target_is_response=torch.tensor(is_response, dtype=torch.bool),
    )
    return batch.padded(-(-len(packer.tokens) // pad_multiple) * pad_multiple)


def _repeated_prompts(sequences: Sequence[TokenSequence]) -> frozenset[TokenIds]:
    counts = Counter(prompt for prompt, _ in sequences if prompt)
    return frozenset(prompt for prompt, count in counts.items() if count > 1)
