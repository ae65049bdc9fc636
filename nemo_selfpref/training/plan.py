"""`selfpref plan`: what a run will need, before it is started: memory, time, disk.

No device is asked and no weights are read; the model's shape comes from model.architecture or from
the files beside the weights. Everything is arithmetic, and says what it assumes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_selfpref.algorithms.base import Algorithm, algorithms
from nemo_selfpref.config.checks import check_architecture, check_config
from nemo_selfpref.config.loader import load_config, to_typed
from nemo_selfpref.config.model_schema import ArchitectureConfig
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.training.plan_costs import Rates
from nemo_selfpref.training.plan_fit import Change, changed, cheapest_fit, world_of, worst_rank
from nemo_selfpref.training.plan_hardware import Device, device_of
from nemo_selfpref.training.plan_memory import StageMemory, snapshot_bytes
from nemo_selfpref.training.plan_method import Method, Training, sketch_method
from nemo_selfpref.training.plan_time import (
    RunTime,
    StepTime,
    checkpoint_bytes,
    run_time,
    step_time,
)
from nemo_selfpref.training.plan_weights import sizes_of
from nemo_selfpref.training.session import find_architecture

MOST_DEVICES = 512
_ROWS = 10_000
_MFU = 0.4


@dataclass(frozen=True)
class Scaled:
    """A step of the longest stage on so many devices."""

    devices: int
    replicas: int
    batch: int
    raised: bool
    """Whether the batch had to grow for every replica to have a micro-batch."""
    step: StepTime


@dataclass(frozen=True)
class Plan:
    """What a run needs, and what was assumed."""

    cfg: RunConfig
    arch: ArchitectureConfig
    device: Device
    method: Method
    rates: Rates
    assumed: tuple[str, ...]
    """What was not given, in words."""
    notes: tuple[str, ...]
    """What `selfpref train` would still refuse."""
    memory: StageMemory
    change: Change | None
    """The cheapest settings that fit, where the run as it is does not."""
    snapshot: int
    checkpoint: int
    time: RunTime
    scaling: tuple[Scaled, ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.device.memory

    @property
    def checkpoint_s(self) -> float:
        return self.checkpoint / self.rates.disk


def plan(args: argparse.Namespace) -> int:
    """Print the plan of a configuration; 0 if it fits into memory, else 1.

    Raises:
        ConfigError: settings that contradict each other, or a layout that does not divide the
            model.
    """
    from nemo_selfpref.training.plan_report import show, to_json

    made = make_plan(plan_config(args.config_name, args.overrides, args.config_dir), args)
    (to_json if args.json else show)(made)
    return 0 if made.fits else 1


def plan_config(name: str, overrides: Sequence[str], config_dir: Path | None) -> DictConfig:
    """The configuration, without data where none is given: rows are a number here.

    Raises:
        ConfigError: as for training, but for files that are not there yet.
    """
    schemas = {name: algorithm.config_class for name, algorithm in algorithms().items()}
    cfg = load_config(name, overrides, schemas, config_dir, allow_missing=True)
    if OmegaConf.is_missing(cfg.data, "train_path"):
        cfg.data.train_path = []
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"no value for {', '.join(missing)}. Give one: {missing[0]}=...")
    return cfg


def make_plan(cfg: DictConfig, args: argparse.Namespace) -> Plan:
    """The plan of a configuration; `args` are the command's.

    Raises:
        ConfigError: see `plan`.
    """
    typed = to_typed(cfg)
    _check_numbers(args)
    check_config(typed)
    folder = Path(typed.model.restore_from_path) if typed.model.restore_from_path else None
    arch = find_architecture(typed, folder)
    check_architecture(typed, arch)
    rates, assumed = _rates(typed, args)
    algorithm = algorithms()[typed.algorithm.name](typed.algorithm)
    method = sketch_method(algorithm, typed, rates.prompt_tokens, rates.answer_tokens)
    if not method.trainings:
        raise ConfigError(f"algorithm.name={typed.algorithm.name} trains nothing: nothing to plan")
    device = device_of(args.gpu, typed.trainer.devices, args.peak_tflops)
    memory = worst_rank(typed, arch, method, device)
    fits = memory.total <= device.memory
    return Plan(
        cfg=typed,
        arch=arch,
        device=device,
        method=method,
        rates=rates,
        assumed=assumed,
        notes=_notes(typed, algorithm),
        memory=memory,
        change=None if fits else cheapest_fit(typed, arch, method, device),
        snapshot=max(
            snapshot_bytes(typed, arch, method, stage)
            for stage in {0, typed.model.pipeline_model_parallel_size - 1}
        ),
        checkpoint=checkpoint_bytes(typed, arch, method),
        time=run_time(typed, arch, method, device, rates),
        scaling=_scaling(typed, arch, method, device, rates),
    )


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("rows", "prompt_tokens", "answer_tokens", "tokens_per_second", "peak_tflops"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected a positive number")
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise ConfigError(f"--mfu {args.mfu}: expected a share of the peak, above 0 and at most 1")
    if not 0 < args.disk_gbs < math.inf:
        raise ConfigError(f"--disk-gbs {args.disk_gbs}: expected a positive number")


def _rates(cfg: RunConfig, args: argparse.Namespace) -> tuple[Rates, tuple[str, ...]]:
    """The numbers of the command, and what stands in for those not given."""
    d, assumed = cfg.data, []
    prompt, answer, rows = args.prompt_tokens, args.answer_tokens, args.rows
    if prompt is None:
        prompt = max(d.max_prompt_length // 2, 1)
        assumed.append(f"prompts of {prompt} tokens in the mean (--prompt-tokens)")
    if answer is None:
        answer = max(min(cfg.rollout.max_new_tokens, d.max_length - d.max_prompt_length) // 2, 2)
        assumed.append(f"answers of {answer} tokens in the mean (--answer-tokens)")
    if prompt + answer > d.max_length:
        raise ConfigError(
            f"prompts of {prompt} and answers of {answer} tokens in the mean pass "
            f"data.max_length={d.max_length}. Lower --prompt-tokens or --answer-tokens."
        )
    if rows is None:
        rows = _count_rows(cfg)
        if rows is None:
            rows = d.limit or _ROWS
            assumed.append(f"{rows:,} rows of data (--rows)")
    mfu = args.mfu
    if mfu is None:
        mfu = _MFU
        assumed.append(f"{mfu:.0%} of the device's peak reached in training (--mfu)")
    if args.tokens_per_second is None:
        assumed.append(
            "sampling as fast as half the memory's bandwidth reads weights and keys "
            "(--tokens-per-second, of one device)"
        )
    assumed.append(f"a disk that takes {args.disk_gbs:g} GB/s (--disk-gbs)")
    speed = args.tokens_per_second
    return Rates(rows, prompt, answer, mfu, speed, args.disk_gbs * 1e9), tuple(assumed)


def _count_rows(cfg: RunConfig) -> int | None:
    """Rows of the data files, where all are there and have a row a line."""
    paths = [Path(path) for path in cfg.data.train_path]
    if not paths or not all(p.suffix == ".jsonl" and p.is_file() for p in paths):
        return None
    count = 0
    for path in paths:
        with path.open("rb") as lines:
            count += sum(1 for line in lines if line.strip())
    return max(min(count, cfg.data.limit or count), 1)


def _notes(cfg: RunConfig, algorithm: Algorithm) -> tuple[str, ...]:
    notes = [] if cfg.data.train_path else ["data.train_path has still to be given"]
    notes += [
        f"data.train_path: {path} does not exist"
        for path in cfg.data.train_path
        if not Path(path).exists()
    ]
    try:
        algorithm.check(cfg)
    except ConfigError as error:
        notes.append(str(error))
    return tuple(notes)


def longest_stage(time: RunTime) -> int:
    """Number of the stage that takes most of the run."""
    spent = [s.seconds * s.steps * s.epochs for s in time.stages]
    return spent.index(max(spent))


def _scaling(
    cfg: RunConfig, arch: ArchitectureConfig, method: Method, device: Device, rates: Rates
) -> tuple[Scaled, ...]:
    """The longest stage's step on more and more devices: replicas are added, nothing else."""
    training = method.trainings[longest_stage(run_time(cfg, arch, method, device, rates))]
    found, devices, world = [], cfg.trainer.devices, world_of(cfg)
    while world <= max(MOST_DEVICES, world_of(cfg)):
        grown = world // devices if world % devices == 0 else 1
        if device.is_gpu and cfg.trainer.num_nodes == 1 and devices < 8 and world <= 8:
            larger = changed(cfg, {"trainer.devices": world, "trainer.num_nodes": 1})
        elif device.is_gpu and devices < 8 and world % 8 == 0:
            larger = changed(cfg, {"trainer.devices": 8, "trainer.num_nodes": world // 8})
        else:
            larger = changed(cfg, {"trainer.num_nodes": grown})
        found.append(_scaled(larger, arch, training, device, rates))
        world *= 2
    return tuple(found)


def _scaled(
    cfg: RunConfig, arch: ArchitectureConfig, training: Training, device: Device, rates: Rates
) -> Scaled:
    sizes, m = sizes_of(cfg.model, world_of(cfg)), cfg.model
    least = sizes.replicas * (1 if m.micro_batch_tokens else m.micro_batch_size)
    if training.online:  # a batch of prompts makes so many rows each
        least = math.ceil(least / max(training.rows, 1e-9))
    batch = max(training.batch, least)
    step = step_time(cfg, arch, replace(training, batch=batch), device, rates)
    return Scaled(sizes.world, sizes.replicas, batch, batch > training.batch, step)
