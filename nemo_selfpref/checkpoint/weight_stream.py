"""A policy's weights as Hugging Face tensors on rank 0, straight from the shards of all ranks.

megatron-core says which part of which global tensor a rank holds. One global tensor after another
is put together on rank 0 and handed on, so no process holds a whole model for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from nemo_selfpref.checkpoint.hf_weights import megatron_shapes, read_part, to_huggingface
from nemo_selfpref.checkpoint.lora import MergedSource, adapter_shapes
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.megatron.parallel import all_gather_json, world_group
from nemo_selfpref.megatron.policy import Policy

Shape = tuple[int, ...]
Part = tuple[Shape, Tensor]
"""Where it begins in the global tensor, and its values."""


def stream_weights(
    policy: Policy, dtype: torch.dtype, copy: dict[str, Any] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every weight as Hugging Face has them, in `dtype`. Rank 0 gets them; on
    the other ranks the iterator yields nothing and ends when rank 0 has all.

    Collective: every rank iterates, with the same weights. Vocabulary padding is cut off, a tied
    head left out and adapters are merged, as in an export. A tensor may be a view of the weights:
    save or copy it before training goes on. Rank 0 reads to the end whatever happens (see
    read_to_end): the other ranks wait until all was fetched.

    Args:
        copy: the sharded state dict of another copy of the weights
            (WeightSets.sharded_state_dict). Its values pass through the policy's own precision, as
            they do when the network holds them. What it lacks is the policy's: with adapters a
            copy is those alone.

    Raises:
        CheckpointError: the ranks do not hold the whole of a weight.
    """
    if policy not in _weights:
        _weights[policy] = _Weights(policy)
    weights, device = _weights[policy], policy.platform.device()
    mine = weights.parts_of(policy.sharded_state_dict())
    weights.agree(mine, device)
    if copy is not None:
        mine.update(weights.parts_of(copy))
    gathered = weights.gather(mine, device)
    try:
        for key, tensors in gathered:
            yield from ((name, t.to(dtype)) for name, t in weights.convert(key, tensors))
    finally:
        deque(gathered, maxlen=0)  # Its holders wait to send what an error left.


