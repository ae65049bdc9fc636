"""What a training step keeps between forward and backward, from the model's shape.

The counts are those of megatron-core's own layers with packed attention (megatron/gpt.py), and they
are compared with real tensors in tests/distributed/test_plan_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_selfpref.config.model_schema import ArchitectureConfig, ModelConfig, Recompute
from nemo_selfpref.config.schema import Precision, RunConfig
from nemo_selfpref.training.plan_weights import Sizes


def width(precision: Precision) -> int:
    """Bytes of a weight."""
    return 2 if precision is Precision.bf16 else 4


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes at a time: packed tokens (of the context ranks together), and those
    whose log-probs are asked."""

    tokens: int
    targets: int


def longest_micro_batch(cfg: RunConfig, paired: bool) -> MicroBatch:
    """The largest there can be: every sequence of data.max_length, nearly all of it answer."""
    m, longest = cfg.model, cfg.data.max_length
    count = m.micro_batch_size * (2 if paired else 1)
    tokens = m.micro_batch_tokens or count * longest
    return MicroBatch(tokens, tokens - max(tokens // longest, 1))


def layer_activations(
    arch: ArchitectureConfig, model: ModelConfig, bytes_: int, tokens: int, gpu: bool
) -> int:
    """Bytes one layer keeps for its backward pass, nothing recomputed but what
    `recompute_granularity=selective` does. On a CPU a norm keeps two float32 tensors of its input's
    size (one where its weight is frozen), on a GPU the input alone."""
    t, context = model.tensor_model_parallel_size, model.context_parallel_size
    tokens = -(-tokens // context)
    split = -(-tokens // t) if model.sequence_parallel else tokens
    hidden, heads = arch.hidden_size, arch.num_attention_heads // t
    query, keys = heads * arch.kv_channels, arch.num_query_groups // t * arch.kv_channels
    norm = split * (hidden * (_norm(model, bytes_, gpu) + bytes_) + 4)
    rotary = 4 * tokens * arch.kv_channels * bytes_
    if model.recompute_granularity is Recompute.selective:
        inside = tokens * bytes_ * (2 * query + 3 * keys)
    else:
        inside = tokens * (bytes_ * 2 * (query + context * keys) + 4 * heads)
    if arch.qk_layernorm:
        inside += tokens * (query + keys) * (_norm(model, bytes_, gpu) + bytes_)
    projected = tokens * query * bytes_
    return 2 * norm + rotary + inside + projected + _feed_forward(arch, model, bytes_, tokens)


def _norm(model: ModelConfig, bytes_: int, gpu: bool) -> int:
    """Bytes that a norm keeps of each number, its output left out."""
    if gpu:
        return bytes_
    return 4 if model.lora.rank else 8


def _feed_forward(arch: ArchitectureConfig, model: ModelConfig, bytes_: int, tokens: int) -> int:
    if not arch.num_moe_experts:
        width = arch.ffn_hidden_size // model.tensor_model_parallel_size
        return 5 * width * tokens * bytes_
    # Each token's state goes to its experts and comes back; loads are taken to be even.
    split = -(-tokens // model.tensor_model_parallel_size)
    routed = split * arch.moe_router_topk
    states = routed * (5 * arch.ffn_hidden_size + 3 * arch.hidden_size) * bytes_
    return states + split * arch.num_moe_experts * 12


@dataclass(frozen=True)
class Kept:
    """Bytes of a training step at its two fullest moments: as the log-probs are computed, and as a
    layer's gradients are."""

    saved: int
    """Between forward and backward, over the micro-batches under way at one time."""
    end: int
    """Of the last norm and the states whose log-probs are asked."""
    again: int
    """Of the layers computed again (recompute_granularity=full)."""
    flowing: int
    """Gradients of one layer's states."""

    @property
    def most(self) -> int:
        return self.saved + max(self.end, self.again)


def activations(
    cfg: RunConfig, arch: ArchitectureConfig, sizes: Sizes, stage: int, batch: MicroBatch, gpu: bool
) -> Kept:
    """What a rank of a pipeline stage keeps for the backward pass."""
    m, bytes_ = cfg.model, width(cfg.trainer.precision)
    tokens = -(-batch.tokens // sizes.context)
    split = -(-tokens // sizes.tensor) if m.sequence_parallel else tokens
    state = split * arch.hidden_size * bytes_
    per_part = arch.num_layers // (sizes.pipeline * sizes.virtual)
    layer = layer_activations(arch, m, bytes_, batch.tokens, gpu)
    kept, again, end = per_part * layer, 0, 0
    if m.recompute_granularity is Recompute.full:
        together = min(m.recompute_num_layers, per_part)
        kept = -(-per_part // together) * state + 4 * tokens * arch.kv_channels
        again = together * layer
    kept += 40 * tokens + (state if stage else 0)  # token numbers, places; the state received
    if stage == sizes.pipeline - 1:
        targets = -(-batch.targets // sizes.context)
        end = split * (arch.hidden_size * _norm(m, bytes_, gpu) + 4)
        end += targets * (arch.hidden_size * bytes_ + 28)
    flowing = tokens * 2 * _wide(arch, m) * bytes_
    return Kept(parts_under_way(cfg, sizes, stage) * kept, end, again, flowing)


def _wide(arch: ArchitectureConfig, model: ModelConfig) -> int:
    """Feed-forward channels that a token takes on one rank; loads of experts are even."""
    return (
        arch.ffn_hidden_size
        // model.tensor_model_parallel_size
        * (arch.moe_router_topk if arch.num_moe_experts else 1)
    )


def parts_under_way(cfg: RunConfig, sizes: Sizes, stage: int) -> int:
    """Parts of the network whose activations a rank holds at one time (1F1B; interleaved)."""
    m = cfg.model
    count = 2**30
    if m.micro_batch_tokens is None:
        count = max(m.global_batch_size // (m.micro_batch_size * sizes.replicas), 1)
    behind = sizes.pipeline - stage - 1
    if sizes.virtual == 1:
        return min(behind + 1, count)
    return min(2 * behind + (sizes.virtual - 1) * sizes.pipeline + 1, count * sizes.virtual)


def head_workspace(
    cfg: RunConfig, arch: ArchitectureConfig, sizes: Sizes, batch: MicroBatch, gpu: bool
) -> int:
    """Bytes of a chunk's logits and of the gradient of the states."""
    targets, rows = -(-batch.targets // sizes.context), -(-arch.vocab_size // sizes.tensor)
    narrow = cfg.trainer.precision is Precision.bf16
    chunk = min(cfg.model.logprob_chunk_size, targets)
    total = chunk * rows * (4 + (2 if narrow else 0)) + targets * arch.hidden_size * 4
    if narrow and not gpu:  # a CPU multiplies in float32
        total += 4 * arch.hidden_size * (rows + targets)
    return total
