"""Every weight that a rank holds, counted from the model's shape and the layout.

The order is the network's own, since Megatron's buffers, and with them the distributed optimizer's
pieces, follow it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemo_selfpref.config.model_schema import ArchitectureConfig, ModelConfig
from nemo_selfpref.megatron.gpt import padded_vocab_size
from nemo_selfpref.megatron.parallel import expert_tensor_size

_START, _END = 64, 128
"""Elements to which the distributed optimizer aligns weights and buffers."""


@dataclass(frozen=True)
class Weight:
    """One tensor of a rank. `expert`: replicated over fewer ranks than the rest; `own_bucket`:
    apart from the others in the distributed optimizer's buffer (tied embeddings)."""

    numel: int
    trained: bool = True
    expert: bool = False
    own_bucket: bool = False


@dataclass(frozen=True)
class Sizes:
    """How many ranks share what; `replicas` compute micro-batches of their own."""

    world: int
    tensor: int
    pipeline: int
    context: int
    virtual: int
    replicas: int
    optimizer: int
    """Ranks that hold the same dense weights, over which an optimizer can be split."""
    expert_optimizer: int
    """The same of the experts' weights."""


def sizes_of(model: ModelConfig, world: int) -> Sizes:
    """Megatron's groups of a checked configuration over `world` processes."""
    t, p, c = (
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.context_parallel_size,
    )
    stage = world // p
    experts = model.expert_model_parallel_size * expert_tensor_size(model)
    return Sizes(
        world=world,
        tensor=t,
        pipeline=p,
        context=c,
        virtual=model.virtual_pipeline_model_parallel_size or 1,
        replicas=stage // (t * c),
        optimizer=stage // t,
        expert_optimizer=stage // experts,
    )


def stage_weights(
    arch: ArchitectureConfig, model: ModelConfig, stage: int
) -> tuple[list[Weight], ...]:
    """The weights on a rank of pipeline stage `stage`, one list for each of its parts."""
    pipeline = model.pipeline_model_parallel_size
    virtual = model.virtual_pipeline_model_parallel_size or 1
    layers = arch.num_layers // (pipeline * virtual)
    tied = arch.share_embeddings_and_output_weights
    rows = padded_vocab_size(arch.vocab_size, model.tensor_model_parallel_size)
    trained = not model.lora.rank
    vocabulary = Weight(
        rows // model.tensor_model_parallel_size * arch.hidden_size,
        trained,
        own_bucket=tied and pipeline > 1,
    )
    parts = []
    for number in range(virtual):
        first = stage == 0 and number == 0
        last = stage == pipeline - 1 and number == virtual - 1
        part = [vocabulary] if first else []
        part += [weight for _ in range(layers) for weight in layer_weights(arch, model)]
        part += [Weight(arch.hidden_size, trained)] if last else []
        part += [vocabulary] if last and not (tied and pipeline == 1) else []
        parts.append(part)
    return tuple(parts)


