"""Contradictions between settings, found before any work: value, bound and fix."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_selfpref.config.schema import ArchitectureConfig, OptimConfig, OptimizerName, RunConfig
from nemo_selfpref.errors import ConfigError


def check_config(cfg: RunConfig) -> None:
    """Raise ConfigError with every contradiction found, one a line."""
    _raise([*_trainer(cfg), *_parallel(cfg), *_batch(cfg), *_lengths(cfg), *_rollout(cfg)])
    check_optim("model.optim", cfg.model.optim)


def check_architecture(cfg: RunConfig, arch: ArchitectureConfig) -> None:
    """The same for the model's shape, known once the weights' folder has been read."""
    _raise([*_split_of_model(cfg, arch), *_context(cfg, arch)])


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


def _parallel(cfg: RunConfig) -> Iterator[str]:
    m, world = cfg.model, cfg.trainer.devices * cfg.trainer.num_nodes
    tensor, pipeline = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    yield from _positive(
        model__tensor_model_parallel_size=tensor, model__pipeline_model_parallel_size=pipeline
    )
    if tensor > 0 and pipeline > 0 and world % (tensor * pipeline):
        yield (
            f"{world} processes (trainer.devices x trainer.num_nodes) cannot be split into "
            f"replicas of model.tensor_model_parallel_size={tensor} x "
            f"model.pipeline_model_parallel_size={pipeline} = {tensor * pipeline}. "
            "Set trainer.devices to a multiple of that."
        )
    if m.sequence_parallel and tensor == 1:
        yield (
            "model.sequence_parallel=true does nothing without tensor parallelism. Set "
            "model.tensor_model_parallel_size=2 or more, or switch it off."
        )


def _batch(cfg: RunConfig) -> Iterator[str]:
    m = cfg.model
    yield from _positive(
        model__micro_batch_size=m.micro_batch_size,
        model__global_batch_size=m.global_batch_size,
        model__logprob_chunk_size=m.logprob_chunk_size,
    )
    replica = m.tensor_model_parallel_size * m.pipeline_model_parallel_size
    replicas = cfg.trainer.devices * cfg.trainer.num_nodes // max(replica, 1)
    step = m.micro_batch_size * max(replicas, 1)
    if step > 0 and m.global_batch_size % step:
        yield (
            f"model.global_batch_size={m.global_batch_size} is not a multiple of "
            f"model.micro_batch_size={m.micro_batch_size} x {max(replicas, 1)} data-parallel "
            f"replicas = {step}. Use {-(-m.global_batch_size // step) * step}."
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
    if arch.num_layers % pipeline:
        yield (
            f"model.pipeline_model_parallel_size={pipeline} does not divide the model's "
            f"{arch.num_layers} layers. Use a divisor of {arch.num_layers}."
        )
    if arch.num_attention_heads % arch.num_query_groups:
        yield (
            f"{arch.num_attention_heads} attention heads cannot share {arch.num_query_groups} "
            "key-value heads evenly: the architecture is wrong"
        )
    if arch.kv_channels % 2:
        yield f"kv_channels={arch.kv_channels}: the rotary embedding needs an even number"


def _context(cfg: RunConfig, arch: ArchitectureConfig) -> Iterator[str]:
    if cfg.data.max_length > arch.max_position_embeddings:
        yield (
            f"data.max_length={cfg.data.max_length} passes the model's "
            f"{arch.max_position_embeddings} positions. Lower data.max_length."
        )