@contextmanager
def read_to_end(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[None]:
    """Whatever the block leaves of a stream is read and dropped when it ends, with an error or
    without."""
    try:
        yield
    finally:
        deque(tensors, maxlen=0)


@dataclass(frozen=True)
class _Plan:
    """How a global tensor is put together: its shape and type, and (rank, offset, shape) of its
    parts, those of one rank in the order in which it sends them."""

    shape: Shape
    dtype: torch.dtype
    parts: list[tuple[int, Shape, Shape]]


class _Weights:
    """Names and shapes of a policy's weights, and who holds what of them: that does not change
    while the policy lives."""

    def __init__(self, policy: Policy) -> None:
        self.arch, self.lora = policy.arch, policy.config.lora
        self.shapes: dict[str, Shape] = {**megatron_shapes(self.arch)}
        adapters = adapter_shapes(self.arch, self.lora) if self.lora.rank else {}
        self.made_of = {key: [key] for key in self.shapes}
        """Every weight, with the names of all there is of it: itself, and its adapters."""
        for name in adapters:
            self.made_of[f"{name.rpartition('.')[0]}.weight"].append(name)
        self.shapes.update(adapters)
        self.plans: dict[str, _Plan] = {}

    def parts_of(self, state: dict[str, Any]) -> dict[str, list[Part]]:
        """What this rank sends out of a sharded state dict. Of equal holders the first sends."""
        found: dict[str, list[Part]] = {}
        for tensor in _sharded_tensors(state, self._is_whole):
            replica = tensor.replica_id
            first = not any(replica) if isinstance(replica, tuple) else replica == 0
            if not first or tensor.key not in self.shapes:
                continue
            part: Part = ((0,) * tensor.data.dim(), tensor.data.detach())
            if isinstance(tensor, ShardedTensor):
                shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
                part = (tuple(tensor.global_offset), part[1].reshape(shape))
            found.setdefault(tensor.key, []).append(part)
        return found

    def _is_whole(self, factory: ShardedTensorFactory) -> bool:
        return tuple(factory.data.shape) == self.shapes.get(factory.key)

    def agree(self, mine: Mapping[str, list[Part]], device: torch.device) -> None:
        """Learn what each rank holds, the first time. Collective."""
        if self.plans:
            return
        own = [
            [key, str(part.dtype).removeprefix("torch."), offset, list(part.shape)]
            for key, parts in mine.items()
            for offset, part in parts
        ]
        parts: dict[str, list[tuple[int, Shape, Shape]]] = {key: [] for key in self.shapes}
        dtypes: dict[str, torch.dtype] = {}
        for rank, share in enumerate(all_gather_json(own, world_group(), device)):
            for key, dtype, offset, shape in share:
                parts[key].append((rank, tuple(offset), tuple(shape)))
                dtypes[key] = getattr(torch, dtype)
        self.plans = {key: self._plan(key, parts[key], dtypes.get(key)) for key in parts}

    def _plan(
        self, key: str, parts: list[tuple[int, Shape, Shape]], dtype: torch.dtype | None
    ) -> _Plan:
        ends = [[o + s for o, s in zip(offset, shape, strict=True)] for _, offset, shape in parts]
        whole = tuple(max(axis) for axis in zip(*ends, strict=True))
        held, wanted = sum(prod(shape) for _, _, shape in parts), self.shapes[key]
        too_small = any(w < s for w, s in zip(whole, wanted, strict=False))
        if dtype is None or len(whole) != len(wanted) or too_small or held != prod(whole):
            raise CheckpointError(
                f"the ranks hold {held} values of {key} up to {list(whole)}; expected all of "
                f"{list(wanted)}, each once. This is an error in the program."
            )
        return _Plan(whole, dtype, parts)

    def gather(
        self, mine: Mapping[str, list[Part]], device: torch.device
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Every weight's name, with all there is of it by name on rank 0 and nothing elsewhere."""
        for key, names in self.made_of.items():
            found = {name: _gather(self.plans[name], mine.get(name, []), device) for name in names}
            yield key, {name: tensor for name, tensor in found.items() if tensor is not None}

    @torch.no_grad()
    def convert(self, key: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors of one weight."""
        if not tensors:
            return
        source, shape = _Tensors(tensors), self.shapes[key]
        whole = MergedSource(source, self.lora) if len(tensors) > 1 else source
        yield from to_huggingface(key, whole.read(key, (0,) * len(shape), shape), self.arch)


_weights: WeakKeyDictionary[Policy, _Weights] = WeakKeyDictionary()


class _Tensors:
    """A source over tensors in memory, which may be padded at their end."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, key: str, offset: Shape, shape: Shape) -> Tensor:
        return read_part(self.tensors[key], offset, shape)


def _sharded_tensors(state: Any, is_whole: Callable[[ShardedTensorFactory], bool]) -> Iterator[Any]:
    """The tensors of a sharded state dict; a factory as it is where it has nothing to cut."""
    if isinstance(state, ShardedTensorFactory):
        if is_whole(state):
            yield state
        else:
            yield from _sharded_tensors(state.build(), is_whole)
    elif isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _sharded_tensors(value, is_whole)


def _gather(plan: _Plan, mine: list[Part], device: torch.device) -> Tensor | None:
    """One global tensor, on rank 0. Collective over those that hold a part of it and rank 0."""
    own = [part.to(device=device, dtype=plan.dtype) for _, part in mine]
    if dist.get_rank() != 0:
        _exchange([dist.P2POp(dist.isend, p.contiguous(), 0, tag=n) for n, p in enumerate(own)])
        return None
    if len(own) == len(plan.parts) == 1:
        return own[0]
    whole = torch.empty(plan.shape, dtype=plan.dtype, device=device)
    receives: list[dist.P2POp] = []
    pieces: list[tuple[Tensor, Tensor]] = []
    sent: dict[int, int] = {}
    for rank, offset, shape in plan.parts:
        place = whole[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]
        number = sent[rank] = sent.get(rank, -1) + 1
        piece = own[number] if rank == 0 else place
        if rank != 0:
            piece = piece if piece.is_contiguous() else torch.empty_like(piece).contiguous()
            receives.append(dist.P2POp(dist.irecv, piece, rank, tag=number))
        if piece is not place:
            pieces.append((place, piece))
    _exchange(receives)
    for place, piece in pieces:
        place.copy_(piece)
    return whole


def _exchange(operations: list[dist.P2POp]) -> None:
    # Together, as NCCL then uses the group it has and does not make one for each pair of ranks.
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
