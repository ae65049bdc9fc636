"""Memory of one rank, line by line: what stays, and what comes and goes in each phase of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_selfpref.config.model_schema import ArchitectureConfig, OptimizerName
from nemo_selfpref.config.schema import Placement, Precision, RolloutEngineName, RunConfig
from nemo_selfpref.training.plan_activations import (
    MicroBatch,
    activations,
    head_workspace,
    longest_micro_batch,
    width,
)
from nemo_selfpref.training.plan_hardware import Device
from nemo_selfpref.training.plan_method import Method
from nemo_selfpref.training.plan_weights import Held, Sizes, held_by, stage_weights
from nemo_selfpref.types import WeightSet

Lines = dict[str, int]
"""Bytes by what they are for."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank of one pipeline stage."""

    stage: int
    always: Lines
    """From the first step on."""
    phases: dict[str, Lines] = field(default_factory=dict)
    """What is there besides in each phase; one follows the other."""

    @property
    def worst_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> Lines:
        return {**self.always, **self.phases[self.worst_phase]}

    @property
    def total(self) -> int:
        return sum(self.peak.values())


def optimizer_width(precision: Precision, name: OptimizerName) -> int:
    """Bytes of optimizer state for a weight: moments, and a float32 main weight beside bf16."""
    moments = 8 if name is OptimizerName.adamw else 4
    return moments + (4 if precision is Precision.bf16 else 0)


def copy_bytes(name: WeightSet, held: Held, precision: Precision) -> int:
    """A copy of the trained weights: the EMA is float32 and split like the optimizer."""
    return held.main * 4 if name is WeightSet.EMA else held.trained * width(precision)


def cache_bytes(cfg: RunConfig, arch: ArchitectureConfig, sizes: Sizes) -> int:
    """Keys and values of the answers that the embedded engine decodes together."""
    length = cfg.data.max_prompt_length + cfg.rollout.max_new_tokens
    channels = arch.num_query_groups // sizes.tensor * arch.kv_channels
    layers = arch.num_layers // sizes.pipeline
    return 2 * layers * cfg.rollout.batch_size * length * channels * width(cfg.trainer.precision)


def stage_memory(
    cfg: RunConfig,
    arch: ArchitectureConfig,
    sizes: Sizes,
    method: Method,
    stage: int,
    device: Device,
) -> StageMemory:
    """All lines of a rank of one pipeline stage."""
    m, precision = cfg.model, cfg.trainer.precision
    held = held_by(arch, m, sizes, stage)
    always = {
        "weights": held.weights * width(precision),
        "gradients": held.gradients * 4,
        "optimizer": held.main * optimizer_width(precision, m.optim.name),
    }
    copies = _most_copies(method, held, precision)
    if not m.copies_on_cpu:
        always |= {_COPY[name]: copy_bytes(name, held, precision) for name in sorted(copies)}
    if device.reserved:
        always["CUDA context, NCCL (assumed)"] = device.reserved
    paired = any(t.paired for t in method.trainings)
    batch = longest_micro_batch(cfg, paired)
    last = stage == sizes.pipeline - 1
    training = training_step(cfg, arch, sizes, held, stage, batch, device.is_gpu)
    phases = {"training step": training}
    if device.is_gpu and not _fused_adam(cfg):
        phases["optimizer step"] = {"Adam's intermediate values": held.main * 4}
    phases |= _scoring(cfg, arch, sizes, method, held, batch, device, last)
    phases |= _rollouts(cfg, arch, sizes, method, held, device, last)
    return StageMemory(stage, always, phases)


def training_step(
    cfg: RunConfig,
    arch: ArchitectureConfig,
    sizes: Sizes,
    held: Held,
    stage: int,
    batch: MicroBatch,
    gpu: bool,
) -> Lines:
    """The fuller of two moments: the log-prob head at work, or a layer's gradients."""
    kept = activations(cfg, arch, sizes, stage, batch, gpu)
    last = stage == sizes.pipeline - 1
    head = head_workspace(cfg, arch, sizes, batch, gpu) if last else 0
    gradient = held.largest * width(cfg.trainer.precision) + kept.flowing
    lines = {"activations": kept.saved + kept.end}
    if kept.end + head >= kept.again + gradient:
        return lines | {"log-prob head": head}
    lines = {"activations": kept.saved, "gradients under way": gradient}
    return lines | ({"layers computed again": kept.again} if kept.again else {})


_COPY = {
    WeightSet.EMA: "EMA (float32)",
    WeightSet.FROZEN: "frozen weights",
    WeightSet.LAGGED: "reference weights",
}


def _fused_adam(cfg: RunConfig) -> bool:
    """Whether Transformer Engine's Adam is sure to be there, which needs no memory of its own."""
    return cfg.model.transformer_engine is True or cfg.model.fp8_recipe is not None


