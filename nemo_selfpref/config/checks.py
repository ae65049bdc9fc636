"""Contradictions between settings, found before any work: value, bound and fix."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nemo_selfpref.config.layout_checks import batch, parallel, positive, split_of_model
from nemo_selfpref.config.model_schema import (
    ArchitectureConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    OptimizerName,
)
from nemo_selfpref.config.rollout_checks import engines, sampling
from nemo_selfpref.config.safety import names, server_urls
from nemo_selfpref.config.schema import (
    CheckpointParams,
    HeartbeatConfig,
    NonFinite,
    RunConfig,
    TrainerConfig,
)
from nemo_selfpref.errors import ConfigError


def check_config(cfg: RunConfig) -> None:
    """Raise ConfigError with every contradiction found, one a line."""
    rules = (
        *(names, _trainer, _heartbeat, parallel, batch, _fp8, _reference_cache, _lengths),
        *(sampling, engines, server_urls),
    )
    _raise([problem for rule in rules for problem in rule(cfg)])
    check_lora(cfg.model.lora)
    check_optim("model.optim", cfg.model.optim)


def check_architecture(cfg: RunConfig, arch: ArchitectureConfig) -> None:
    """The same for the model's shape, known once the weights' folder has been read."""
    _raise([*split_of_model(cfg, arch), *_context(cfg, arch), *_adapted_experts(cfg, arch)])


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(problems))


def _trainer(cfg: RunConfig) -> Iterator[str]:
    t = cfg.trainer
    yield from positive(
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
    yield from _kept_checkpoints(params)
    if t.gradient_clip_val < 0:
        yield f"trainer.gradient_clip_val={t.gradient_clip_val}: expected 0 (off) or more"
    yield from _nonfinite(t)


def _nonfinite(t: TrainerConfig) -> Iterator[str]:
    if t.max_nonfinite_steps < 1:
        yield (
            f"trainer.max_nonfinite_steps={t.max_nonfinite_steps}: expected 1 or more. To skip "
            "none, set trainer.nonfinite=halt."
        )
    elif t.nonfinite is NonFinite.halt and t.max_nonfinite_steps != 3:
        yield (
            f"trainer.max_nonfinite_steps={t.max_nonfinite_steps} does nothing with "
            "trainer.nonfinite=halt, which skips no step. Leave one of them out."
        )


def _kept_checkpoints(params: CheckpointParams) -> Iterator[str]:
    where = "exp_manager.checkpoint_callback_params"
    if params.save_best_k < 1:
        yield f"{where}.save_best_k={params.save_best_k}: expected 1 or more"
    if params.failed_saves_allowed < 0:
        yield f"{where}.failed_saves_allowed={params.failed_saves_allowed}: expected 0 or more"
    defaults = CheckpointParams()
    best = (params.mode, params.save_best_k) != (defaults.mode, defaults.save_best_k)
    if best and params.monitor is None:
        yield (
            f"{where}.mode and save_best_k do nothing without {where}.monitor. Set that to a "
            "metric, such as loss, or leave them out."
        )


def _heartbeat(cfg: RunConfig) -> Iterator[str]:
    h, where = cfg.exp_manager.heartbeat, "exp_manager.heartbeat"
    if h.hang_timeout_s == 0:
        if h != HeartbeatConfig(hang_timeout_s=0):
            yield f"{where}: its other settings do nothing with hang_timeout_s=0. Leave them out."
        return
    if not 0 < h.hang_timeout_s < math.inf:
        yield f"{where}.hang_timeout_s={h.hang_timeout_s}: expected 0 (off) or seconds above it"
    elif not 0 < h.slow_after_s <= h.hang_timeout_s / 4:
        yield (
            f"{where}.slow_after_s={h.slow_after_s}: expected more than 0 and at most a quarter of "
            f"hang_timeout_s={h.hang_timeout_s}"
        )
    elif not 0 < h.every_s <= h.slow_after_s / 3:
        yield (
            f"{where}.every_s={h.every_s}: expected more than 0 and at most a third of "
            f"slow_after_s={h.slow_after_s}, so that one late beat is no alarm"
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


def _fp8(cfg: RunConfig) -> Iterator[str]:
    m = cfg.model
    yield from positive(model__fp8_check_every=m.fp8_check_every)
    if not m.fp8_max_noise > 0:
        yield f"model.fp8_max_noise={m.fp8_max_noise}: expected a positive number"
    default = ModelConfig()
    if m.fp8_recipe is None:
        for name in ("first_last_layers_bf16", "fp8_max_noise", "fp8_check_every", "fp8_fallback"):
            if getattr(m, name) != getattr(default, name):
                yield f"model.{name} does nothing without model.fp8_recipe. Set that, or leave it."


def _lengths(cfg: RunConfig) -> Iterator[str]:
    d = cfg.data
    yield from positive(data__max_length=d.max_length, data__max_prompt_length=d.max_prompt_length)
    if d.max_prompt_length >= d.max_length:
        yield (
            f"data.max_prompt_length={d.max_prompt_length} leaves no room for an answer within "
            f"data.max_length={d.max_length}. Lower the first or raise the second."
        )
    if d.limit is not None and d.limit < 1:
        yield f"data.limit={d.limit}: expected at least 1, or null for all rows"


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
