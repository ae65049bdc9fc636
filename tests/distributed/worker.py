"""Runs under torchrun (or alone): trains and samples under one layout after another and writes what
came out, for test_layouts.py to compare with a single process.

    worker.py MODEL OUT LAYOUT [LAYOUT ...]     a layout is "tp=2,sp=1", or "one"
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_selfpref.checkpoint.hf_config import read_architecture
from nemo_selfpref.checkpoint.hf_weights import HuggingFaceSource, RandomSource
from nemo_selfpref.checkpoint.saver import save_now
from nemo_selfpref.checkpoint.sharded import ShardReader, load_state
from nemo_selfpref.checkpoint.snapshot import Snapshot
from nemo_selfpref.checkpoint.training_state import fill_policy
from nemo_selfpref.config.checks import check_architecture, check_config
from nemo_selfpref.config.model_schema import (
    ArchitectureConfig,
    ModelConfig,
    OptimConfig,
    Recompute,
)
from nemo_selfpref.config.schema import Accelerator, AlgorithmConfig, DataConfig, RunConfig
from nemo_selfpref.data.batching import sequences_of
from nemo_selfpref.data.packing import micro_batches
from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.platform import select_platform
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.scoring import SequenceLogps, response_token_logprobs
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.objectives.inputs import PassLogps, StepInputs
from nemo_selfpref.objectives.objective import (
    DPOObjective,
    IPOObjective,
    NLLScope,
    Objective,
    ORPOObjective,
    Pass,
    SFTObjective,
    SPCEObjective,
    SrDPOObjective,
    SrIPOObjective,
)
from nemo_selfpref.rollout.embedded import EmbeddedEngine
from nemo_selfpref.training.session import embedded_engine
from nemo_selfpref.types import (
    GenerationRequest,
    PreferencePair,
    SamplingParams,
    TokenIds,
    WeightSet,
)

OBJECTIVES = {
    "sft": SFTObjective(),
    "dpo": DPOObjective(0.1),
    "cdpo": DPOObjective(0.1, 0.2),
    "ipo": IPOObjective(0.1),
    "spce": SPCEObjective(0.1),
    "sr_dpo": SrDPOObjective(0.1, 0.3),
    "sr_ipo": SrIPOObjective(0.1, 0.3),
    "orpo": ORPOObjective(0.5, NLLScope.full),
}
ROWS, MICRO_BATCH = 13, 3
SHIFT = torch.linspace(-2, 2, 2 * ROWS)
SHIFTS = {Pass.REFERENCE: SHIFT, Pass.REFINED: SHIFT.flip(0), Pass.REFINED_REFERENCE: SHIFT.cos()}
"""By how much the log-probs of each pass differ from the policy's."""
LABELS = (7, 2, 311)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """A sharded state dict, as a folder that a ShardReader reads. Collective."""
    snapshot = Snapshot()
    snapshot.add_state(".", state)
    save_now(folder, snapshot, select_platform(Accelerator.auto).device())


def tokens(count: int, generator: torch.Generator) -> TokenIds:
    return tuple(torch.randint(5, 480, (count,), generator=generator).tolist())


def make_rows() -> list[PreferencePair]:
    """13 pairs of unlike lengths: no layout divides them evenly."""
    g = torch.Generator().manual_seed(0)
    return [
        PreferencePair(
            str(i),
            tokens(5 + i % 7, g),
            tokens(9 + i % 5, g),
            tokens(3 + i % 11, g),
            strength=1 - i / 20,
        )
        for i in range(ROWS)
    ]


EXPERTS = ArchitectureConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=500,
    max_position_embeddings=256,
    init_method_std=0.1,
    num_moe_experts=4,
)
"""A mixture of experts, two of four for each token; started from random weights."""

SETTINGS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "sp": "sequence_parallel",
    "dist": "use_distributed_optimizer",
    "share": "share_prompts",
    "tokens": "micro_batch_tokens",
    "recompute": "recompute_granularity",
}
"""A layout is written "tp=2,sp=1"; "one" changes nothing."""


def config(layout: str) -> RunConfig:
    given = dict(part.split("=") for part in layout.split(",")) if "=" in layout else {}
    values: dict[str, Any] = {SETTINGS[name]: int(value) for name, value in given.items()}
    for name in ("sequence_parallel", "use_distributed_optimizer", "share_prompts"):
        values[name] = bool(values.get(name, False))
    if "recompute_granularity" in values:
        values["recompute_granularity"] = Recompute.full
    cfg = RunConfig(
        name="layouts",
        model=ModelConfig(logprob_chunk_size=17, **values),
        data=DataConfig(train_path=[], max_length=64, max_prompt_length=32),
        algorithm=AlgorithmConfig(name="none"),
    )
    cfg.trainer.devices = dist.get_world_size() if dist.is_initialized() else 1
    cfg.model.global_batch_size = 64 * cfg.trainer.devices
    check_config(cfg)
    return cfg


