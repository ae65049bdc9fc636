"""`selfpref replay`: a past step computed again and compared with what was recorded of it."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_selfpref.config.schema import DamagedCheckpoint, RunConfig
from nemo_selfpref.errors import ConfigError
from nemo_selfpref.training.launch import launch, needs_launch
from nemo_selfpref.training.replay_report import comparison, show
from nemo_selfpref.training.run_files import RunFiles, StageFiles, saved_config
from nemo_selfpref.training.same_settings import check_same, read_settings
from nemo_selfpref.training.train import check_before_work


def replay(args: argparse.Namespace) -> int:
    """Compute a step again and print it beside its record; 0 where they are equal, else 1.

    Nothing is written into the run's folder.

    Raises:
        ConfigError: no such run or step, or overrides that would change the result.
        CheckpointError: a record or checkpoint that cannot be read.
    """
    from nemo_selfpref.training.replay_run import Goal, begun_before, do_again

    if not args.tolerance >= 0:
        raise ConfigError("--tolerance: expected 0 (bit by bit) or more")
    run = RunFiles(args.run)
    stage = run.trained(args.step, args.stage)
    _check_begun(run, stage)
    begun = begun_before(stage.folder, args.step)
    recorded = not args.resample and all(
        stage.pairs_file(step).is_file() for step in range(begun + 1, args.step + 1)
    )
    samples = stage.online and not recorded
    cfg = _settings(run, args.overrides, samples)
    typed = check_before_work(cfg)
    with _scratch(args.scratch) as scratch:
        if needs_launch(typed):
            return launch(typed, [*args.argv, "--scratch", str(scratch)])
        goal = Goal(run, stage, args.step, recorded, args.recorded_reference, begun)
        is_main = do_again(cfg, goal, scratch, show=not args.json)
        found = comparison(goal, args.tolerance)
        if is_main:
            show(found, args.json)
    return 0 if found["equal"] else 1


def _check_begun(run: RunFiles, stage: StageFiles) -> None:
    """Refuse a run whose earlier stages cannot be read back: they would be done again."""
    for earlier in run.stages:
        if earlier.folder == stage.folder:
            return
        if not earlier.done:
            raise ConfigError(
                f"stage {earlier.folder.name} has no done.json, but {stage.folder.name} comes "
                "after it: the run's folder is incomplete. Copy the whole folder."
            )


def _settings(run: RunFiles, overrides: Sequence[str], samples: bool) -> DictConfig:
    """The run's settings with overrides that change how it computes, not what."""
    cfg = saved_config(run.path, overrides)
    saved = run.path / "config.yaml"
    check_same(saved, read_settings(saved), cfg)
    plain = OmegaConf.structured(RunConfig)
    cfg.exp_manager = plain.exp_manager
    cfg.exp_manager.create_tensorboard_logger = False
    cfg.exp_manager.checkpoint_callback_params.on_damaged = DamagedCheckpoint.refuse
    cfg.trainer.log_every_n_steps = 1
    # Log-probs that another run scored may differ in their last bits.
    cfg.model.reference_cache_dir = plain.model.reference_cache_dir
    cfg.model.reference_cache_max_gb = plain.model.reference_cache_max_gb
    if not samples:
        for name in ("engine", "placement", "vllm", "timeout_s", "max_staleness", "stale_samples"):
            cfg.rollout[name] = plain.rollout[name]
    return cfg


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    """A folder of this replay's own; ranks that a launcher started share the one they are given."""
    if "RANK" not in os.environ:
        with tempfile.TemporaryDirectory(prefix="replay-", dir=folder) as made:
            yield Path(made)
        return
    if folder is None or (folder / "run").exists():
        raise ConfigError(
            "--scratch: ranks started by a launcher need one empty folder that all of them see"
        )
    try:
        yield folder
    finally:
        if os.environ["RANK"] == "0":
            shutil.rmtree(folder / "run", ignore_errors=True)