def _most_copies(method: Method, held: Held, precision: Precision) -> frozenset[WeightSet]:
    together = [method.copies, *(t.copies for t in method.trainings)]
    return max(together, key=lambda names: sum(copy_bytes(n, held, precision) for n in names))


def _scoring(
    cfg: RunConfig,
    arch: ArchitectureConfig,
    sizes: Sizes,
    method: Method,
    held: Held,
    batch: MicroBatch,
    device: Device,
    last: bool,
) -> dict[str, Lines]:
    """Log-probs without gradient; with another set of weights the policy's are put aside."""
    if not any(t.live or t.once for t in method.trainings):
        return {}
    lines = {"layer by layer": _one_pass(cfg, arch, sizes, batch.tokens)}
    if any(t.copies for t in method.trainings):
        lines["policy, put aside"] = held.trained * width(cfg.trainer.precision)
    if last:
        lines["log-prob head"] = head_workspace(cfg, arch, sizes, batch, device.is_gpu)
    return {"reference passes": lines}


def _one_pass(cfg: RunConfig, arch: ArchitectureConfig, sizes: Sizes, tokens: int) -> int:
    """States and the feed-forward part of the layer being computed, without gradient."""
    ffn = arch.ffn_hidden_size // sizes.tensor
    if arch.num_moe_experts:
        ffn = arch.ffn_hidden_size * arch.moe_router_topk // sizes.tensor
    tokens = -(-tokens // sizes.context)
    return tokens * (5 * ffn + 3 * arch.hidden_size) * width(cfg.trainer.precision)


def _rollouts(
    cfg: RunConfig,
    arch: ArchitectureConfig,
    sizes: Sizes,
    method: Method,
    held: Held,
    device: Device,
    last: bool,
) -> dict[str, Lines]:
    asked = method.before.sets.union(*(t.in_step.sets for t in method.trainings))
    if not asked:
        return {}
    if cfg.rollout.engine is RolloutEngineName.vllm:
        return _vllm(cfg, asked, device)
    batch = cfg.rollout.batch_size
    whole = Sizes(**{**vars(sizes), "context": 1})  # every rank decodes whole sequences
    lines = {
        "key-value cache": cache_bytes(cfg, arch, sizes),
        "reading prompts": _one_pass(cfg, arch, whole, batch * cfg.data.max_prompt_length),
    }
    if asked - {WeightSet.POLICY}:
        lines["policy, put aside"] = held.trained * width(cfg.trainer.precision)
    if last:
        rows = arch.vocab_size // sizes.tensor + (arch.vocab_size if sizes.tensor > 1 else 0)
        lines["logits"] = 2 * batch * rows * 4
    return {"rollouts": lines}


def _vllm(cfg: RunConfig, asked: set[WeightSet], device: Device) -> dict[str, Lines]:
    """What engines on the trainer's own devices take; those elsewhere take nothing here."""
    v = cfg.rollout.vllm
    if v.urls or not device.is_gpu or cfg.rollout.placement is Placement.disaggregated:
        return {}
    engines = v.engines_per_set
    if cfg.rollout.placement is Placement.colocated:
        engines *= len({*(s.value for s in asked), *(s.value for s in v.also_serve)})
    if v.devices:  # the device that most of them have
        named = [name for entry in v.devices for name in entry.split(",")]
        engines = max(named.count(name) for name in named)
    share = int(v.gpu_memory_utilization * device.memory)
    return {"rollouts": {f"vLLM, {engines} awake": engines * share}}


def saved_width(cfg: RunConfig, method: Method) -> int:
    """Bytes that a checkpoint has of each trained weight beside itself: the optimizer's state, of
    which a split optimizer tells the main weights in float32 too, and copies that move."""
    precision = cfg.trainer.precision
    each = optimizer_width(precision, cfg.model.optim.name)
    if cfg.model.use_distributed_optimizer:
        each = optimizer_width(Precision.bf16, cfg.model.optim.name)
    copies = frozenset[WeightSet]().union(*(t.copies for t in method.trainings))
    each += 4 if WeightSet.EMA in copies else 0
    return each + (width(precision) if WeightSet.LAGGED in copies else 0)


def snapshot_bytes(cfg: RunConfig, arch: ArchitectureConfig, method: Method, stage: int) -> int:
    """Bytes that a rank of the first replica copies to its machine's memory to save a checkpoint
    within a stage; ranks of other replicas copy none."""
    weights = [w for part in stage_weights(arch, cfg.model, stage) for w in part]
    trained = sum(w.numel for w in weights if w.trained)
    own = sum(w.numel for w in weights) * width(cfg.trainer.precision)
    return own + trained * saved_width(cfg, method)
