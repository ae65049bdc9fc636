"""Tokens, operations and seconds of a run, by arithmetic from stated rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_selfpref.config.model_schema import ArchitectureConfig, ModelConfig, Recompute
from nemo_selfpref.config.schema import RolloutEngineName, RunConfig
from nemo_selfpref.training.plan_activations import width
from nemo_selfpref.training.plan_costs import Costs, Rates
from nemo_selfpref.training.plan_fit import world_of
from nemo_selfpref.training.plan_hardware import Device
from nemo_selfpref.training.plan_memory import saved_width
from nemo_selfpref.training.plan_method import Method, Training
from nemo_selfpref.training.plan_weights import (
    Sizes,
    held_by,
    parameters,
    sizes_of,
    stage_weights,
)

LAUNCH_S = 3e-4
"""Seconds that a layer of a decoding step takes at least on a GPU, launched kernel by kernel by the
embedded engine: assumed."""
DECODING_SHARE = 0.5
"""Share of the memory's bandwidth that decoding reaches: assumed."""


@dataclass(frozen=True)
class StepTime:
    """One optimizer step of a stage: counts over all replicas, and seconds."""

    name: str
    steps: int
    """Of one epoch."""
    epochs: int
    rows: float
    sequences: float
    tokens: float
    """Of the trained sequences, a shared prompt once."""
    answers: float
    generated: float
    model_flops: float
    """6 N D and attention: what MFU is counted in."""
    flops: float
    """Those computed: recomputed layers, logits and passes without gradient, too."""
    compute_s: float
    bubble_s: float
    tensor_s: float
    """Sending between tensor-parallel ranks."""
    gradient_s: float
    """Summing gradients over replicas."""
    rollout_s: float
    reduced: float
    """Bytes that a device sends to sum gradients."""

    @property
    def seconds(self) -> float:
        waits = self.bubble_s + self.tensor_s + self.gradient_s
        return self.compute_s + waits + self.rollout_s

    @property
    def generation_share(self) -> float:
        return self.rollout_s / self.seconds


def step_time(
    cfg: RunConfig, arch: ArchitectureConfig, training: Training, device: Device, rates: Rates
) -> StepTime:
    """One step of a stage."""
    sizes, costs = sizes_of(cfg.model, world_of(cfg)), Costs(cfg, arch, rates)
    rows = training.batch * (training.rows if training.online else 1.0)
    tokens, model_flops, flops = costs.trained(training, rows)
    flops += costs.asked(training.in_step, training.batch)
    speed = device.peak(cfg.trainer.precision) * rates.mfu * sizes.world
    compute = flops / speed
    per_replica = micro_batches(cfg, sizes, rows, tokens)
    bubble = compute * (sizes.pipeline - 1) / (per_replica * sizes.virtual)
    reduced, gradient = _gradients(cfg, arch, sizes, device)
    of_data = rates.rows if training.online else rates.rows * training.rows
    generated = training.in_step.generated * training.batch
    return StepTime(
        name=training.name,
        steps=max(math.ceil(of_data / training.batch), 1),
        epochs=training.epochs,
        rows=rows,
        sequences=rows * (2 if training.paired else 1),
        tokens=tokens,
        answers=training.in_step.answers * training.batch,
        generated=generated,
        model_flops=model_flops,
        flops=flops,
        compute_s=compute,
        bubble_s=bubble,
        tensor_s=_tensor_parallel(cfg, arch, sizes, device, tokens),
        gradient_s=gradient,
        rollout_s=rollout_seconds(
            cfg, arch, sizes, device, rates, training.in_step.answers * training.batch, generated
        ),
        reduced=reduced,
    )


def micro_batches(cfg: RunConfig, sizes: Sizes, rows: float, tokens: float) -> int:
    """Micro-batches that one replica computes in a step."""
    m = cfg.model
    if m.micro_batch_tokens is not None:
        return max(math.ceil(tokens / m.micro_batch_tokens / sizes.replicas), 1)
    return max(math.ceil(rows / m.micro_batch_size / sizes.replicas), 1)


def _gradients(
    cfg: RunConfig, arch: ArchitectureConfig, sizes: Sizes, device: Device
) -> tuple[float, float]:
    """Bytes that a device of the fullest stage sends, and seconds: float32 gradients summed over
    the replicas in a ring, or scattered, and then the weights gathered."""
    held = max(
        (held_by(arch, cfg.model, sizes, stage) for stage in {0, sizes.pipeline - 1}),
        key=lambda h: h.gradients,
    )
    ranks = sizes.optimizer
    each = 4 + width(cfg.trainer.precision) if cfg.model.use_distributed_optimizer else 8
    sent = (ranks - 1) / ranks * each * held.gradients
    inside = ranks * sizes.tensor <= cfg.trainer.devices
    return sent, sent / (device.node_bandwidth if inside else device.network_bandwidth)


