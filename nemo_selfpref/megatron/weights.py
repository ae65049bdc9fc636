"""Other copies of the policy's weights, in the policy's own shards: frozen, averaged, lagged.

There is one network. A copy is a list of tensors beside it, never gathered; to decode or score with
one, its values are put into the network for a while and the policy's put back after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from nemo_selfpref.errors import RolloutError
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.types import WeightSet

# One kernel launch for a whole list of tensors; torch exports them under these names only.
_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
_lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]


class WeightSets:
    """The copies a run holds. Every rank calls every method in the same order.

    The EMA is float32, averaged from the optimizer's float32 main weights where there are some;
    the others have the policy's precision. Each remembers the weight_version it was taken at.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._copies: dict[WeightSet, list[Tensor]] = {}
        self._versions: dict[WeightSet, int] = {}

    def __contains__(self, name: WeightSet) -> bool:
        return name is WeightSet.POLICY or name in self._copies

    def held(self) -> list[WeightSet]:
        """The copies there are, the policy not among them."""
        return sorted(self._copies)

    def version(self, name: WeightSet) -> int:
        """Optimizer steps that went into these weights."""
        return self.policy.weight_version if name is WeightSet.POLICY else self._versions[name]

    def drop(self, name: WeightSet) -> None:
        self._copies.pop(name, None)
        self._versions.pop(name, None)

    @torch.no_grad()
    def take(self, name: WeightSet, source: WeightSet) -> None:
        """Make `name` equal to `source` as it is now."""
        tensors = self._parameters() if source is WeightSet.POLICY else self._copies[source]
        if name not in self._copies:
            self._copies[name] = self._empty(name)
        _copy(self._copies[name], tensors)
        self._versions[name] = self.version(source)

    @torch.no_grad()
    def average(self, alpha: float) -> None:
        """ema <- alpha ema + (1 - alpha) policy (SAPO, eq. 6)."""
        main = [getattr(p, "main_param", p) for p in self._parameters()]
        _lerp(self._copies[WeightSet.EMA], [p.detach().float() for p in main], 1 - alpha)
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
        if name not in self._copies:
            self._copies[name] = self._empty(name)
        loaded = load(self.sharded_state_dict(name))
        named = self.policy.module.named_parameters()
        with torch.no_grad():
            for (key, _), copy in zip(named, self._copies[name], strict=True):
                copy.copy_(loaded[key])
        self._versions[name] = version

    def sharded_state_dict(self, name: WeightSet) -> dict[str, Any]:
        """megatron-core's description of a copy: the policy's, with the copy's tensors in it."""
        pairs = zip(self._parameters(), self._copies[name], strict=True)
        copy_of = {p.data_ptr(): copy for p, copy in pairs if p.numel()}

        def exchange(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: exchange(item) for key, item in value.items()}
            if isinstance(value, ShardedTensorFactory | ShardedTensor):
                assert isinstance(value.data, Tensor)
                value.data = copy_of[value.data.data_ptr()].view(value.data.shape)
                if isinstance(value, ShardedTensor):
                    value.dtype = value.data.dtype
            return value

        return exchange(self.policy.sharded_state_dict())

    def _parameters(self) -> list[Tensor]:
        return list(self.policy.module.parameters())

    def _empty(self, name: WeightSet) -> list[Tensor]:
        dtype = torch.float32 if name is WeightSet.EMA else None
        return [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in self._parameters()]