def layer_weights(arch: ArchitectureConfig, model: ModelConfig) -> list[Weight]:
    """The weights of one layer on one rank."""
    t, hidden = model.tensor_model_parallel_size, arch.hidden_size
    query = arch.num_attention_heads * arch.kv_channels
    keys = arch.num_query_groups * arch.kv_channels
    norm = Weight(hidden, not model.lora.rank)
    attention = [
        *_linear(model, "linear_proj", query, hidden, t, split_input=True),
        *_linear(model, "linear_qkv", hidden, query + 2 * keys, t, split_input=False),
    ]
    if arch.add_qkv_bias:
        # Behind the weight, before its adapters.
        place = -2 if _adapted(model, "linear_qkv") else len(attention)
        attention.insert(place, Weight((query + 2 * keys) // t, not model.lora.rank))
    if arch.qk_layernorm:
        attention += [Weight(arch.kv_channels, not model.lora.rank)] * 2
    return [norm, *attention, norm, *_feed_forward(arch, model)]


def _feed_forward(arch: ArchitectureConfig, model: ModelConfig) -> Iterator[Weight]:
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    if not arch.num_moe_experts:
        t = model.tensor_model_parallel_size
        yield from _linear(model, "linear_fc1", hidden, 2 * ffn, t, split_input=False)
        yield from _linear(model, "linear_fc2", ffn, hidden, t, split_input=True)
        return
    yield Weight(arch.num_moe_experts * hidden)  # the router
    t = expert_tensor_size(model)
    for _ in range(arch.num_moe_experts // model.expert_model_parallel_size):
        yield Weight(2 * ffn // t * hidden, expert=True)
        yield Weight(ffn // t * hidden, expert=True)


def _linear(
    model: ModelConfig, name: str, columns: int, rows: int, tensor: int, *, split_input: bool
) -> Iterator[Weight]:
    rank = model.lora.rank
    yield Weight(columns * rows // tensor, trained=not rank)
    if _adapted(model, name):
        yield Weight(rank * (columns // tensor if split_input else columns))
        yield Weight(rank * (rows if split_input else rows // tensor))


def _adapted(model: ModelConfig, name: str) -> bool:
    return model.lora.rank > 0 and name in model.lora.target_modules


@dataclass(frozen=True)
class Held:
    """Elements on a rank of one pipeline stage: the one of its replicas that has most."""

    weights: int
    """As they lie in memory, the distributed optimizer's padding among them."""
    gradients: int
    """Of the float32 buffers."""
    trained: int
    main: int
    """Trained ones whose optimizer state is here."""
    largest: int
    """Of the largest trained weight."""


def held_by(arch: ArchitectureConfig, model: ModelConfig, sizes: Sizes, stage: int) -> Held:
    """What a rank of a pipeline stage holds."""
    return held_by_parts(stage_weights(arch, model, stage), model, sizes)


def held_by_parts(parts: Sequence[Sequence[Weight]], model: ModelConfig, sizes: Sizes) -> Held:
    weights = [weight for part in parts for weight in part]
    trained = [weight for weight in weights if weight.trained]
    still = sum(w.numel for w in weights) - sum(w.numel for w in trained)
    total = sum(w.numel for w in trained)
    largest = max(w.numel for w in trained)
    if not model.use_distributed_optimizer:
        return Held(still + total, total, total, total, largest)
    buffers, most = 0, 0
    for part in parts:
        for expert, ranks in ((False, sizes.optimizer), (True, sizes.expert_optimizer)):
            own = [w for w in part if w.trained and w.expert is expert]
            if own:
                numel, share = _split(own, ranks)
                buffers, most = buffers + numel, most + share
    return Held(still + buffers, buffers, total, most, largest)


def _split(weights: Sequence[Weight], ranks: int) -> tuple[int, int]:
    """Elements of the buffer, and of the weights in the fullest of its equal pieces."""
    buckets: list[list[tuple[int, int]]] = [[]]
    end = start = total = 0

    def close() -> None:
        nonlocal start, end, total
        total = start + _up(end - start, math.lcm(ranks, _END))
        bounds.append((start, total))
        start = end = total

    bounds: list[tuple[int, int]] = []
    for weight in reversed(weights):
        begin = _up(end, _START)
        if weight.own_bucket and buckets[-1]:
            end = begin
            close()
            begin = end
            buckets.append([])
        end = begin + weight.numel
        buckets[-1].append((begin, end))
        if weight.own_bucket:
            close()
            buckets.append([])
    if buckets[-1]:
        close()
    shares = [0] * ranks
    for places, (low, high) in zip(buckets, bounds, strict=False):
        piece = (high - low) // ranks
        for begin, stop in places:
            for rank in range(
                (begin - low) // piece, min((stop - 1 - low) // piece, ranks - 1) + 1
            ):
                own = low + rank * piece
                shares[rank] += min(stop, own + piece) - max(begin, own)
    return total, max(shares)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def parameters(arch: ArchitectureConfig) -> tuple[int, int]:
    """Weights of the whole model, and those of its layers that a token passes through."""
    whole = ModelConfig()
    every = sum(w.numel for part in stage_weights(arch, whole, 0) for w in part)
    layer = layer_weights(arch, whole)
    active = sum(w.numel for w in layer if not w.expert)
    if arch.num_moe_experts:
        experts = sum(w.numel for w in layer if w.expert)
        active += experts * arch.moe_router_topk // arch.num_moe_experts
    return every, active * arch.num_layers
