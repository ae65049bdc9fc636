"""Runs under torchrun (or alone): trains and samples under one layout after another and writes what
came out, for test_layouts.py to compare with a single process.

    worker.py MODEL OUT LAYOUT [LAYOUT ...]     a layout is TP,PP,SP as in 2,1,0
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_selfpref.checkpoint.sharded import save_state
from nemo_selfpref.checkpoint.training_state import fill_policy
from nemo_selfpref.config.schema import (
    Accelerator,
    AlgorithmConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from nemo_selfpref.data.batching import micro_batches
from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.decode import KVDecoder
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.platform import select_platform
from nemo_selfpref.megatron.policy import Policy, ReferenceLogps
from nemo_selfpref.objectives.objective import (
    DPOObjective,
    IPOObjective,
    NLLScope,
    ORPOObjective,
    SFTObjective,
)
from nemo_selfpref.rollout.embedded import EmbeddedEngine
from nemo_selfpref.training.session import find_start, weights_source
from nemo_selfpref.types import GenerationRequest, PreferencePair, SamplingParams

OBJECTIVES = {
    "sft": SFTObjective(),
    "dpo": DPOObjective(0.1),
    "cdpo": DPOObjective(0.1, 0.2),
    "ipo": IPOObjective(0.1),
    "orpo": ORPOObjective(0.5, NLLScope.full),
}
ROWS, MICRO_BATCH = 13, 3


def tokens(count: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(5, 480, (count,), generator=generator).tolist())


def make_rows() -> list[PreferencePair]:
    """13 pairs of unlike lengths: no layout divides them evenly."""
    g = torch.Generator().manual_seed(0)
    return [
        PreferencePair(str(i), tokens(5 + i % 7, g), tokens(9 + i % 5, g), tokens(3 + i % 11, g))
        for i in range(ROWS)
    ]


def config(model: str, tensor: int, pipeline: int, sequence: bool) -> RunConfig:
    cfg = RunConfig(
        name="layouts",
        model=ModelConfig(
            restore_from_path=model,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            sequence_parallel=sequence,
            logprob_chunk_size=17,
        ),
        data=DataConfig(train_path=[], max_length=64, max_prompt_length=32),
        algorithm=AlgorithmConfig(name="none"),
    )
    cfg.trainer.devices = dist.get_world_size() if dist.is_initialized() else 1
    return cfg


def save_gradients(policy: Policy, folder: Path) -> None:
    """The gradients in the weights' places, as global tensors."""
    kept = [p.detach().clone() for p in policy.module.parameters()]
    with torch.no_grad():
        for p in policy.module.parameters():
            p.copy_(p.main_grad)
        save_state(folder, policy.sharded_state_dict(), policy.platform.device())
        for p, value in zip(policy.module.parameters(), kept, strict=True):
            p.copy_(value)


def exercise(cfg: RunConfig, out: Path) -> None:
    platform = select_platform(Accelerator.auto)
    start = find_start(cfg)
    layout = parallel.initialize(cfg, platform)
    policy = Policy(start.arch, cfg.model, cfg.trainer.precision, platform, layout)
    fill_policy(policy, weights_source(start, 0))
    found = {"generated": generate(policy), "losses": {}, "norms": []}
    rows = make_rows()
    both = [(r.prompt_ids, r.chosen_ids) for r in rows] + [
        (r.prompt_ids, r.rejected_ids) for r in rows
    ]
    scored = policy.score(both)
    found["scores"] = scored.sums.tolist()
    # A reference other than the policy, so that h and the rewards are not zero.
    shift = torch.linspace(-2, 2, 2 * ROWS)
    chosen, rejected = (scored.sums.float() + shift).chunk(2)
    reference = ReferenceLogps(chosen=chosen, rejected=rejected)
    for name, objective in OBJECTIVES.items():
        batches = micro_batches(
            rows,
            list(range(ROWS)),
            replica=layout.data_rank,
            num_replicas=layout.data_size,
            micro_batch_size=MICRO_BATCH,
            paired=objective.paired,
            prompt_targets=name == "orpo",
            pad_multiple=layout.tensor_size if cfg.model.sequence_parallel else 1,
        )
        metrics = policy.train_batch(batches, objective, reference)
        metrics.pop("tokens")  # sequence parallelism pads
        found["losses"][name] = metrics
        save_gradients(policy, out / f"grad-{name}")
    optimizer = PolicyOptimizer(policy, OptimConfig(lr=1e-3), clip_grad=0.5)
    optimizer.step()
    found["norms"].append(optimizer.grad_norm)
    save_state(out / "stepped", policy.sharded_state_dict(), platform.device())
    if layout.is_main:
        (out / "found.json").write_text(json.dumps(found))


def generate(policy: Policy) -> list[list[int]]:
    from megatron.core import parallel_state as ps

    layout, device = policy.layout, policy.platform.device()
    engine = EmbeddedEngine(
        KVDecoder(policy),
        stop_ids=frozenset({2}),
        max_length=64,
        batch_size=4,
        replica=layout.data_rank,
        num_replicas=layout.data_size,
        gather=lambda v: parallel.all_gather_json(v, ps.get_data_parallel_group(), device),
        gather_stages=lambda v: parallel.all_gather_json(
            v, ps.get_pipeline_model_parallel_group(), device
        ),
    )
    g = torch.Generator().manual_seed(1)
    requests = [GenerationRequest(str(i), tokens(4 + i % 5, g), seed=i) for i in range(11)]
    found = engine.generate(requests, SamplingParams(12, 0.8, 0.95))
    return [list(c.token_ids) for c in found]


def main() -> None:
    model, out, *layouts = sys.argv[1:]
    for text in layouts:
        tensor, pipeline, sequence = (int(n) for n in text.split(","))
        folder = Path(out) / text
        folder.mkdir(parents=True, exist_ok=True)
        select_platform(Accelerator.auto)
        if not dist.is_initialized():
            parallel._join(select_platform(Accelerator.auto))
        exercise(config(model, tensor, pipeline, bool(sequence)), folder)
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    parallel.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
