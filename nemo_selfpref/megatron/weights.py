"""Other copies of the policy's weights, in the policy's own shards: frozen, averaged, lagged.

There is one network. A copy is a list of tensors beside it, never gathered; to decode or score with
one, its values are put into the network for a while and the policy's put back after.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from nemo_selfpref.errors import RolloutError
from nemo_selfpref.megatron.main_parts import MainParts
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.types import WeightSet

# One kernel launch for a whole list of tensors; torch exports them under these names only.
_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
_lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]


class WeightSets:
    """The copies a run holds. Every rank calls every method in the same order.

    The EMA is float32, averaged from the optimizer's float32 main weights where there are some,
    and split over the replicas where these are; the others have the policy's precision. Each
    remembers the weight_version it was taken at. With model.copies_on_cpu they lie in the CPU's
    memory (pinned, where there is a GPU).
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._main = MainParts(policy)
        self._copies: dict[WeightSet, list[Tensor]] = {}
        self._versions: dict[WeightSet, int] = {}
        self._revisions: Counter[WeightSet] = Counter()

    def __contains__(self, name: WeightSet) -> bool:
        return name is WeightSet.POLICY or name in self._copies

    def held(self) -> list[WeightSet]:
        """The copies there are, the policy not among them."""
        return sorted(self._copies)

    def version(self, name: WeightSet) -> int:
        """Optimizer steps that went into these weights."""
        return self.policy.weight_version if name is WeightSet.POLICY else self._versions[name]

    def revision(self, name: WeightSet) -> int:
        """How often a copy has been made, moved or dropped: two averages of one version differ in
        it. The policy's is always 0."""
        return self._revisions[name]

    def drop(self, name: WeightSet) -> None:
        self._revisions[name] += 1
        self._copies.pop(name, None)
        self._versions.pop(name, None)

    @torch.no_grad()
    def take(self, name: WeightSet, source: WeightSet) -> None:
        """Make `name` equal to `source` as it is now."""
        self._revisions[name] += 1
        if name not in self._copies:
            self._copies[name] = self._empty(name)
        with self.using(source) as version:
            tensors = self._parameters()
            if name is WeightSet.EMA:
                tensors = self._main.of(tensors)
            _copy(self._copies[name], tensors)
        self._versions[name] = version

    @torch.no_grad()
    def average(self, alpha: float) -> None:
        """ema <- alpha ema + (1 - alpha) policy (SAPO, eq. 6)."""
        self._revisions[WeightSet.EMA] += 1
        ema = self._copies[WeightSet.EMA]
        main = self._main.current(self._parameters())
        if self.policy.config.copies_on_cpu:
            main = [part.to(ema[0].device) for part in main]
        _lerp(ema, main, 1 - alpha)
        self._versions[WeightSet.EMA] = self.policy.weight_version

    @contextlib.contextmanager
    def using(self, name: WeightSet) -> Iterator[int]:
        """The network holds these weights inside the block; yields their version.

        Raises:
            RolloutError: the run holds no such copy.
        """
        if name is WeightSet.POLICY:
            yield self.policy.weight_version
            return
        if name not in self._copies:
            raise RolloutError(
                f"no {name.value} weights are held here; there are "
                f"{', '.join(n.value for n in (WeightSet.POLICY, *self.held()))}"
            )
        parameters = self._parameters()
        with torch.no_grad():
            kept = [p.detach().clone() for p in parameters]
            if name is WeightSet.EMA:
                _copy(self._main.of(parameters), self._copies[name])
                self._main.share()
            else:
                _copy(parameters, self._copies[name])
        try:
            yield self._versions[name]
        finally:
            with torch.no_grad():
                _copy(parameters, kept)

    def fill(
        self, name: WeightSet, load: Callable[[dict[str, Any]], dict[str, Any]], version: int
    ) -> None:
        """Take a copy from storage: `load` turns a sharded state dict into plain tensors."""
        self._revisions[name] += 1
        if name not in self._copies:
            self._copies[name] = self._empty(name)
        loaded = load(self.sharded_state_dict(name))
        named = [n for n in self.policy.module.named_parameters() if n[1].requires_grad]
        whole = [loaded[key] for key, _ in named]
        with torch.no_grad():
            _copy(self._copies[name], self._main.of(whole) if name is WeightSet.EMA else whole)
        self._versions[name] = version

    def sharded_state_dict(self, name: WeightSet) -> dict[str, Any]:
        """megatron-core's description of a copy: the policy's, with the copy's tensors in it."""
        parameters, copies = self._parameters(), self._copies[name]
        if name is WeightSet.EMA:
            copies = self._main.whole(parameters, copies)
        pairs = zip(parameters, copies, strict=True)
        copy_of = {p.data_ptr(): copy for p, copy in pairs if p.numel()}

        def exchange(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: exchange(item) for key, item in value.items() if _is_held(item)}
            if isinstance(value, ShardedTensorFactory | ShardedTensor):
                assert isinstance(value.data, Tensor)
                value.data = copy_of[value.data.data_ptr()].view(value.data.shape)
                if isinstance(value, ShardedTensor):
                    value.dtype = value.data.dtype
            return value

        return exchange(self.policy.sharded_state_dict())

    def _parameters(self) -> list[Tensor]:
        """What training changes: with adapters, those alone."""
        return [p for p in self.policy.module.parameters() if p.requires_grad]

    def _empty(self, name: WeightSet) -> list[Tensor]:
        tensors, dtype = self._parameters(), None
        if name is WeightSet.EMA:
            tensors, dtype = self._main.of(tensors), torch.float32
        if not self.policy.config.copies_on_cpu:
            return [torch.empty_like(t, dtype=dtype, requires_grad=False) for t in tensors]
        pin = self.policy.platform.cuda
        return [
            torch.empty(t.shape, dtype=dtype or t.dtype, pin_memory=pin, device="cpu")
            for t in tensors
        ]


def _is_held(value: Any) -> bool:
    """Whether this entry of a sharded state dict is in a copy: frozen weights are not."""
    sharded = isinstance(value, ShardedTensorFactory | ShardedTensor)
    return not sharded or (isinstance(value.data, Tensor) and value.data.requires_grad)
