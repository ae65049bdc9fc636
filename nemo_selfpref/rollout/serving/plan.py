"""Which engines a configuration asks for."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from nemo_selfpref.config.model_schema import TokenizerConfig
from nemo_selfpref.config.schema import Accelerator, Placement, Precision, RunConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec
from nemo_selfpref.rollout.serving.front_spec import (
    EngineEntry,
    FleetEntry,
    FrontSpec,
    TokenizerEntry,
)

CPU_KV_CACHE_GB = 1.0
INSECURE = ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE")
_FALSE = {"", "0", "false", "no", "off"}


def front_spec_of(
    cfg: RunConfig,
    *,
    model_folder: Path,
    tokenizer_folder: Path,
    stop_ids: Sequence[int],
    tokenizer_sha256: str,
    max_length: int,
    weight_sets: Sequence[str],
    work: Path,
    token_file: Path,
    weights_dir: Path,
) -> FrontSpec:
    """The front of `cfg.rollout.vllm` over engines for these sets of weights.

    Args:
        model_folder: the Hugging Face folder that engines start from.
        tokenizer_folder: what load_tokenizer reads the run's tokenizer from.
        work: takes specs, ready files and logs.

    Raises:
        ConfigError: settings that do not fit together, or an environment that opens vLLM.
    """
    refuse_insecure_environment()
    v, groups = cfg.rollout.vllm, _groups(cfg, weight_sets)
    if v.devices and len(v.devices) != len(groups):
        raise ConfigError(
            f"rollout.vllm.devices has {len(v.devices)} entries for {len(groups)} engines "
            f"({', '.join(groups)}): give one CUDA_VISIBLE_DEVICES for each, or none"
        )
    common = {
        "model": str(model_folder),
        "weights_dir": str(weights_dir),
        "stop_ids": sorted(stop_ids),
        "tokenizer_sha256": tokenizer_sha256,
        "max_length": max_length,
        "token_file": str(token_file),
        **_engine_settings(cfg),
    }
    devices = list(v.devices) or [None] * len(groups)
    return FrontSpec(
        engines=[
            EngineEntry(name=name, spec=_engine(name, held, work, common), devices=own)
            for (name, held), own in zip(groups.items(), devices, strict=True)
        ],
        python=_python(v.python),
        folder=str(work),
        tokenizer=_tokenizer(cfg.model.tokenizer, tokenizer_folder),
        fleet=FleetEntry.of(v),
        host=v.host,
        port=v.port,
        token_file=str(token_file),
        ready_file=str(work / "front.ready.json"),
        weights_dir=str(weights_dir),
    )


def _engine(name: str, held: list[str], work: Path, common: dict[str, Any]) -> EngineSpec:
    own = {"weight_sets": held, "ready_file": str(work / f"{name}.ready.json")}
    return EngineSpec.model_validate({**common, **own})


def _engine_settings(cfg: RunConfig) -> dict[str, Any]:
    """What the configuration itself says of an engine."""
    v, device = cfg.rollout.vllm, device_of(cfg)
    kv_cache_gb = CPU_KV_CACHE_GB if v.kv_cache_gb is None and device == "cpu" else v.kv_cache_gb
    colocated = cfg.rollout.placement is Placement.colocated
    return {
        "dtype": "bfloat16" if cfg.trainer.precision is Precision.bf16 else "float32",
        "max_num_seqs": v.max_num_seqs,
        "tensor_parallel_size": v.tensor_parallel_size,
        "gpu_memory_utilization": v.gpu_memory_utilization,
        "kv_cache_bytes": None if kv_cache_gb is None else round(kv_cache_gb * 2**30),
        "enable_prefix_caching": v.enable_prefix_caching,
        "enforce_eager": v.enforce_eager,
        "enable_sleep_mode": device == "cuda" and colocated,
        "seed": cfg.seed,
        "device": device,
    }


def _tokenizer(config: TokenizerConfig, folder: Path) -> TokenizerEntry:
    template = config.chat_template
    return TokenizerEntry(
        folder=str(folder),
        library=config.library.value,
        chat_template=None if template is None else str(Path(template).resolve()),
    )


def _groups(cfg: RunConfig, weight_sets: Sequence[str]) -> dict[str, list[str]]:
    """Engines by name, and the sets of weights each holds."""
    count = cfg.rollout.vllm.engines_per_set
    if cfg.rollout.placement is Placement.shared:
        return {f"shared-{number}": list(weight_sets) for number in range(count)}
    return {f"{name}-{number}": [name] for name in weight_sets for number in range(count)}


def _python(given: str) -> str:
    """An interpreter is found from the folder the user stands in, a bare name on the path."""
    path = Path(given).expanduser()
    # Not resolved: an environment's interpreter is a link, which must keep its name.
    return str(path.absolute()) if len(path.parts) > 1 else given


def device_of(cfg: RunConfig) -> Literal["cpu", "cuda"]:
    """Where the engines run: as the trainer is told to."""
    wanted = cfg.trainer.accelerator
    gpu = wanted is Accelerator.gpu or (wanted is Accelerator.auto and torch.cuda.is_available())
    return "cuda" if gpu else "cpu"


def refuse_insecure_environment() -> None:
    """Raise ConfigError where a variable would have vLLM run what it is sent."""
    found = [name for name in INSECURE if os.environ.get(name, "").strip().lower() not in _FALSE]
    if found:
        settings = ", ".join(f"{name}={os.environ[name]}" for name in found)
        raise ConfigError(
            f"{settings} would let whoever reaches vLLM run code in it: unset {' '.join(found)}"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def reachable(host: str) -> str:
    """What listens on every address is reached by this machine's own."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)


def exposure_warning(host: str) -> str | None:
    """What to tell whoever lets others reach a server; None where nobody else can."""
    if is_loopback(host):
        return None
    return (
        f"warning: other machines reach rollout.vllm.host={host}. The token is asked for, but the "
        "traffic is not encrypted: prompts, answers, weights and the token itself can be read and "
        "changed on the way. Use a private network only."
    )
