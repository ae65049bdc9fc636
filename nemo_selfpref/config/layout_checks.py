"""Contradictions in how processes, model and batches are split: value, bound and fix."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nemo_selfpref.config.model_schema import ArchitectureConfig, ModelConfig, OptimizerName
from nemo_selfpref.config.schema import RunConfig


def positive(**values: float) -> Iterator[str]:
    """A message for each value below 1; in names, __ stands for the dot."""
    for name, value in values.items():
        if value < 1:
            yield f"{name.replace('__', '.')}={value}: expected at least 1"


def _replica_size(m: ModelConfig) -> int:
    """Processes that hold one copy of the model and work on one micro-batch."""
    sizes = (
        m.tensor_model_parallel_size,
        m.pipeline_model_parallel_size,
        m.context_parallel_size,
    )
    return math.prod(max(size, 1) for size in sizes)


def parallel(cfg: RunConfig) -> Iterator[str]:
    m, world = cfg.model, cfg.trainer.devices * cfg.trainer.num_nodes
    yield from positive(
        model__tensor_model_parallel_size=m.tensor_model_parallel_size,
        model__pipeline_model_parallel_size=m.pipeline_model_parallel_size,
        model__context_parallel_size=m.context_parallel_size,
        model__expert_model_parallel_size=m.expert_model_parallel_size,
    )
    if world % _replica_size(m):
        yield (
            f"{world} processes (trainer.devices x trainer.num_nodes) cannot be split into "
            f"replicas of model.tensor_model_parallel_size={m.tensor_model_parallel_size} x "
            f"model.pipeline_model_parallel_size={m.pipeline_model_parallel_size} x "
            f"model.context_parallel_size={m.context_parallel_size} = {_replica_size(m)}. "
            "Set trainer.devices to a multiple of that."
        )
        return
    if m.sequence_parallel and m.tensor_model_parallel_size == 1:
        yield (
            "model.sequence_parallel=true does nothing without tensor parallelism. Set "
            "model.tensor_model_parallel_size=2 or more, or switch it off."
        )
    virtual = m.virtual_pipeline_model_parallel_size
    if virtual is not None and (virtual < 2 or m.pipeline_model_parallel_size < 2):
        yield (
            f"model.virtual_pipeline_model_parallel_size={virtual} with "
            f"model.pipeline_model_parallel_size={m.pipeline_model_parallel_size}: the interleaved "
            "schedule needs 2 or more of both. Set null for the plain schedule."
        )
    yield from _expert_parallel(m, world // _replica_size(m))
    if m.use_distributed_optimizer and m.optim.name is OptimizerName.rmsprop:
        yield (
            "model.use_distributed_optimizer=true with model.optim.name=rmsprop: Megatron splits "
            "the state of Adam only. Set model.optim.name=adamw, or switch it off."
        )


def _expert_parallel(m: ModelConfig, replicas: int) -> Iterator[str]:
    experts, tensor = m.expert_model_parallel_size, m.tensor_model_parallel_size
    if experts < 2:
        return
    ranks = replicas * m.context_parallel_size * tensor
    if ranks % experts:
        yield (
            f"model.expert_model_parallel_size={experts} does not divide the {ranks} ranks of a "
            "pipeline stage (tensor x context x data parallel). Use a divisor of that."
        )
    for inner in (tensor, tensor * m.context_parallel_size):
        if experts % inner and inner % experts:
            yield (
                f"model.expert_model_parallel_size={experts} and the {inner} ranks of tensor x "
                "context parallelism: one has to be a multiple of the other"
            )


def batch(cfg: RunConfig) -> Iterator[str]:
    m = cfg.model
    yield from positive(
        model__micro_batch_size=m.micro_batch_size,
        model__global_batch_size=m.global_batch_size,
        model__logprob_chunk_size=m.logprob_chunk_size,
        model__recompute_num_layers=m.recompute_num_layers,
    )
    if m.micro_batch_tokens is not None:
        if m.micro_batch_tokens < 2 * cfg.data.max_length:
            yield (
                f"model.micro_batch_tokens={m.micro_batch_tokens} cannot hold a pair of two "
                f"sequences of data.max_length={cfg.data.max_length}. Use at least "
                f"{2 * cfg.data.max_length}, or lower data.max_length."
            )
        return
    replicas = max(cfg.trainer.devices * cfg.trainer.num_nodes // _replica_size(m), 1)
    step = m.micro_batch_size * replicas
    if step > 0 and m.global_batch_size % step:
        yield (
            f"model.global_batch_size={m.global_batch_size} is not a multiple of "
            f"model.micro_batch_size={m.micro_batch_size} x {replicas} data-parallel "
            f"replicas = {step}. Use {-(-m.global_batch_size // step) * step}."
        )


def split_of_model(cfg: RunConfig, arch: ArchitectureConfig) -> Iterator[str]:
    m = cfg.model
    tensor, pipeline = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    for name, value in (
        ("attention heads", arch.num_attention_heads),
        ("key-value heads", arch.num_query_groups),
        ("feed-forward channels", arch.ffn_hidden_size),
    ):
        if value % tensor:
            yield (
                f"model.tensor_model_parallel_size={tensor} does not divide the model's {value} "
                f"{name}. Use a divisor of {value}."
            )
    parts = pipeline * (m.virtual_pipeline_model_parallel_size or 1)
    if arch.num_layers % parts:
        yield (
            f"model.pipeline_model_parallel_size={pipeline}"
            + (f" x {parts // pipeline} virtual stages" if parts > pipeline else "")
            + f" does not divide the model's {arch.num_layers} layers. Use a divisor of "
            f"{arch.num_layers}."
        )
    yield from _split_of_experts(cfg, arch)
    if arch.num_attention_heads % arch.num_query_groups:
        yield (
            f"{arch.num_attention_heads} attention heads cannot share {arch.num_query_groups} "
            "key-value heads evenly: the architecture is wrong"
        )
    if arch.kv_channels % 2:
        yield f"kv_channels={arch.kv_channels}: the rotary embedding needs an even number"


def _split_of_experts(cfg: RunConfig, arch: ArchitectureConfig) -> Iterator[str]:
    m = cfg.model
    size, experts = m.expert_model_parallel_size, arch.num_moe_experts
    if size > 1 and (experts == 0 or experts % size):
        yield (
            f"model.expert_model_parallel_size={size} does not divide the model's {experts} "
            "experts. Use a divisor of their number, and 1 for a dense model."
        )
    if not experts:
        return
    fewest = 1 if arch.moe_router_pre_softmax else 2
    if not fewest <= arch.moe_router_topk <= experts:
        yield (
            f"moe_router_topk={arch.moe_router_topk}: expected {fewest} to {experts}, the "
            "experts (the weight of a single one is always 1 without moe_router_pre_softmax, and "
            "the router would not learn)"
        )
    if m.tensor_model_parallel_size > 1 and not m.sequence_parallel:
        yield (
            "a model with experts splits their tokens, not their weights, under tensor "
            "parallelism: set model.sequence_parallel=true"
        )
