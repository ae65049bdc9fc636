"""Checkpoints of ours: a folder of safetensors and JSON, readable under any parallel layout.

checkpoint.json   format, architecture, adapters, weight version
weights/          global tensors in shards, one file a rank
tokenizer/        a Hugging Face tokenizer folder (weights checkpoints)
optimizer/        the same for the optimizer (checkpoints within a stage)
lightning.json    loop counters and learning-rate schedule (likewise)
copies/           the EMA and a moved reference (likewise, where the stage has them)
rollouts/         what an online stage keeps between steps, such as a replay buffer (likewise)
manifest.json     size and SHA-256 sum of every file (seal.py)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nemo_selfpref.checkpoint.folders import FACTS, FORMAT, FORMAT_VERSION, read_facts
from nemo_selfpref.checkpoint.lora import MergedSource, check_same_adapters
from nemo_selfpref.checkpoint.saver import save_now
from nemo_selfpref.checkpoint.seal import check_file, read_seal
from nemo_selfpref.checkpoint.sharded import (
    INDEX,
    ShardReader,
    TensorSource,
    load_state,
    read_common,
)
from nemo_selfpref.checkpoint.snapshot import Snapshot
from nemo_selfpref.config.model_schema import ArchitectureConfig, LoRAConfig, RopeScalingConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import read_json
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.policy import Policy

WEIGHTS, OPTIMIZER, LIGHTNING = "weights", "optimizer", "lightning.json"
_KEPT_FROM_LIGHTNING = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "loops",
    "lr_schedulers",
)
_KEPT_OF_THE_MODEL = "nonfinite"
"""What the model adds on its own: how many steps in a row were skipped."""


def architecture_of(folder: Path) -> ArchitectureConfig:
    fields = dict(read_facts(folder)["architecture"])
    return ArchitectureConfig(
        **{**fields, "rope_scaling": RopeScalingConfig(**fields["rope_scaling"])}
    )


def lora_of(folder: Path) -> LoRAConfig:
    """The adapters of a checkpoint; rank 0 if it has none."""
    return LoRAConfig(**(read_facts(folder).get("lora") or {}))


def weights_of(folder: Path) -> ShardReader:
    """The weights of a checkpoint as they are, checksums verified."""
    read_facts(folder)
    check_file(folder, f"{WEIGHTS}/{INDEX}", read_seal(folder))
    return ShardReader(folder / WEIGHTS)


def merged_weights_of(folder: Path) -> TensorSource:
    """The weights of a checkpoint as those of a model without adapters, checksums verified."""
    lora, reader = lora_of(folder), weights_of(folder)
    return MergedSource(reader, lora) if lora.rank else reader


def weights_for(folder: Path, lora: LoRAConfig) -> TensorSource:
    """The weights of a checkpoint for a model with these adapters, checksums verified.

    Raises:
        ConfigError: the checkpoint has other adapters.
    """
    check_same_adapters(folder, lora_of(folder), lora)
    return weights_of(folder) if lora.rank else merged_weights_of(folder)


def save_weights(target: Path, policy: Policy, tokenizer: ChatTokenizer) -> None:
    """Write the policy's weights with its tokenizer. Collective.

    Raises:
        CheckpointError: it cannot be written, or a weight is not finite.
    """
    snapshot = Snapshot()
    snapshot.add_state(WEIGHTS, policy.sharded_state_dict())
    snapshot.add_file("tokenizer", lambda path: tokenizer.save_pretrained(str(path)))
    snapshot.add_json(FACTS, _facts(policy))
    save_now(target, snapshot, policy.platform.device())


def take_training(
    policy: Policy,
    optimizer: PolicyOptimizer,
    lightning: Mapping[str, Any],
    save_more: Callable[[Snapshot], None] = lambda snapshot: None,
    metrics: Mapping[str, float] | None = None,
) -> Snapshot:
    """Weights, optimizer, Lightning's counters and what `save_more` adds, as they are now.
    Collective.

    Args:
        metrics: of the step just made, by which the best checkpoints can be kept.
    """
    snapshot = Snapshot()
    snapshot.add_state(WEIGHTS, policy.sharded_state_dict())
    snapshot.add_state(OPTIMIZER, {"optimizer": optimizer.sharded_state_dict()})
    save_more(snapshot)
    kept = {name: lightning[name] for name in _KEPT_FROM_LIGHTNING}
    own = {name: lightning[name] for name in (_KEPT_OF_THE_MODEL,) if name in lightning}
    snapshot.add_json(LIGHTNING, {**kept, **own})
    snapshot.add_json(FACTS, {**_facts(policy), "metrics": dict(metrics or {})})
    return snapshot


def _facts(policy: Policy) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "architecture": asdict(policy.arch),
        "lora": asdict(policy.config.lora) if policy.config.lora.rank else None,
        "weight_version": policy.weight_version,
        "precision": policy.precision.value,
    }


def fill_policy(policy: Policy, source: TensorSource) -> None:
    """Take all of the policy's weights from a source of global tensors."""
    policy.module.load_state_dict(load_state(source, policy.sharded_state_dict()))


def load_weights(folder: Path, policy: Policy) -> None:
    """Read a checkpoint's weights into the policy.

    Raises:
        CheckpointError: damaged, or of another architecture. ConfigError: it has other adapters.
    """
    saved = asdict(architecture_of(folder))
    own = asdict(policy.arch)
    if saved != own:
        differ = ", ".join(
            f"{k}: {saved[k]} there, {own[k]} here" for k in own if saved[k] != own[k]
        )
        raise CheckpointError(f"{folder} is of another architecture ({differ})")
    fill_policy(policy, weights_for(folder, policy.config.lora))
    policy.weight_version = int(read_facts(folder)["weight_version"])


def load_training(folder: Path, policy: Policy) -> dict[str, Any]:
    """Read weights into the policy; returns what Lightning restores its loops from."""
    load_weights(folder, policy)
    saved = read_json(folder / LIGHTNING)
    return {**saved, "state_dict": {}, "optimizer_states": [{}], "callbacks": {}}


def load_optimizer(folder: Path, optimizer: PolicyOptimizer) -> None:
    """Read the optimizer's state, whatever layout wrote it."""
    state = {"optimizer": optimizer.sharded_state_dict(is_loading=True)}
    common = read_common(folder / OPTIMIZER)
    loaded = load_state(ShardReader(folder / OPTIMIZER), state, common)
    with torch.no_grad():
        optimizer.load_sharded(loaded["optimizer"])
