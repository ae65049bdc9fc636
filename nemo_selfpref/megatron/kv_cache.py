"""Keys and values of sequences that are being decoded."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of a batch being decoded: per layer [B, max_length, kv_heads, dim]."""

    batch_size: int
    max_length: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def write(
        self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store [N, kv_heads, dim] at (row, position); returns the layer's whole cache."""
        if layer not in self.keys:
            shape = (self.batch_size, self.max_length, *key.shape[1:])
            self.keys[layer] = key.new_zeros(shape)
            self.values[layer] = value.new_zeros(shape)
        self.keys[layer][rows, positions] = key
        self.values[layer][rows, positions] = value
        return self.keys[layer], self.values[layer]

    def keep(self, rows: Tensor) -> None:
        """Forget every sequence but `rows`."""
        self.batch_size = int(rows.numel())
        for store in (self.keys, self.values):
            for layer in store:
                store[layer] = store[layer][rows].contiguous()
