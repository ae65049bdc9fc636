"""Checkpoints of ours: a folder of safetensors and JSON, readable under any parallel layout.

checkpoint.json   format, architecture, adapters, weight version
weights/          global tensors in shards, one file a rank
tokenizer/        a Hugging Face tokenizer folder (weights checkpoints)
optimizer/        the same for the optimizer (checkpoints within a stage)
lightning.json    loop counters and learning-rate schedule (likewise)
copies/           the EMA and a moved reference (likewise, where the stage has them)
rollouts/         what an online stage keeps between steps, such as a replay buffer (likewise)
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nemo_selfpref.checkpoint.lora import MergedSource, check_same_adapters
from nemo_selfpref.checkpoint.sharded import (
    ShardReader,
    TensorSource,
    load_state,
    read_common,
    save_state,
)
from nemo_selfpref.config.model_schema import ArchitectureConfig, LoRAConfig, RopeScalingConfig
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError
from nemo_selfpref.files import publish_folder, read_json, write_json
from nemo_selfpref.megatron.optim import PolicyOptimizer
from nemo_selfpref.megatron.parallel import barrier
from nemo_selfpref.megatron.policy import Policy

FORMAT = "nemo_selfpref"
FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
_KEPT_FROM_LIGHTNING = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "loops",
    "lr_schedulers",
)


def is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """checkpoint.json, checked.

    Raises:
        CheckpointError: not a checkpoint of ours, or of a newer format.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT or manifest.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r} version "
            f"{manifest.get('version')!r}; expected {FORMAT!r} version {FORMAT_VERSION}"
        )
    return manifest


def architecture_of(folder: Path) -> ArchitectureConfig:
    fields = dict(read_manifest(folder)["architecture"])
    return ArchitectureConfig(
        **{**fields, "rope_scaling": RopeScalingConfig(**fields["rope_scaling"])}
    )


def lora_of(folder: Path) -> LoRAConfig:
    """The adapters of a checkpoint; rank 0 if it has none."""
    return LoRAConfig(**(read_manifest(folder).get("lora") or {}))


def weights_of(folder: Path) -> ShardReader:
    """The weights of a checkpoint as they are, checksums verified."""
    read_manifest(folder)
    return ShardReader(folder / "weights")


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


class _CollectiveFolder:
    """A folder that all ranks write and rank 0 publishes under its final name."""

    def __init__(self, target: Path, is_main: bool) -> None:
        self.target, self.is_main = target, is_main
        self.temporary = target.with_name(f".{target.name}.tmp")

    def __enter__(self) -> Path:
        if self.is_main:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(parents=True)
        barrier()
        return self.temporary

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            return
        barrier()
        if self.is_main:
            publish_folder(self.temporary, self.target)
        barrier()


def save_weights(target: Path, policy: Policy, tokenizer: ChatTokenizer) -> None:
    """Write the policy's weights with its tokenizer. Collective."""
    with _CollectiveFolder(target, policy.layout.is_main) as folder:
        save_state(folder / "weights", policy.sharded_state_dict(), policy.platform.device())
        if policy.layout.is_main:
            tokenizer.save_pretrained(str(folder / "tokenizer"))
            _write_manifest(folder, policy)


def save_training(
    target: Path,
    policy: Policy,
    optimizer: PolicyOptimizer,
    lightning: dict[str, Any],
    save_more: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write weights, optimizer, Lightning's counters and what `save_more` writes. Collective."""
    device = policy.platform.device()
    with _CollectiveFolder(target, policy.layout.is_main) as folder:
        save_state(folder / "weights", policy.sharded_state_dict(), device)
        save_state(folder / "optimizer", {"optimizer": optimizer.sharded_state_dict()}, device)
        save_more(folder)
        if policy.layout.is_main:
            kept = {name: lightning[name] for name in _KEPT_FROM_LIGHTNING}
            write_json(folder / "lightning.json", kept)
            _write_manifest(folder, policy)


def _write_manifest(folder: Path, policy: Policy) -> None:
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "architecture": asdict(policy.arch),
            "lora": asdict(policy.config.lora) if policy.config.lora.rank else None,
            "weight_version": policy.weight_version,
            "precision": policy.precision.value,
        },
    )


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
    policy.weight_version = int(read_manifest(folder)["weight_version"])


def load_training(folder: Path, policy: Policy) -> dict[str, Any]:
    """Read weights into the policy; returns what Lightning restores its loops from."""
    load_weights(folder, policy)
    saved = read_json(folder / "lightning.json")
    return {**saved, "state_dict": {}, "optimizer_states": [{}], "callbacks": {}}


def load_optimizer(folder: Path, optimizer: PolicyOptimizer) -> None:
    """Read the optimizer's state, whatever layout wrote it."""
    state = {"optimizer": optimizer.sharded_state_dict(is_loading=True)}
    common = read_common(folder / "optimizer")
    loaded = load_state(ShardReader(folder / "optimizer"), state, common)
    with torch.no_grad():
        optimizer.load_sharded(loaded["optimizer"])
