"""`selfpref train`: configuration in, trained policy and Hugging Face folder out."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from nemo_selfpref.algorithms.base import Algorithm, algorithms
from nemo_selfpref.config.checks import check_config
from nemo_selfpref.config.loader import to_typed
from nemo_selfpref.config.schema import RolloutEngineName, RunConfig
from nemo_selfpref.errors import ConfigError, SelfPrefError
from nemo_selfpref.files import write_json
from nemo_selfpref.monitor.console import SUMMARY_COLUMNS, Console, summary_rows

if TYPE_CHECKING:
    from nemo_selfpref.megatron.policy import Policy
    from nemo_selfpref.training.run import Run
    from nemo_selfpref.training.session import Start
    from nemo_selfpref.training.store import RunFolder


_COMPARE_S = 4 * 3600.0
"""How long the first rank may read the data of a run that goes on; the others wait for it."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run left behind."""

    folder: Path
    checkpoint: Path
    hf: Path | None


def pick_algorithm(cfg: RunConfig) -> Algorithm:
    """The configured algorithm, its settings checked.

    Raises:
        ConfigError: unknown name or contradictory settings.
    """
    known = algorithms()
    if cfg.algorithm.name not in known:
        raise ConfigError(
            f"algorithm.name={cfg.algorithm.name!r}: expected one of {', '.join(known)}"
        )
    algorithm = known[cfg.algorithm.name](cfg.algorithm)
    algorithm.check(cfg)
    return algorithm


def check_before_work(cfg: DictConfig) -> RunConfig:
    """Everything that can be refused without a model: settings, data paths, folders."""
    typed = to_typed(cfg)
    check_config(typed)
    _check_engines(typed, pick_algorithm(typed))
    for path in typed.data.train_path:
        if not Path(path).exists():
            raise ConfigError(f"data.train_path: {path} does not exist")
    return typed


def _check_engines(cfg: RunConfig, algorithm: Algorithm) -> None:
    """Refuse servers that nobody would ask, and those that cannot be started or reached."""
    v = cfg.rollout.vllm
    if cfg.rollout.engine is not RolloutEngineName.vllm:
        return
    if not algorithm.asked_weights():
        raise ConfigError(
            f"rollout=vllm does nothing with {cfg.algorithm.name} as it is configured: it neither "
            "samples nor judges. Leave it out."
        )
    if int(os.environ.get("RANK", "0")) != 0:
        return  # the first rank alone starts or reaches servers
    if v.urls and v.token_file is not None:
        from nemo_selfpref.rollout.serving.auth import read_token

        read_token(Path(v.token_file).expanduser())
    elif not v.urls and shutil.which(Path(v.python).expanduser()) is None:
        raise ConfigError(
            f"rollout.vllm.python={v.python}: no such interpreter. Give that of an environment "
            "with vLLM; make rollout-env makes .venv-rollout, without a GPU."
        )


def train(cfg: DictConfig) -> Outcome:
    """Run the configured algorithm on this rank. Collective over all ranks of the run."""
    typed = check_before_work(cfg)
    from nemo_selfpref.training.session import find_start

    start = find_start(typed)
    from nemo_selfpref.models.nemo_adapter import quiet

    quiet()
    with _watched(typed):
        return _train(cfg, typed, start)


@contextmanager
def _watched(cfg: RunConfig) -> Iterator[None]:
    """Join the process group, and find ranks that hang from here on. Collective."""
    from nemo_selfpref.megatron.parallel import all_gather_json, initialize, world_group
    from nemo_selfpref.megatron.platform import select_platform
    from nemo_selfpref.monitor.beats import new_launch
    from nemo_selfpref.monitor.heartbeat import Heart

    platform, settings = select_platform(cfg.trainer.accelerator), cfg.exp_manager.heartbeat
    layout = initialize(cfg, platform)
    if not settings.hang_timeout_s:
        yield
        return

    def say(text: str) -> None:
        sys.stderr.write(f"selfpref [rank {layout.rank}]: {text}\n")
        sys.stderr.flush()

    launch = all_gather_json(new_launch(), world_group(), platform.device())[0]
    folder = Path(cfg.exp_manager.exp_dir) / cfg.exp_manager.name / "heartbeat"
    ranks = {"rank": layout.rank, "world_size": layout.world_size}
    with Heart(folder, launch, **ranks, **asdict(settings), say=say):
        yield