def _tensor_parallel(
    cfg: RunConfig, arch: ArchitectureConfig, sizes: Sizes, device: Device, tokens: float
) -> float:
    """Seconds of the four sums of a layer's states (six where they are computed again)."""
    if sizes.tensor == 1:
        return 0.0
    sums = 6 if cfg.model.recompute_granularity is Recompute.full else 4
    own = tokens / sizes.replicas / sizes.context
    layers = arch.num_layers / sizes.pipeline
    state = own * arch.hidden_size * width(cfg.trainer.precision)
    sent = 2 * (sizes.tensor - 1) / sizes.tensor * state * sums * layers
    inside = sizes.tensor <= cfg.trainer.devices
    return sent / (device.node_bandwidth if inside else device.network_bandwidth)


def decoding_step_s(
    cfg: RunConfig, arch: ArchitectureConfig, device: Device, rates: Rates, tensor: int, batch: int
) -> float:
    """Seconds in which a batch of sequences gets one token more each: weights, keys and values read
    from memory once."""
    bytes_ = width(cfg.trainer.precision)
    length = rates.prompt_tokens + rates.answer_tokens / 2
    cached = 2 * arch.num_layers * arch.num_query_groups * arch.kv_channels * length * bytes_
    read = (parameters(arch)[0] * bytes_ + batch * cached) / tensor
    slow = device.is_gpu and cfg.rollout.engine is RolloutEngineName.embedded
    launches = LAUNCH_S * arch.num_layers if slow else 0.0
    return max(read / (device.memory_bandwidth * DECODING_SHARE), launches)


def rollout_seconds(
    cfg: RunConfig,
    arch: ArchitectureConfig,
    sizes: Sizes,
    device: Device,
    rates: Rates,
    answers: float,
    generated: float,
) -> float:
    """Seconds of sampling so many answers on the trainer's devices, or on vLLM's."""
    if not answers:
        return 0.0
    v = cfg.rollout.vllm
    embedded = cfg.rollout.engine is RolloutEngineName.embedded
    engines = sizes.replicas * sizes.context if embedded else len(v.urls) or v.engines_per_set
    tensor = sizes.tensor if embedded else v.tensor_parallel_size
    if rates.tokens_per_second is not None:
        devices = sizes.world if embedded else engines * tensor
        return generated / (rates.tokens_per_second * devices)
    most = cfg.rollout.batch_size if embedded else v.max_num_seqs
    waves = math.ceil(answers / engines / most)
    together = math.ceil(answers / engines / waves)
    step = decoding_step_s(cfg, arch, device, rates, tensor, together)
    return waves * generated / answers * step


@dataclass(frozen=True)
class RunTime:
    """A whole run: seconds before training (answers, judgements), those of each stage's passes
    scored once, and of each stage."""

    before_s: float
    before_rollout_s: float
    once_s: dict[str, float]
    stages: list[StepTime]

    @property
    def total_s(self) -> float:
        trained = sum(s.seconds * s.steps * s.epochs for s in self.stages)
        return self.before_s + sum(self.once_s.values()) + trained

    @property
    def generation_share(self) -> float:
        rollouts = sum(s.rollout_s * s.steps * s.epochs for s in self.stages)
        return (rollouts + self.before_rollout_s) / self.total_s if self.total_s else 0.0


def run_time(
    cfg: RunConfig, arch: ArchitectureConfig, method: Method, device: Device, rates: Rates
) -> RunTime:
    """A method's stages, and what it asks before them."""
    sizes, costs = sizes_of(cfg.model, world_of(cfg)), Costs(cfg, arch, rates)
    speed = device.peak(cfg.trainer.precision) * rates.mfu * sizes.world
    before, rows = method.before, rates.rows
    answers, generated = before.answers * rows, before.generated * rows
    sampling = rollout_seconds(cfg, arch, sizes, device, rates, answers, generated)
    once = {}
    for training in method.trainings:
        _, model_flops, _ = costs.trained(training, rows * training.rows)
        once[training.name] = len(training.once) * model_flops / 3 / speed
    return RunTime(
        before_s=sampling + costs.asked(before, rows) / speed,
        before_rollout_s=sampling,
        once_s=once,
        stages=[step_time(cfg, arch, t, device, rates) for t in method.trainings],
    )


def checkpoint_bytes(cfg: RunConfig, arch: ArchitectureConfig, method: Method) -> int:
    """Bytes of a checkpoint within a stage, the most of any stage."""
    weights = stage_weights(arch, ModelConfig(lora=cfg.model.lora), 0)[0]
    trained = sum(w.numel for w in weights if w.trained)
    each = saved_width(cfg, method)
    return sum(w.numel for w in weights) * width(cfg.trainer.precision) + trained * each
