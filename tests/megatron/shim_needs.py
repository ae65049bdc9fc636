"""Run as a script: what breaks when one part of the CPU shim is left out, as JSON.

Each case runs in a process forked after the imports, because a patch cannot be taken back.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel

from nemo_selfpref.checkpoint.hf_weights import RandomSource
from nemo_selfpref.checkpoint.training_state import fill_policy
from nemo_selfpref.config.model_schema import ArchitectureConfig, ModelConfig, OptimConfig
from nemo_selfpref.config.schema import Accelerator, RunConfig, TrainerConfig
from nemo_selfpref.data.batching import collate
from nemo_selfpref.megatron import cpu_shim, gpt, optim, parallel, policy
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.platform import select_platform
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.objectives.inputs import StepInputs
from nemo_selfpref.objectives.objective import SFTObjective

ARCH = ArchitectureConfig(2, 16, 32, 2, 1, 8, 64)


def build_step_and_clip(
    stages: int = 1, arch: ArchitectureConfig = ARCH, experts: int = 1
) -> float:
    """Build a model, train one step with clipping; the gradient norm."""
    cfg = RunConfig(
        name="shim",
        trainer=TrainerConfig(devices=stages * experts),
        model=ModelConfig(
            architecture=arch,
            pipeline_model_parallel_size=stages,
            expert_model_parallel_size=experts,
        ),
    )
    platform = select_platform(Accelerator.auto)
    model = Policy(
        arch, cfg.model, cfg.trainer.precision, platform, parallel.initialize(cfg, platform)
    )
    fill_policy(model, RandomSource(arch, 1))
    optimizer = PolicyOptimizer(model, OptimConfig(lr=1e-3), 0.1)
    batch = collate([((5, 6, 7), (8, 9, 2))], [0], paired=False)
    model.train_batch([batch], SFTObjective(), StepInputs(torch.ones(1)))
    optimizer.step()
    return optimizer.grad_norm


def train_experts() -> float:
    arch = replace(ARCH, num_moe_experts=4)
    return build_step_and_clip(arch=arch, experts=2)


def random_streams() -> list[float]:
    """Two draws of a named random stream, with draws of the default one around them."""
    cpu_shim.install()
    tracker = tensor_parallel.random.CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("named", 7)
    draws = []
    for _ in range(2):
        torch.rand(3)
        with tracker.fork("named"):
            draws.append(torch.rand(()).item())
    return draws


def without_scope() -> float:
    for module in (gpt, optim, parallel, policy):
        module.device_scope = contextlib.nullcontext  # type: ignore[assignment]
    return build_step_and_clip()


def without(path: str, work: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        del cpu_shim.PATCHES[path]
        return work()

    return run


def forked(work: Callable[[], Any], ranks: int = 1) -> list[Any]:
    """[result, error] of `work`, of the first of `ranks` processes that fails, or of the first."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                _child(work, rank, ranks, Path(folder))
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        found = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(ranks)]
    return next((f for f in found if f[1] is not None), found[0])


def _child(work: Callable[[], Any], rank: int, ranks: int, folder: Path) -> None:
    if ranks > 1:
        import torch.distributed as dist

        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        answer = [work(), None]
    except Exception as error:
        answer = [None, f"{type(error).__name__}: {error}"]
    (folder / f"{rank}.json").write_text(json.dumps(answer))
    os._exit(0)


WORK: dict[str, tuple[Callable[[], Any], int]] = {
    "step": (build_step_and_clip, 1),
    "streams": (random_streams, 1),
    "stages": (lambda: build_step_and_clip(2), 2),
    "experts": (train_experts, 2),
}
"""What is run, and on how many processes."""

_RANDOM = "megatron.core.tensor_parallel.random."
NEEDED_FOR = {
    "torch.cuda.current_device": "step",
    "torch.cuda.get_rng_state": "step",
    "torch.cuda.manual_seed": "streams",
    _RANDOM + "_get_cuda_rng_state": "streams",
    _RANDOM + "_set_cuda_rng_state": "streams",
    "torch.cuda.synchronize": "stages",
    "torch.cuda.Stream": "experts",
    "torch.cuda.current_stream": "experts",
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": "experts",
}


def main() -> None:
    torch.set_num_threads(1)
    found = {name: forked(*WORK[name]) for name in WORK}
    for path, name in NEEDED_FOR.items():
        work, ranks = WORK[name]
        found[path] = forked(without(path, work), ranks)
    found["scope"] = forked(without_scope)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