def _train(cfg: DictConfig, typed: RunConfig, start: Start) -> Outcome:
    from nemo_selfpref.monitor.heartbeat import mark, phase
    from nemo_selfpref.training.session import build_policy

    is_main = int(os.environ.get("RANK", "0")) == 0
    console = Console(enabled=is_main, bars=typed.trainer.enable_progress_bar)
    from nemo_selfpref.training.run import Run
    from nemo_selfpref.training.signals import StopSignals
    from nemo_selfpref.training.store import RunFolder

    mark("reading the first weights")
    policy, layout = build_policy(typed, start)
    parameters = list(policy.module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    console.say(
        f"{typed.algorithm.name} on {policy.platform.device().type}, {layout.describe()}, "
        f"{sum(p.numel() for p in parameters):,} weights a rank"
        + (f", {trained:,} of them in adapters" if typed.model.lora.rank else "")
    )
    folder = RunFolder(Path(typed.exp_manager.exp_dir) / typed.exp_manager.name)
    with phase("comparing the inputs with those of the run", _COMPARE_S):
        notes = _open_together(folder, cfg, typed.exp_manager.resume_if_exists, policy)
    for note in notes:
        console.say(note)
    algorithm = pick_algorithm(typed)
    with StopSignals() as signals:
        run = Run(cfg, policy, start, folder, console, signals, algorithm.asked_weights())
        mark("starting")
        try:
            run.open()
            mark(typed.algorithm.name)
            algorithm.run(run)
        finally:
            run.close()
    mark("saving the final checkpoint")
    checkpoint = run.save_final()
    hf = _export(typed, run, checkpoint)
    if layout.is_main:
        write_json(folder.path / "summary.json", run.summary)
        title = f"{typed.algorithm.name}: {typed.name}"
        console.table(title, SUMMARY_COLUMNS, summary_rows(run.summary))
        console.details(run.summary)
        console.say(f"checkpoint  {checkpoint}")
        console.say(f"HF export   {hf or 'off (export.hf=false)'}")
        console.say(f"log         {folder.path / 'stages'} (metrics.jsonl, TensorBoard logs)")
    return Outcome(folder.path, checkpoint, hf)


def _open_together(folder: RunFolder, cfg: DictConfig, resume: bool, policy: Policy) -> list[str]:
    """The first rank opens the folder; a refusal reaches every rank. What is to be said of it."""
    from nemo_selfpref.megatron.parallel import all_gather_json, world_group

    refusal, notes = None, []
    if policy.layout.is_main:
        try:
            notes = folder.open(cfg, resume)
        except (SelfPrefError, OSError) as error:
            refusal = str(error)
    refusal = all_gather_json(refusal, world_group(), policy.platform.device())[0]
    if refusal is not None:
        raise ConfigError(refusal)
    return notes


def _export(cfg: RunConfig, run: Run, checkpoint: Path) -> Path | None:
    from nemo_selfpref.checkpoint.export import export_checkpoint
    from nemo_selfpref.checkpoint.verify import verify_export
    from nemo_selfpref.megatron.parallel import barrier
    from nemo_selfpref.monitor.heartbeat import mark

    if not cfg.export.hf:
        return None
    target = checkpoint.parent / "hf"
    mark("export")
    if run.policy.layout.is_main:
        export_checkpoint(checkpoint, target)
    barrier()
    if cfg.export.verify:
        mark("comparing the export")
        verify_export(run.policy, run.tokenizer, target)
    return target
