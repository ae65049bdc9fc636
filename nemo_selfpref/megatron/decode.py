"""Token-by-token decoding on the training weights themselves, with a key-value cache.

Works under tensor parallelism (logits are gathered) and pipeline parallelism (hidden states pass
from stage to stage, sampled tokens come back from the last), on every device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.utils import set_model_to_sequence_parallel
from torch import Tensor

from nemo_selfpref.megatron.attention_layout import PackedAttention, packed_attention
from nemo_selfpref.megatron.cpu_shim import device_scope
from nemo_selfpref.megatron.gpt import PackedGPTModel, padded_vocab_size
from nemo_selfpref.megatron.kv_cache import KVCache
from nemo_selfpref.megatron.parallel import pipeline_group, tensor_group
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.objectives.logprobs import float32_matmul
from nemo_selfpref.types import TokenIds, WeightSet


class KVDecoder:
    """Decodes one batch at a time. Every rank of a model replica calls the same methods in the
    same order; logits come back on the last pipeline stage, None elsewhere."""

    def __init__(self, policy: Policy, weights: WeightSets | None = None) -> None:
        self.policy, self.weights = policy, weights or WeightSets(policy)
        self._cache: KVCache | None = None
        self._lengths = torch.empty(0, dtype=torch.int64)

    def using(self, weight_set: WeightSet) -> contextlib.AbstractContextManager[int]:
        """Decode with these weights inside the block; yields their version."""
        return self.weights.using(weight_set)

    def begin(self, prompts: Sequence[TokenIds], max_new_tokens: int) -> Tensor | None:
        """Read the prompts; logits float32 [B, vocabulary] of each one's next token."""
        self.policy.module.eval()
        device = self.policy.platform.device()
        lengths = [len(p) for p in prompts]
        self._cache = KVCache(len(prompts), max(lengths) + max_new_tokens)
        self._lengths = torch.tensor(lengths, device=device)
        rows = torch.repeat_interleave(torch.arange(len(prompts), device=device), self._lengths)
        tokens = torch.tensor([t for p in prompts for t in p], device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        layout = packed_attention(
            tuple(lengths), device, cache=self._cache, cache_rows=rows, cache_positions=positions
        )
        hidden = self._through_stages(tokens, positions, layout)
        return self._logits(hidden, self._lengths.cumsum(0) - 1)

    def advance(self, tokens: Tensor) -> Tensor | None:
        """Append one token int64 [B] to each sequence; logits of the next."""
        assert self._cache is not None
        device = tokens.device
        positions = self._lengths
        length = int(positions.max()) + 1
        mask = torch.arange(length, device=device)[None] <= positions[:, None]
        layout = PackedAttention(
            cache=self._cache,
            cache_rows=torch.arange(tokens.numel(), device=device),
            cache_positions=positions,
            decode_mask=mask[:, None, None],
            decode_length=length,
        )
        hidden = self._through_stages(tokens, positions, layout)
        self._lengths = positions + 1
        return self._logits(hidden, torch.arange(tokens.numel(), device=device))

    def keep(self, rows: Tensor) -> None:
        """Drop every sequence but `rows`, which are finished."""
        assert self._cache is not None
        self._cache.keep(rows)
        self._lengths = self._lengths[rows]

    def share(self, tokens: Tensor | None, count: int) -> Tensor:
        """Hand the tokens sampled on the last stage to every stage."""
        layout = self.policy.layout
        if tokens is None:
            tokens = torch.empty(count, dtype=torch.int64, device=self.policy.platform.device())
        if layout.pipeline_size > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(tokens, last, pipeline_group())
        return tokens

    def _through_stages(self, tokens: Tensor, positions: Tensor, layout: PackedAttention) -> Tensor:
        """States after the last part of the network on this rank. A virtual pipeline is gone
        through once for each of its parts, the last stage handing over to the first."""
        here = self.policy.layout
        hidden = None
        for number, part in enumerate(self.policy.parts):
            if number or not here.is_first_stage:
                hidden = self._receive(tokens.numel(), tokens.device)
                part.set_input_tensor(hidden)  # type: ignore[arg-type]
            # A step decodes too few tokens for FP8's blocks.
            with device_scope(), _whole_sequences(part), self.policy.without_fp8():
                hidden = part.run(tokens, positions, layout)
            if part is not self.policy.head or not here.is_last_stage:
                dist.send(
                    hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank()
                )
        assert hidden is not None
        return hidden

    def _receive(self, count: int, device: torch.device) -> Tensor:
        config = self.policy.module.config
        hidden = torch.empty(count, 1, config.hidden_size, dtype=config.params_dtype, device=device)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        return hidden

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor | None:
        if not self.policy.layout.is_last_stage:
            return None
        weight = self.policy.head.output_weight()
        local = float32_matmul(hidden[rows, 0], weight.t())
        if self.policy.layout.tensor_size == 1:
            return local
        return self._gather_vocabulary(local)

    def _gather_vocabulary(self, local: Tensor) -> Tensor:
        group = tensor_group()
        vocab = self.policy.arch.vocab_size
        width = padded_vocab_size(vocab, group.size()) // group.size()
        padded = local.new_full((local.shape[0], width), float("-inf"))
        padded[:, : local.shape[1]] = local
        parts = [torch.empty_like(padded) for _ in range(group.size())]
        dist.all_gather(parts, padded, group=group)
        return torch.cat(parts, dim=1)[:, :vocab]


@contextlib.contextmanager
def _whole_sequences(module: PackedGPTModel) -> Iterator[None]:
    """Switches sequence parallelism off: a decoding step has too few tokens to split."""
    if not module.config.sequence_parallel:
        yield
        return
    set_model_to_sequence_parallel(module, False)
    try:
        yield
    finally:
        set_model_to_sequence_parallel(module, True)
