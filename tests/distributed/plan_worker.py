"""Runs under torchrun (or alone): builds policies and trains a step under one layout after another,
and writes what was really allocated beside what a plan says, for test_plan_memory.py.

    plan_worker.py OUT CASE [CASE ...]      a case is "tp=2,sp=1,bf16=1", or "one"
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from worker import EXPERTS, SETTINGS

from nemo_selfpref.checkpoint.hf_weights import RandomSource
from nemo_selfpref.checkpoint.lora import FreshAdapters
from nemo_selfpref.checkpoint.snapshot import Snapshot
from nemo_selfpref.checkpoint.training_state import fill_policy
from nemo_selfpref.config.model_schema import (
    ArchitectureConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerName,
    Recompute,
)
from nemo_selfpref.config.schema import (
    Accelerator,
    AlgorithmConfig,
    DataConfig,
    Precision,
    RunConfig,
)
from nemo_selfpref.data.batching import PackedBatch, collate
from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.parallel import all_gather_json, world_group
from nemo_selfpref.megatron.platform import select_platform
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import ORPOObjective
from nemo_selfpref.training.plan_activations import MicroBatch, activations, width
from nemo_selfpref.training.plan_memory import (
    copy_bytes,
    optimizer_width,
    snapshot_bytes,
    training_step,
)
from nemo_selfpref.training.plan_method import Method
from nemo_selfpref.training.plan_weights import held_by, sizes_of
from nemo_selfpref.types import WeightSet

SHAPE = ArchitectureConfig(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=320,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=16,
    vocab_size=1003,
    max_position_embeddings=256,
)
ROWS, LENGTH = 3, 96
RECOMPUTE = {"1": Recompute.selective, "2": Recompute.full}


def config(case: str, world: int) -> tuple[RunConfig, ArchitectureConfig]:
    given = dict(part.split("=") for part in case.split(",")) if "=" in case else {}
    arch = EXPERTS if given.pop("experts", "") else SHAPE
    arch = replace(arch, share_embeddings_and_output_weights=bool(given.pop("tied", "")))
    arch = replace(arch, add_qkv_bias=bool(given.pop("bias", "")))
    arch = replace(arch, qk_layernorm=bool(given.pop("qknorm", "")))
    model: dict[str, Any] = {"lora": LoRAConfig(rank=int(given.pop("lora", "0")))}
    precision = Precision.bf16 if given.pop("bf16", "") else Precision.fp32
    rmsprop = given.pop("rmsprop", "")
    for name, value in given.items():
        model[SETTINGS[name]] = RECOMPUTE[value] if name == "recompute" else int(value)
    for name in ("sequence_parallel", "use_distributed_optimizer"):
        model[name] = bool(model.get(name, False))
    cfg = RunConfig(
        name="plan",
        model=ModelConfig(logprob_chunk_size=64, micro_batch_size=ROWS, **model),
        data=DataConfig(train_path=[], max_length=LENGTH, max_prompt_length=32),
        algorithm=AlgorithmConfig(name="none"),
    )
    cfg.trainer.devices, cfg.trainer.precision = world, precision
    sizes = sizes_of(cfg.model, world)
    cfg.model.global_batch_size = ROWS * sizes.replicas * sizes.pipeline
    cfg.model.optim.name = OptimizerName.rmsprop if rmsprop else OptimizerName.adamw
    return cfg, arch


def batch_of(policy: Policy) -> PackedBatch:
    """Pairs whose answers fill nearly all of data.max_length, as a plan expects the longest."""
    rows = [((5,), tuple(range(6, 5 + LENGTH))) for _ in range(2 * ROWS)]
    return collate(rows, list(range(ROWS)), paired=True, pad_multiple=policy.pad_multiple)


class Live:
    """Bytes of the storages that autograd keeps, and the most there ever were."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.counts: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> Kept:
        return Kept(self, tensor)

    def add(self, key: int, size: int, by: int) -> None:
        if key in self.known:
            return
        before = self.counts.get(key, 0)
        self.counts[key] = before + by
        if before + by == 0 or before == 0:
            self.now += size if by > 0 else -size
        self.peak = max(self.peak, self.now)


