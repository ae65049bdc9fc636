"""How an engine process is to run: written by whoever starts it, read once at its start."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nemo_selfpref.rollout.serving.wire import Record, Sha256, Token


class EngineSpec(Record):
    """One engine. Paths are of its own machine."""

    model: str
    """Hugging Face folder the engine starts from."""
    weights_dir: str
    """New weights may come from folders below this one only."""
    weight_sets: Annotated[list[str], Field(min_length=1)]
    """Which sets it answers for. More than one share its memory and are swapped in turn."""
    stop_ids: list[Token]
    tokenizer_sha256: Sha256
    dtype: Literal["float32", "bfloat16"]
    max_length: Annotated[int, Field(ge=2)]
    max_num_seqs: Annotated[int, Field(ge=1)] = 256
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    kv_cache_bytes: Annotated[int, Field(ge=2**20)] | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    enable_sleep_mode: bool = False
    seed: int = 0
    device: Literal["cpu", "cuda"]
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, lt=65536)] = 0
    """0: any free one; the process says which in its ready_file."""
    ready_file: str
    token_file: str
