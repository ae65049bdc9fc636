"""The tiny random model of the self-test, in the layout of a configuration or on one process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_selfpref.checkpoint.hf_weights import RandomSource
from nemo_selfpref.checkpoint.lora import FreshAdapters
from nemo_selfpref.checkpoint.training_state import fill_policy
from nemo_selfpref.config.checks import check_architecture, check_config
from nemo_selfpref.config.model_schema import (
    ArchitectureConfig,
    ModelConfig,
    OptimConfig,
    Recompute,
    TokenizerConfig,
)
from nemo_selfpref.config.schema import AlgorithmConfig, DataConfig, RunConfig
from nemo_selfpref.data.batching import sequences_of
from nemo_selfpref.data.packing import micro_batches
from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.platform import select_platform
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.objectives.inputs import PassLogps, StepInputs
from nemo_selfpref.objectives.objective import Pass
from nemo_selfpref.objectives.vectors import FIRST_STEP
from nemo_selfpref.types import PreferencePair, TokenIds

STOP_IDS = frozenset({0})
"""The tokenizer's only special token."""
_BYTES = 256
_VOCAB = 512
_SEED = 7
_ROWS = 13
"""Pairs of unlike lengths; more than this on many processes. No layout divides them evenly."""
_TEMPLATE = "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"


def tiny_config(cfg: RunConfig) -> RunConfig:
    """The configuration with a tiny random model and no data; layout, precision, kernels, adapters
    and rollouts are as they were.

    Raises:
        ConfigError: contradictions in what is left.
    """
    model = replace(
        cfg.model,
        restore_from_path=None,
        architecture=tiny_architecture(cfg.model),
        tokenizer=TokenizerConfig(),
        reference_cache_dir=None,
        reference_cache_max_gb=0.0,
    )
    tiny = replace(
        cfg,
        name="selftest",
        model=model,
        data=DataConfig(train_path=[], max_length=64, max_prompt_length=32),
        algorithm=AlgorithmConfig(name="selftest"),
    )
    check_config(tiny)
    check_architecture(tiny, model.architecture)
    return tiny


def tiny_architecture(model: ModelConfig) -> ArchitectureConfig:
    """A shape that the layout divides, in sizes that FP8's blocks and vLLM's heads allow; with
    experts where the configuration splits or names some."""
    tensor, experts = model.tensor_model_parallel_size, model.expert_model_parallel_size
    mixed = experts > 1 or model.architecture.num_moe_experts > 0
    parts = model.pipeline_model_parallel_size * (model.virtual_pipeline_model_parallel_size or 1)
    return ArchitectureConfig(
        num_layers=2 * parts,
        hidden_size=128,
        ffn_hidden_size=128 * tensor,
        num_attention_heads=4 * tensor,
        num_query_groups=2 * tensor,
        kv_channels=32,
        vocab_size=_VOCAB,
        max_position_embeddings=256,
        init_method_std=0.1,
        num_moe_experts=2 * max(experts, 2) if mixed else 0,
    )


def plain_config(tiny: RunConfig) -> RunConfig:
    """The same model on one process, packed and computed in the simplest way."""
    plain = replace(
        tiny.model,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        sequence_parallel=False,
        use_distributed_optimizer=False,
        recompute_granularity=Recompute.none,
        share_prompts=False,
        micro_batch_size=1,
        micro_batch_tokens=None,
    )
    return replace(tiny, model=plain, trainer=replace(tiny.trainer, devices=1, num_nodes=1))


def build(cfg: RunConfig) -> Policy:
    """This rank's part of the tiny model; every layout starts from the same weights. Collective."""
    platform = select_platform(cfg.trainer.accelerator)
    layout = parallel.initialize(cfg, platform)
    arch, lora = cfg.model.architecture, cfg.model.lora
    policy = Policy(arch, cfg.model, cfg.trainer.precision, platform, layout)
    source = RandomSource(arch, cfg.seed)
    fill_policy(policy, FreshAdapters(source, arch, lora, cfg.seed) if lora.rank else source)
    return policy


def make_rows(count: int) -> list[PreferencePair]:
    """Random pairs, of unlike lengths, the same everywhere."""
    g = torch.Generator().manual_seed(_SEED)

    def tokens(length: int) -> TokenIds:
        return tuple(torch.randint(1, _BYTES, (length,), generator=g).tolist())

    return [
        PreferencePair(str(i), tokens(5 + i % 7), tokens(9 + i % 5), tokens(3 + i % 11))
        for i in range(count)
    ]


@dataclass(frozen=True)
class Answer:
    """What one step says: loss, metrics and gradient norm by name, and each answer's log-prob."""

    metrics: Mapping[str, float]
    logps: Sequence[float]


class TinyTraining:
    """The tiny model, its optimizer and one batch of rows."""

    def __init__(self, cfg: RunConfig, world_size: int) -> None:
        self.cfg, self.policy = cfg, build(cfg)
        self.optimizer = PolicyOptimizer(self.policy, OptimConfig(lr=1e-3), clip_grad=1.0)
        self.rows = make_rows(max(_ROWS, 3 * world_size + 1))
        self.sequences = sequences_of(self.rows, paired=True)

    def train_batch(self, reference: PassLogps) -> dict[str, float]:
        """Forward and backward over all rows. Collective; equal on every rank."""
        layout = self.policy.layout
        batches = micro_batches(
            self.rows,
            list(range(len(self.rows))),
            replica=layout.data_rank,
            num_replicas=layout.data_size,
            rule=self.policy.packing_rule(self.cfg.model.micro_batch_size),
            paired=True,
        )
        inputs = StepInputs(torch.ones(len(self.rows)), {Pass.REFERENCE: reference})
        metrics = self.policy.train_batch(batches, FIRST_STEP, inputs)
        metrics.pop("tokens")  # shared prompts count once
        return metrics

    def own_reference(self) -> PassLogps:
        """The policy as its own reference: what it is at the first step."""
        chosen, rejected = self.policy.score(self.sequences).sums.float().chunk(2)
        return PassLogps(chosen=chosen, rejected=rejected)

    def answer(self) -> Answer:
        """Scores, and one step against a reference that no model made. Collective."""
        scores = self.policy.score(self.sequences)
        lengths = torch.tensor([len(answer) for _, answer in self.sequences])
        # Near those of an even choice among all tokens, so that no sigmoid is flat.
        fixed = -math.log(_VOCAB) * lengths + 3.0 * torch.sin(torch.arange(len(lengths)))
        chosen, rejected = fixed.float().chunk(2)
        metrics = self.train_batch(PassLogps(chosen=chosen, rejected=rejected))
        self.optimizer.step()
        named = {**metrics, "gradient norm": self.optimizer.grad_norm}
        return Answer(named, scores.sums.tolist())


def one_process_answer(cfg: RunConfig, world_size: int) -> Answer:
    """The answer of this process alone, before it joins the others."""
    platform = select_platform(cfg.trainer.accelerator)
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(platform.backend, store=store, rank=0, world_size=1)
    try:
        return TinyTraining(plain_config(cfg), world_size).answer()
    finally:
        parallel.shutdown()


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer for the tiny model, in a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<|end|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_TEMPLATE,
        eos_token="<|end|>",
        pad_token="<|end|>",
    )
    fast.save_pretrained(str(folder))
    return folder