class Kept:
    """A tensor that a node of the graph holds until its backward pass."""

    def __init__(self, live: Live, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.tensor, self.live, self.place = tensor, live, (storage.data_ptr(), storage.nbytes())
        live.add(*self.place, 1)

    def __del__(self) -> None:
        self.live.add(*self.place, -1)


class Allocated(TorchDispatchMode):
    """Follows every storage an operation makes, and the most bytes there were at one time."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.held = {self._key(t): (StorageWeakRef(t.untyped_storage()), 0) for t in known}
        self.peak = 0

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and self._key(tensor) not in self.held:
                size = tensor.untyped_storage().nbytes()
                self.held[self._key(tensor)] = (StorageWeakRef(tensor.untyped_storage()), size)
        self.held = {key: item for key, item in self.held.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return out


def storages(tensors: Iterable[Tensor], without: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages behind some tensors."""
    known = {t.untyped_storage().data_ptr() for t in without}
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for place, size in found.items() if place not in known)


def measure(policy: Policy, cfg: RunConfig) -> dict[str, int]:
    parameters = list(policy.module.parameters())
    trained: list[Any] = [p for p in parameters if p.requires_grad]
    optimizer = PolicyOptimizer(policy, cfg.model.optim, 1.0)
    inputs = StepInputs(torch.ones(ROWS), {})
    batches = [batch_of(policy)] * policy.layout.pipeline_size
    gradients = [p.main_grad for p in trained]
    found = {"weights": storages(parameters), "gradients": storages(gradients)}
    live = Live(parameters)
    with torch.autograd.graph.saved_tensors_hooks(live.pack, lambda kept: kept.tensor):
        policy.train_batch(batches, ORPOObjective(0.5), inputs)
    found["activations"] = live.peak
    with Allocated([*parameters, *gradients]) as allocated:
        policy.train_batch(batches, ORPOObjective(0.5), inputs)
    found["step"] = allocated.peak
    optimizer.step()
    groups: Any = optimizer.param_groups
    inner: Any = optimizer.inner
    mains = [p for group in groups for p in group["params"] if p is not None]
    states = [
        value
        for chained in inner.chained_optimizers
        for state in chained.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.dim()
    ]
    found["optimizer"] = storages([*mains, *states], without=parameters)
    weights = WeightSets(policy)
    for name in (WeightSet.EMA, WeightSet.LAGGED):
        weights.take(name, WeightSet.POLICY)
        found[name.value] = storages(weights._copies[name])
    weights.drop(WeightSet.EMA)
    weights.drop(WeightSet.LAGGED)
    snapshot = Snapshot()
    snapshot.add_state("weights", policy.sharded_state_dict())
    snapshot.add_state("optimizer", optimizer.sharded_state_dict())
    found["snapshot"] = sum(storages(s._tensors.values()) for s in snapshot._shards.values())
    return found


def planned(policy: Policy, cfg: RunConfig, arch: ArchitectureConfig) -> dict[str, int]:
    layout, precision = policy.layout, cfg.trainer.precision
    sizes = sizes_of(cfg.model, layout.world_size)
    held = held_by(arch, cfg.model, sizes, layout.pipeline_rank)
    tokens = batch_of(policy)
    batch = MicroBatch(tokens.tokens.numel(), tokens.targets.numel())
    stage = layout.pipeline_rank
    kept = activations(cfg, arch, sizes, stage, batch, False)
    step = training_step(cfg, arch, sizes, held, stage, batch, False)
    return {
        "weights": held.weights * width(precision),
        "gradients": held.gradients * 4,
        "optimizer": held.main * optimizer_width(precision, cfg.model.optim.name),
        "ema": copy_bytes(WeightSet.EMA, held, precision),
        "lagged": copy_bytes(WeightSet.LAGGED, held, precision),
        "activations": kept.most,
        "step": sum(step.values()),
        "snapshot": snapshot_bytes(cfg, arch, Method(), stage),
    }


def main() -> None:
    out, *cases = sys.argv[1:]
    platform = select_platform(Accelerator.auto)
    parallel.join(platform)
    for case in cases:
        cfg, arch = config(case, torch.distributed.get_world_size())
        layout = parallel.initialize(cfg, platform)
        policy = Policy(arch, cfg.model, cfg.trainer.precision, platform, layout)
        source: Any = RandomSource(arch, 0)
        if cfg.model.lora.rank:
            source = FreshAdapters(source, arch, cfg.model.lora, 0)
        fill_policy(policy, source)
        facts = {"real": measure(policy, cfg), "plan": planned(policy, cfg, arch)}
        every = all_gather_json(
            {**facts, "stage": layout.pipeline_rank}, world_group(), platform.device()
        )
        if layout.is_main:
            (Path(out) / f"{case}.json").write_text(json.dumps(every))
        parallel.leave_layout()
    parallel.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
