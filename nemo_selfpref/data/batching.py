"""Which rows make which step, and how rows become packed micro-batches.

The order of rows depends on the seed and the global batch size alone, never on the parallel
layout, so a run can resume at any step under any data-parallel size and see the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
    """Sequences laid end to end, without padding between them.

    For B pairs the sequences are chosen 0..B-1, then rejected 0..B-1; for B demonstrations the B
    sequences. tokens, positions: int64 [T]; lengths: of the sequences, sum T.
    predict_from: int64 [N] row of the hidden state that predicts targets [N]; target_sequence:
    int64 [N] sequence of each target; target_is_response: bool [N].
    """

    rows: tuple[int, ...]
    paired: bool
    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    predict_from: Tensor
    targets: Tensor
    target_sequence: Tensor
    target_is_response: Tensor
    counted: bool = True
    """False for a stand-in that keeps a replica without rows in step with the others."""

    @property
    def num_sequences(self) -> int:
        return len(self.rows) * (2 if self.paired else 1)

    def to(self, device: torch.device) -> PackedBatch:
        tensors = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


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


def collate(
    sequences: Sequence[TokenSequence],
    row_numbers: Sequence[int],
    *,
    paired: bool,
    prompt_targets: bool = False,
    pad_multiple: int = 1,
) -> PackedBatch:
    """Pack the sequences of some rows into one micro-batch.

    With prompt_targets the prompt tokens of the chosen sequences are targets too (ORPO's
    likelihood over the whole sequence). Padding up to pad_multiple is a sequence of its own at the
    end that no target reads.
    """
    tokens: list[int] = []
    positions: list[int] = []
    predict_from: list[int] = []
    target_sequence: list[int] = []
    is_response: list[bool] = []
    lengths: list[int] = []
    for index, (prompt, response) in enumerate(sequences):
        length = len(prompt) + len(response)
        wants_prompt = prompt_targets and index < len(row_numbers)
        first = 1 if wants_prompt else max(len(prompt), 1)
        offset = len(tokens)
        predict_from.extend(range(offset + first - 1, offset + length - 1))
        target_sequence.extend([index] * (length - first))
        is_response.extend(position >= len(prompt) for position in range(first, length))
        tokens.extend(prompt)
        tokens.extend(response)
        positions.extend(range(length))
        lengths.append(length)
    padding = -len(tokens) % pad_multiple
    token_tensor = torch.tensor(tokens + [0] * padding, dtype=torch.int64)
    source = torch.tensor(predict_from, dtype=torch.int64)
    return PackedBatch(
        rows=tuple(row_numbers),
        paired=paired,
        tokens=token_tensor,
        positions=torch.tensor(positions + list(range(padding)), dtype=torch.int64),
        lengths=(*lengths, padding) if padding else tuple(lengths),
        predict_from=source,
        targets=token_tensor[source + 1],
        target_sequence=torch.tensor(target_sequence, dtype=torch.int64),
        target_is_response=torch.tensor(is_response, dtype=torch.bool),
    )


def micro_batches(
    rows: Sequence[TrainingRow],
    row_numbers: Sequence[int],
    *,
    replica: int,
    num_replicas: int,
    micro_batch_size: int,
    paired: bool,
    prompt_targets: bool = False,
    pad_multiple: int = 1,
) -> list[PackedBatch]:
    """This replica's micro-batches of the global batch `row_numbers`."""
    mine = list(row_numbers[replica::num_replicas])
    counted = bool(mine)
    if not counted:
        mine = [row_numbers[0]]
    batches = []
    for start in range(0, len(mine), micro_batch_size):
        numbers = mine[start : start + micro_batch_size]
        batch = collate(
            sequences_of([rows[n] for n in numbers], paired),
            numbers,
            paired=paired,
            prompt_targets=prompt_targets,
            pad_multiple=pad_multiple,
        )
        batches.append(replace(batch, counted=counted))
    return batches