def make_policy(cfg: RunConfig, model: str) -> Policy:
    """The model of a Hugging Face folder, or, for "experts", EXPERTS at random."""
    platform = select_platform(Accelerator.auto)
    arch = EXPERTS if model == "experts" else read_architecture(Path(model))
    cfg.export.hf = False
    check_architecture(cfg, arch)
    layout = parallel.initialize(cfg, platform)
    policy = Policy(arch, cfg.model, cfg.trainer.precision, platform, layout)
    random = model == "experts"
    fill_policy(policy, RandomSource(arch, 0) if random else HuggingFaceSource(Path(model), arch))
    return policy


@contextlib.contextmanager
def weights_kept(policy: Policy) -> Iterator[list[torch.nn.Parameter]]:
    """The weights may be changed inside the block and are put back after it."""
    parameters = list(policy.module.parameters())
    with torch.no_grad():
        kept = [p.detach().clone() for p in parameters]
        yield parameters
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)


def save_gradients(policy: Policy, folder: Path) -> None:
    """The gradients in the weights' places, as global tensors."""
    with weights_kept(policy) as parameters:
        for p in parameters:
            p.copy_(p.main_grad)
        save_state(folder, policy.sharded_state_dict())


def exercise(policy: Policy, out: Path, first: Path) -> None:
    layout = policy.layout
    weights = WeightSets(policy)
    engine = embedded_engine(policy, frozenset({2}), 4, weights)
    rows = make_rows()
    both = sequences_of(rows, paired=True)
    scored = policy.score(both)
    average(weights, out, first)
    with weights.using(WeightSet.EMA):
        averaged = policy.score(both)
    sets = (WeightSet.POLICY, WeightSet.EMA)
    found = {
        "generated": [generate(engine, name) for name in sets],
        "labels": [label_scores(engine, name) for name in sets],
        "scores": [scored.sums.tolist(), averaged.sums.tolist()],
        "token_logprobs": response_token_logprobs(policy, both),
        "losses": {},
        "tokens": {},
        "norms": [],
    }
    for name, objective in OBJECTIVES.items():
        batches = micro_batches(
            rows,
            list(range(ROWS)),
            replica=layout.data_rank,
            num_replicas=layout.data_size,
            rule=policy.packing_rule(MICRO_BATCH),
            paired=objective.paired,
            prompt_targets=name == "orpo",
        )
        metrics = policy.train_batch(batches, objective, step_inputs(objective, rows, scored))
        tokens_computed = metrics.pop("tokens")
        found["losses"][name] = metrics
        found["tokens"][name] = tokens_computed
        if not policy.config.use_distributed_optimizer:  # a rank then has only its share of them
            save_gradients(policy, out / f"grad-{name}")
    optimizer = PolicyOptimizer(policy, OptimConfig(lr=1e-3), clip_grad=0.5)
    optimizer.step()
    found["norms"].append(optimizer.grad_norm)
    save_state(out / "stepped", policy.sharded_state_dict())
    if layout.is_main:
        (out / "found.json").write_text(json.dumps(found))


def step_inputs(
    objective: Objective, rows: list[PreferencePair], scored: SequenceLogps
) -> StepInputs:
    """Passes other than the policy, so that h and the rewards are not zero."""
    passes = {}
    for name in objective.passes - {Pass.POLICY}:
        chosen, rejected = (scored.sums.float() + SHIFTS[name]).chunk(2)
        passes[name] = PassLogps(chosen=chosen, rejected=rejected)
    return StepInputs(torch.tensor([r.strength for r in rows]), passes)


def average(weights: WeightSets, folder: Path, read_from: Path) -> None:
    """Keep an EMA while the policy moves, write it, and go on with the one another layout wrote.

    The policy moves by a rule that no layout rounds differently, so the EMA must be the same.
    """
    policy = weights.policy
    weights.take(WeightSet.EMA, WeightSet.POLICY)
    with weights_kept(policy) as parameters:
        torch._foreach_mul_(parameters, 0.5)
        weights.average(alpha=0.25)
    save_state(folder / "ema", weights.sharded_state_dict(WeightSet.EMA))
    parallel.barrier()
    reader = ShardReader(read_from / "ema")
    weights.fill(WeightSet.EMA, lambda state: load_state(reader, state), version=1)
    save_state(folder / "ema-read", weights.sharded_state_dict(WeightSet.EMA))


def make_prompts() -> list[TokenIds]:
    g = torch.Generator().manual_seed(1)
    return [tokens(4 + i % 5, g) for i in range(11)]


def generate(engine: EmbeddedEngine, weights: WeightSet) -> list[list[int]]:
    requests = [GenerationRequest(str(i), ids, seed=i) for i, ids in enumerate(make_prompts())]
    found = engine.generate(requests, SamplingParams(12, 0.8, 0.95), weights)
    return [list(c.token_ids) for c in found]


def label_scores(engine: EmbeddedEngine, weights: WeightSet) -> list[list[float]]:
    """The labels' log-probs and the best after each prompt."""
    found = engine.label_scores(make_prompts(), LABELS, weights)
    return [[*score.logprobs, score.best] for score in found]


def main() -> None:
    model, out, *layouts = sys.argv[1:]
    platform = select_platform(Accelerator.auto)
    parallel.join(platform)
    for text in layouts:
        folder = Path(out) / text
        folder.mkdir(parents=True, exist_ok=True)
        exercise(make_policy(config(text), model), folder, Path(out) / layouts[0])
        parallel.leave_layout()
    parallel.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
