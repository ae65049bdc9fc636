"""Contradictions between settings, found before any work: value, bound and fix."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nemo_selfpref.config.schema import (
    ArchitectureConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    OptimizerName,
    RunConfig,
)
from nemo_selfpref.errors import ConfigError


def check_config(cfg: RunConfig) -> None:
    """Raise ConfigError with every contradiction found, one a line."""
    rules = (_trainer, _parallel, _batch, _reference_cache, _lengths, _rollout)
    _raise([problem for rule in rules for problem in rule(cfg)])
    check_lora(cfg.model.lora)
    check_optim("model.optim", cfg.model.optim)


def check_architecture(cfg: RunConfig, arch: ArchitectureConfig) -> None:
    """The same for the model's shape, known once the weights' folder has been read."""
    _raise([*_split_of_model(cfg, arch), *_context(cfg, arch), *_adapted_experts(cfg, arch)])


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def _positive(**values: float) -> Iterator[str]:
    for name, value in values.items():
        if value < 1:
            yield f"{name.replace('__', '.')}={value}: expected at least 1"


def _trainer(cfg: RunConfig) -> Iterator[str]:
    t = cfg.trainer
    yield from _positive(
        trainer__devices=t.devices,
        trainer__num_nodes=t.num_nodes,
        trainer__max_epochs=t.max_epochs,
        trainer__log_every_n_steps=t.log_every_n_steps,
    )
    if t.max_steps == 0 or t.max_steps < -1:
        yield f"trainer.max_steps={t.max_steps}: expected a positive number, or -1 for whole epochs"
    params = cfg.exp_manager.checkpoint_callback_params
    if params.every_n_train_steps < 0:
        yield (
            "exp_manager.checkpoint_callback_params.every_n_train_steps="
            f"{params.every_n_train_steps}: expected 0 (off) or more"
        )
    if params.save_top_k == 0 or params.save_top_k < -1:
        yield (
            f"exp_manager.checkpoint_callback_params.save_top_k={params.save_top_k}: expected 1 or "
            "more, or -1 to keep all"
        )
    if t.gradient_clip_val < 0:
        yield f"trainer.gradient_clip_val={t.gradient_clip_val}: expected 0 (off) or more"


def _replica_size(m: ModelConfig) -> int:
    """Processes that hold one copy of the model and work on one micro-batch."""
    sizes = (
        m.tensor_model_parallel_size,
        m.pipeline_model_parallel_size,
        m.context_parallel_size,
    )
    return math.prod(max(size, 1) for size in sizes)


def _parallel(cfg: RunConfig) -> Iterator[str]:
    m, world = cfg.model, cfg.trainer.devices * cfg.trainer.num_nodes
    yield from _positive(
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


def _batch(cfg: RunConfig) -> Iterator[str]:
    m = cfg.model
    yield from _positive(
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


def _reference_cache(cfg: RunConfig) -> Iterator[str]:
    m = cfg.model
    folder, bound = m.reference_cache_dir, m.reference_cache_max_gb
    if folder is not None and not folder.strip():
        yield "model.reference_cache_dir is empty: give a folder, or null to keep nothing"
    if not 0 <= bound < math.inf:
        yield f"model.reference_cache_max_gb={bound}: expected 0 (no bound) or more"
    if bound and folder is None:
        yield (
            f"model.reference_cache_max_gb={bound} does nothing without "
            "model.reference_cache_dir. Set that too, or leave both out."
        )


def _lengths(cfg: RunConfig) -> Iterator[str]:
    d = cfg.data
    yield from _positive(data__max_length=d.max_length, data__max_prompt_length=d.max_prompt_length)
    if d.max_prompt_length >= d.max_length:
        yield (
            f"data.max_prompt_length={d.max_prompt_length} leaves no room for an answer within "
            f"data.max_length={d.max_length}. Lower the first or raise the second."
        )
    if d.limit is not None and d.limit < 1:
        yield f"data.limit={d.limit}: expected at least 1, or null for all rows"


def _rollout(cfg: RunConfig) -> Iterator[str]:
    r = cfg.rollout
    yield from _positive(rollout__max_new_tokens=r.max_new_tokens, rollout__batch_size=r.batch_size)
    if r.temperature < 0:
        yield f"rollout.temperature={r.temperature}: expected 0 (greedy) or more"
    if not 0 < r.top_p <= 1:
        yield f"rollout.top_p={r.top_p}: expected 0 < top_p <= 1"
    if r.top_k < 0:
        yield f"rollout.top_k={r.top_k}: expected 0 (off) or more"


def check_lora(lora: LoRAConfig) -> None:
    """Raise ConfigError for adapters that cannot be built."""
    known = LoRAConfig().target_modules
    unknown = [name for name in lora.target_modules if name not in known]
    problems = []
    if lora.rank < 0:
        problems.append(f"model.lora.rank={lora.rank}: expected 0 (off) or more")
    if not 0 < lora.alpha < math.inf:
        problems.append(f"model.lora.alpha={lora.alpha}: expected a positive number")
    if unknown:
        problems.append(
            f"model.lora.target_modules: no layer is called {', '.join(unknown)}; expected some of "
            f"{', '.join(known)}"
        )
    if lora.rank > 0 and not lora.target_modules:
        problems.append(
            f"model.lora.rank={lora.rank} with no model.lora.target_modules trains nothing. Name "
            "some layers, or set model.lora.rank=0."
        )
    _raise(problems)


def check_optim(where: str, optim: OptimConfig) -> None:
    """Raise ConfigError for optimizer settings out of range."""
    problems = list(_other_optimizers_settings(where, optim))
    if not optim.lr > 0:
        problems.append(f"{where}.lr={optim.lr}: expected a positive number")
    if len(optim.betas) != 2 or not all(0 <= b < 1 for b in optim.betas):
        problems.append(f"{where}.betas={list(optim.betas)}: expected two numbers in [0, 1)")
    if not 0 <= optim.alpha < 1:
        problems.append(f"{where}.alpha={optim.alpha}: expected 0 <= alpha < 1")
    if optim.weight_decay < 0:
        problems.append(f"{where}.weight_decay={optim.weight_decay}: expected 0 or more")
    if not 0 <= optim.sched.warmup_ratio < 1:
        problems.append(f"{where}.sched.warmup_ratio={optim.sched.warmup_ratio}: expected [0, 1)")
    if optim.sched.warmup_steps < 0:
        problems.append(
            f"{where}.sched.warmup_steps={optim.sched.warmup_steps}: expected 0 or more"
        )
    if optim.sched.warmup_steps and optim.sched.warmup_ratio:
        problems.append(f"{where}.sched: give warmup_steps or warmup_ratio, not both")
    if not 0 <= optim.sched.min_lr <= optim.lr:
        problems.append(f"{where}.sched.min_lr={optim.sched.min_lr}: expected 0 <= min_lr <= lr")
    _raise(problems)


def _other_optimizers_settings(where: str, optim: OptimConfig) -> Iterator[str]:
    default = OptimConfig()
    if optim.name is OptimizerName.rmsprop and list(optim.betas) != default.betas:
        yield (
            f"{where}.betas={list(optim.betas)} does nothing with {where}.name=rmsprop, whose "
            f"smoothing constant is {where}.alpha. Set that, or {where}.name=adamw."
        )
    if optim.name is OptimizerName.adamw and optim.alpha != default.alpha:
        yield (
            f"{where}.alpha={optim.alpha} does nothing with {where}.name=adamw, whose smoothing "
            f"constants are {where}.betas. Set those, or {where}.name=rmsprop."
        )


def _split_of_model(cfg: RunConfig, arch: ArchitectureConfig) -> Iterator[str]:
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
    if cfg.export.hf:
        yield (
            "a model with experts cannot be written as a Hugging Face folder yet. Set "
            "export.hf=false; the checkpoint is written all the same."
        )
    if not 2 <= arch.moe_router_topk <= experts:
        yield (
            f"moe_router_topk={arch.moe_router_topk}: expected 2 to {experts}, the experts (the "
            "weight of a single one is always 1, and the router would not learn)"
        )
    if m.tensor_model_parallel_size > 1 and not m.sequence_parallel:
        yield (
            "a model with experts splits their tokens, not their weights, under tensor "
            "parallelism: set model.sequence_parallel=true"
        )


def _adapted_experts(cfg: RunConfig, arch: ArchitectureConfig) -> Iterator[str]:
    experts = getattr(arch, "num_moe_experts", 0)
    if cfg.model.lora.rank and experts:
        yield (
            f"model.lora.rank={cfg.model.lora.rank} on a model with {experts} experts: adapters "
            "are built for dense layers only. Set model.lora.rank=0."
        )


def _context(cfg: RunConfig, arch: ArchitectureConfig) -> Iterator[str]:
    if cfg.data.max_length > arch.max_position_embeddings:
        yield (
            f"data.max_length={cfg.data.max_length} passes the model's "
            f"{arch.max_position_embeddings} positions. Lower data.max_length."
        )
