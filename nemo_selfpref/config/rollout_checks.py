"""Contradictions between the settings of rollouts: how to sample, and with which engines."""

from __future__ import annotations

import math
from collections.abc import Iterator

from nemo_selfpref.config.layout_checks import positive
from nemo_selfpref.config.schema import (
    RolloutConfig,
    RolloutEngineName,
    RunConfig,
    WeightTransport,
)

_OF_STARTED = (
    *("python", "port", "host", "devices", "engines_per_set", "tensor_parallel_size"),
    *("max_num_seqs", "gpu_memory_utilization", "kv_cache_gb", "enable_prefix_caching"),
    *("enforce_eager", "also_serve", "max_restarts", "min_engines"),
)
"""Settings of servers that a run starts; others have theirs already."""


def sampling(cfg: RunConfig) -> Iterator[str]:
    r = cfg.rollout
    yield from positive(
        rollout__max_new_tokens=r.max_new_tokens,
        rollout__batch_size=r.batch_size,
        rollout__save_every=r.save_every,
    )
    if r.temperature < 0:
        yield f"rollout.temperature={r.temperature}: expected 0 (greedy) or more"
    if not 0 < r.top_p <= 1:
        yield f"rollout.top_p={r.top_p}: expected 0 < top_p <= 1"
    if r.top_k < 0:
        yield f"rollout.top_k={r.top_k}: expected 0 (off) or more"


def engines(cfg: RunConfig) -> Iterator[str]:
    r, default = cfg.rollout, RolloutConfig()
    if not 0 < r.timeout_s < math.inf:
        yield f"rollout.timeout_s={r.timeout_s}: expected a positive number of seconds"
    if r.check_samples < 0:
        yield f"rollout.check_samples={r.check_samples}: expected 0 (off) or more"
    if not r.logprob_alarm > 0:
        yield f"rollout.logprob_alarm={r.logprob_alarm}: expected a positive number"
    if r.max_staleness < 0:
        yield f"rollout.max_staleness={r.max_staleness}: expected 0 (on-policy) or more"
    if r.engine is RolloutEngineName.embedded:
        for name in ("placement", "timeout_s", "max_staleness", "stale_samples"):
            if getattr(r, name) != getattr(default, name):
                yield f"rollout.{name} does nothing with the embedded engine. Set rollout=vllm too."
        if r.vllm != default.vllm:
            yield "rollout.vllm does nothing with the embedded engine. Set rollout=vllm too."
        return
    yield from _servers(r)


def _servers(r: RolloutConfig) -> Iterator[str]:
    v, default = r.vllm, RolloutConfig().vllm
    yield from positive(
        rollout__vllm__engines_per_set=v.engines_per_set,
        rollout__vllm__tensor_parallel_size=v.tensor_parallel_size,
        rollout__vllm__max_num_seqs=v.max_num_seqs,
        rollout__vllm__suspect_after=v.suspect_after,
        rollout__vllm__min_engines=v.min_engines,
    )
    for name in ("start_timeout_s", "sync_timeout_s", "health_every_s", "gpu_memory_utilization"):
        if not 0 < getattr(v, name) < math.inf:
            yield f"rollout.vllm.{name}={getattr(v, name)}: expected a positive number"
    for name in ("kv_cache_gb", "probe_tolerance"):
        value = getattr(v, name)
        if value is not None and not 0 < value < math.inf:
            yield f"rollout.vllm.{name}={value}: expected a positive number, or null"
    if not 0 <= v.port < 65536:
        yield f"rollout.vllm.port={v.port}: expected 0 (any free one) to 65535"
    if v.gpu_memory_utilization > 1:
        yield f"rollout.vllm.gpu_memory_utilization={v.gpu_memory_utilization}: expected at most 1"
    if v.max_restarts < 0:
        yield f"rollout.vllm.max_restarts={v.max_restarts}: expected 0 or more"
    if v.min_engines > v.engines_per_set:
        yield (
            f"rollout.vllm.min_engines={v.min_engines} is more than "
            f"rollout.vllm.engines_per_set={v.engines_per_set}: the run could never begin"
        )
    if v.transport is not WeightTransport.folder and r.max_staleness:
        yield (
            f"rollout.vllm.transport={v.transport.name} sends weights while the engines are idle; "
            f"with rollout.max_staleness={r.max_staleness} they are not. Use transport=folder, or "
            "max_staleness=0."
        )
    if r.temperature > 2:
        yield f"rollout.temperature={r.temperature}: vLLM samples at 2 at most"
    if not v.urls:
        return
    if r.placement is not RolloutConfig().placement:
        yield "rollout.placement is of servers to be started; rollout.vllm.urls names some"
    if v.token_file is None:
        yield "rollout.vllm.urls needs rollout.vllm.token_file, the file selfpref serve named"
    if v.transport is WeightTransport.folder and v.weights_dir is None:
        yield (
            "rollout.vllm.urls with rollout.vllm.transport=folder needs rollout.vllm.weights_dir, "
            "the folder selfpref serve named; where it cannot be reached, use transport=gloo"
        )
    for name in _OF_STARTED:
        if getattr(v, name) != getattr(default, name):
            yield f"rollout.vllm.{name} is of a server to be started; rollout.vllm.urls names some"
