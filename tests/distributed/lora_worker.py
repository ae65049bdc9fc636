"""Runs under torchrun (or alone): trains adapters under one layout after another and writes what
came out, for test_lora_layouts.py to compare with a single process.

    lora_worker.py MODEL OUT LAYOUT [LAYOUT ...]     layouts as for worker.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from worker import (
    MICRO_BATCH,
    OBJECTIVES,
    ROWS,
    config,
    make_rows,
    save_state,
    step_inputs,
    weights_kept,
)

from nemo_selfpref.checkpoint.hf_weights import generator_for, read_part
from nemo_selfpref.checkpoint.lora import FreshAdapters, adapter_shapes
from nemo_selfpref.checkpoint.sharded import ShardReader, load_state
from nemo_selfpref.checkpoint.training_state import fill_policy
from nemo_selfpref.checkpoint.verify import policy_logits
from nemo_selfpref.config.model_schema import LoRAConfig, OptimConfig
from nemo_selfpref.config.schema import Accelerator
from nemo_selfpref.data.batching import sequences_of
from nemo_selfpref.data.packing import micro_batches
from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.platform import select_platform
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.training.session import Start, build_policy, find_start, weights_source
from nemo_selfpref.types import WeightSet

LORA = LoRAConfig(rank=4, alpha=8.0)
PROMPTS = [(5, 6, 7), (30, 31), (9,) * 20]


class MovedAdapters:
    """The model with a B that is not zero, as A has no gradient while it is."""

    def __init__(self, start: Start) -> None:
        self.base = weights_source(start, 0)
        assert isinstance(self.base, FreshAdapters)
        self._shapes = adapter_shapes(start.arch, LORA)

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        if not key.endswith(".lora_b"):
            return self.base.read(key, offset, shape)
        whole = torch.randn(self._shapes[key], generator=generator_for(key, 0))
        return read_part(0.1 * whole, offset, shape)


def save(policy: Policy, folder: Path) -> None:
    save_state(folder, policy.sharded_state_dict())


def save_copy(weights: WeightSets, folder: Path) -> None:
    state = weights.sharded_state_dict(WeightSet.EMA)
    save_state(folder, state)


def save_gradients(policy: Policy, weights: WeightSets, folder: Path) -> None:
    """The gradients in the adapters' places, as global tensors."""
    with weights_kept(policy) as parameters:
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.copy_(parameter.main_grad)
        weights.take(WeightSet.EMA, WeightSet.POLICY)
    save_copy(weights, folder)


def exercise(policy: Policy, start: Start, out: Path, first: Path) -> None:
    layout, objective = policy.layout, OBJECTIVES["dpo"]
    weights, rows = WeightSets(policy), make_rows()
    save(policy, out / "fresh")
    fill_policy(policy, MovedAdapters(start))
    weights.take(WeightSet.FROZEN, WeightSet.POLICY)
    scored = policy.score(sequences_of(rows, paired=True))
    batches = micro_batches(
        rows,
        list(range(ROWS)),
        replica=layout.data_rank,
        num_replicas=layout.data_size,
        rule=policy.packing_rule(MICRO_BATCH),
        paired=True,
    )
    metrics = policy.train_batch(batches, objective, step_inputs(objective, rows, scored))
    metrics.pop("tokens")  # sequence parallelism pads
    save_gradients(policy, weights, out / "gradients")
    # Where a gradient is rounding noise a small eps would move by the noise's sign.
    optimizer = PolicyOptimizer(policy, OptimConfig(lr=1e-3, eps=1e-3), clip_grad=0.5)
    optimizer.step()
    save(policy, out / "stepped")
    logits = policy_logits(policy, PROMPTS)
    with weights.using(WeightSet.FROZEN):
        again = policy.score(sequences_of(rows, paired=True))
    parallel.barrier()
    fill_policy(policy, ShardReader(first / "stepped"))
    save(policy, out / "read")
    reader = ShardReader(first / "gradients")
    weights.fill(WeightSet.EMA, lambda state: load_state(reader, state), version=1)
    save_copy(weights, out / "gradients-read")
    found = {
        "metrics": metrics,
        "norm": optimizer.grad_norm,
        "scores": scored.sums.tolist(),
        "frozen": again.sums.tolist(),
    }
    if logits is not None and layout.tensor_rank == 0 and layout.data_rank == 0:
        (out / "logits.json").write_text(json.dumps(logits.tolist()))
    if layout.is_main:
        (out / "found.json").write_text(json.dumps(found))


def main() -> None:
    model, out, *layouts = sys.argv[1:]
    parallel.join(select_platform(Accelerator.auto))
    for text in layouts:
        folder = Path(out) / text
        folder.mkdir(parents=True, exist_ok=True)
        cfg = config(text)
        cfg.model.restore_from_path, cfg.model.lora = model, LORA
        start = find_start(cfg)
        exercise(build_policy(cfg, start)[0], start, folder, Path(out) / layouts[0])
        parallel.leave_layout()
    parallel.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
