"""From a configuration to a policy with its tokenizer: the start of every command."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from nemo_selfpref.checkpoint.folders import is_checkpoint, read_facts
from nemo_selfpref.checkpoint.hf_config import read_architecture
from nemo_selfpref.checkpoint.hf_weights import HuggingFaceSource, RandomSource
from nemo_selfpref.checkpoint.lora import FreshAdapters, check_same_adapters
from nemo_selfpref.checkpoint.sharded import TensorSource
from nemo_selfpref.checkpoint.training_state import (
    architecture_of,
    fill_policy,
    lora_of,
    weights_for,
)
from nemo_selfpref.config.checks import check_architecture
from nemo_selfpref.config.model_schema import ArchitectureConfig, LoRAConfig
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer, load_tokenizer
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.megatron import parallel
from nemo_selfpref.megatron.decode import KVDecoder
from nemo_selfpref.megatron.parallel import Layout
from nemo_selfpref.megatron.platform import select_platform
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.rollout.embedded import EmbeddedEngine


@dataclass(frozen=True)
class Start:
    """Where a model starts from, read and checked before any process group is joined."""

    folder: Path | None
    arch: ArchitectureConfig
    tokenizer: ChatTokenizer
    lora: LoRAConfig = field(default_factory=LoRAConfig)


def find_start(cfg: RunConfig) -> Start:
    """The model's shape and tokenizer.

    Raises:
        ConfigError: nothing to start from, a shape the parallel layout cannot split, or a
            checkpoint with other adapters than the run's.
        CheckpointError, DataError: the folder or its tokenizer cannot be used.
    """
    folder = Path(cfg.model.restore_from_path) if cfg.model.restore_from_path else None
    arch = find_architecture(cfg, folder)
    tokenizer = load_tokenizer(cfg.model.tokenizer, tokenizer_folder(folder))
    if tokenizer.vocab_size > arch.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model only {arch.vocab_size}: "
            "they do not belong together"
        )
    check_architecture(cfg, arch)
    if folder is not None and is_checkpoint(folder):
        check_same_adapters(folder, lora_of(folder), cfg.model.lora)
    return Start(folder, arch, tokenizer, cfg.model.lora)


def find_architecture(cfg: RunConfig, folder: Path | None) -> ArchitectureConfig:
    own = cfg.model.architecture
    if folder is None:
        _check_given(own)
        return own
    if own != ArchitectureConfig():
        raise ConfigError(
            "model.architecture is read from model.restore_from_path; set only one of them"
        )
    if is_checkpoint(folder):
        return architecture_of(folder)
    if (folder / "config.json").is_file():
        return read_architecture(folder)
    raise ConfigError(
        f"model.restore_from_path={folder}: expected a Hugging Face folder (config.json and "
        "safetensors) or a checkpoint folder (checkpoint.json)"
    )


def _check_given(arch: ArchitectureConfig) -> None:
    if arch == ArchitectureConfig():
        raise ConfigError(
            "nothing to start from: set model.restore_from_path to a Hugging Face folder or a "
            "checkpoint, or model.architecture to train from random weights"
        )
    sizes = {f.name: getattr(arch, f.name) for f in fields(arch) if f.type == "int"}
    sizes.pop("num_moe_experts")  # 0: a dense model
    wrong = [f"{name}={value}" for name, value in sizes.items() if value < 1]
    if wrong:
        raise ConfigError(
            f"model.architecture: {', '.join(wrong)}; every size of a model trained from random "
            "weights must be given and positive"
        )


def tokenizer_folder(folder: Path | None) -> str | None:
    """Where the tokenizer of a start folder lies."""
    if folder is None:
        return None
    return str(folder / "tokenizer" if is_checkpoint(folder) else folder)


def weights_source(start: Start, seed: int) -> TensorSource:
    """Where the first weights are read from; adapters that are not there begin at no change."""
    folder, fresh = start.folder, start.lora.rank > 0
    if folder is None:
        source: TensorSource = RandomSource(start.arch, seed)
    elif is_checkpoint(folder):
        source = weights_for(folder, start.lora)
        fresh = fresh and not lora_of(folder).rank
    else:
        source = HuggingFaceSource(folder, start.arch)
    return FreshAdapters(source, start.arch, start.lora, seed) if fresh else source


def build_policy(cfg: RunConfig, start: Start) -> tuple[Policy, Layout]:
    """Join the process group and build this rank's part of the model. Collective."""
    platform = select_platform(cfg.trainer.accelerator)
    layout = parallel.initialize(cfg, platform)
    policy = Policy(start.arch, cfg.model, cfg.trainer.precision, platform, layout)
    fill_policy(policy, weights_source(start, cfg.seed))
    if start.folder is not None and is_checkpoint(start.folder):
        policy.weight_version = int(read_facts(start.folder)["weight_version"])
    return policy, layout


def embedded_engine(
    policy: Policy,
    stop_ids: frozenset[int],
    batch_size: int,
    weights: WeightSets | None = None,
) -> EmbeddedEngine:
    """The engine that decodes on this policy's weights, over all its replicas and stages."""
    device, layout = policy.platform.device(), policy.layout
    replicas, stages = parallel.decoder_group(), parallel.pipeline_group()
    number, count = layout.decoder
    return EmbeddedEngine(
        KVDecoder(policy, weights),
        stop_ids=stop_ids,
        max_length=policy.arch.max_position_embeddings,
        batch_size=batch_size,
        replica=number,
        num_replicas=count,
        gather=lambda value: parallel.all_gather_json(value, replicas, device),
        gather_stages=lambda value: parallel.all_gather_json(value, stages, device),
        agree=lambda over: any(parallel.all_gather_json(over, parallel.world_group(), device)),
    )
