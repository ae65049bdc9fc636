"""The cheapest change of settings with which a run fits into memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_selfpref.config.checks import check_architecture, check_config
from nemo_selfpref.config.model_schema import ArchitectureConfig, OptimizerName, Recompute
from nemo_selfpref.config.schema import Placement, RolloutEngineName, RunConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.training.plan_hardware import Device
from nemo_selfpref.training.plan_memory import StageMemory, stage_memory
from nemo_selfpref.training.plan_method import Method
from nemo_selfpref.training.plan_weights import sizes_of

_COSTS = {
    "model.use_distributed_optimizer": 0.5,
    "model.logprob_chunk_size": 0.6,
    "model.micro_batch_size": 1.0,
    "model.micro_batch_tokens": 1.0,
    "rollout.batch_size": 1.0,
    "rollout.placement": 2.0,
    "model.copies_on_cpu": 3.0,
    "model.tensor_model_parallel_size": 5.0,
    "model.recompute_granularity": 6.0,
    "model.pipeline_model_parallel_size": 7.0,
}
"""What one step of each change costs beside the others: a rough order of time lost, no seconds."""
_MOST_NODES = 64


@dataclass(frozen=True)
class Change:
    """Settings that make a run fit, and what the worst rank then takes."""

    settings: dict[str, Any]
    memory: StageMemory


def world_of(cfg: RunConfig) -> int:
    return cfg.trainer.devices * cfg.trainer.num_nodes


def worst_rank(
    cfg: RunConfig, arch: ArchitectureConfig, method: Method, device: Device
) -> StageMemory:
    """The fullest rank: of the first stage, which has the embedding and most micro-batches under
    way, or of the last, which has the log-prob head."""
    sizes = sizes_of(cfg.model, world_of(cfg))
    stages = {0, sizes.pipeline - 1}
    found = [stage_memory(cfg, arch, sizes, method, stage, device) for stage in sorted(stages)]
    return max(found, key=lambda memory: memory.total)


def cheapest_fit(
    cfg: RunConfig, arch: ArchitectureConfig, method: Method, device: Device
) -> Change | None:
    """The cheapest settings that fit, on as few devices as will do; None where none were found."""
    for devices, nodes in _worlds(cfg):
        base: dict[str, Any] = {}
        if devices != cfg.trainer.devices:
            base["trainer.devices"] = devices
        if nodes != cfg.trainer.num_nodes:
            base["trainer.num_nodes"] = nodes
        ladders = list(_ladders(cfg, arch, devices, devices * nodes, method))

        def fits(settings: dict[str, Any]) -> StageMemory | None:
            made = _valid(cfg, arch, {**base, **settings})  # noqa: B023 (used in this turn alone)
            memory = None if made is None else worst_rank(made, arch, method, device)
            return memory if memory is not None and memory.total <= device.memory else None

        for settings in _by_cost(ladders, fits):
            if (memory := fits(settings)) is not None:
                return Change({**base, **settings}, memory)
    return None


def _worlds(cfg: RunConfig) -> Iterator[tuple[int, int]]:
    devices, nodes = cfg.trainer.devices, cfg.trainer.num_nodes
    yield devices, nodes
    while devices < 8 and nodes == 1:
        devices = min(devices * 2, 8)
        yield devices, nodes
    while nodes * 2 <= _MOST_NODES:
        nodes *= 2
        yield devices, nodes


Ladder = tuple[str, list[Any]]
"""A setting's name and values: as it is now, then what takes less and less memory."""
_LAYOUT = ("model.tensor_model_parallel_size", "model.pipeline_model_parallel_size")


def _by_cost(
    ladders: list[Ladder], fits: Callable[[dict[str, Any]], StageMemory | None]
) -> list[dict[str, Any]]:
    """Mixtures of changes, the cheapest first; none of a layout that does not fit with everything
    else at its least."""
    found = []
    layouts = [ladder for ladder in ladders if ladder[0] in _LAYOUT]
    others = [ladder for ladder in ladders if ladder[0] not in _LAYOUT]
    least = [len(values) - 1 for _, values in others]
    for steps in itertools.product(*(range(len(values)) for _, values in layouts)):
        if fits(_settings([*others, *layouts], [*least, *steps])) is None:
            continue
        for more in itertools.product(*(range(len(values)) for _, values in others)):
            chosen, numbers = [*others, *layouts], [*more, *steps]
            pairs = zip(chosen, numbers, strict=True)
            cost = sum(_COSTS[name] * n for (name, _), n in pairs)
            found.append((cost, _settings(chosen, numbers)))
    return [settings for _, settings in sorted(found, key=lambda item: item[0])]


def _settings(ladders: Sequence[Ladder], steps: Sequence[int]) -> dict[str, Any]:
    made = {name: values[n] for (name, values), n in zip(ladders, steps, strict=True) if n}
    if "model.tensor_model_parallel_size" in made:
        made["model.sequence_parallel"] = True
    return made


def _ladders(
    cfg: RunConfig, arch: ArchitectureConfig, devices: int, world: int, method: Method
) -> Iterator[Ladder]:
    """Each setting that may be changed."""
    m, rollout = cfg.model, cfg.rollout
    if not m.use_distributed_optimizer and m.optim.name is OptimizerName.adamw:
        yield "model.use_distributed_optimizer", [False, True]
    if m.logprob_chunk_size > 256:
        yield "model.logprob_chunk_size", [m.logprob_chunk_size, 256]
    if m.micro_batch_tokens is None:
        yield "model.micro_batch_size", _halves(m.micro_batch_size, 1)
    else:
        yield "model.micro_batch_tokens", _halves(m.micro_batch_tokens, 2 * cfg.data.max_length)
    if method.before.answers or any(t.in_step.answers for t in method.trainings):
        if rollout.engine is RolloutEngineName.embedded:
            yield "rollout.batch_size", _halves(rollout.batch_size, 8)
        elif rollout.placement is Placement.colocated:
            yield "rollout.placement", [Placement.colocated, Placement.disaggregated]
    if not m.copies_on_cpu and any(t.copies for t in method.trainings):
        yield "model.copies_on_cpu", [False, True]
    tensor, pipeline = m.tensor_model_parallel_size, m.pipeline_model_parallel_size
    yield "model.tensor_model_parallel_size", _doubles(tensor, devices)
    if m.recompute_granularity is not Recompute.full:
        yield "model.recompute_granularity", [m.recompute_granularity, Recompute.full]
    most = max(world // tensor, 1)
    stages = [n for n in range(pipeline + 1, most + 1) if arch.num_layers % n == 0]
    yield "model.pipeline_model_parallel_size", [pipeline, *stages]


def _halves(value: int, least: int) -> list[Any]:
    found = [value]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found


def _doubles(value: int, most: int) -> list[Any]:
    found = [value]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found


def changed(cfg: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The configuration with some settings, named by their dotted keys, set anew."""
    result = copy.deepcopy(cfg)
    for key, value in settings.items():
        *path, last = key.split(".")
        place: Any = result
        for name in path:
            place = getattr(place, name)
        setattr(place, last, value)
    return result


def _valid(cfg: RunConfig, arch: ArchitectureConfig, settings: dict[str, Any]) -> RunConfig | None:
    """The changed configuration, where the checks let it pass."""
    result = changed(cfg, settings)
    checks: list[Callable[[], None]] = [
        lambda: check_config(result),
        lambda: check_architecture(result, arch),
    ]
    try:
        for check in checks:
            check()
    except ConfigError:
        return None
    return result
