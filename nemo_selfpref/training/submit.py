"""`selfpref submit`: a checked configuration, the code as it is now, and a job script."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

import nemo_selfpref
from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.loader import load_config
from nemo_selfpref.config.paths import conf_dir
from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.errors import ConfigError, SelfPrefError
from nemo_selfpref.files import write_text
from nemo_selfpref.training.job_script import EngineNodes, JobScript, job_script
from nemo_selfpref.training.train import check_before_work

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:@/+-]*")
"""What SLURM calls partitions, accounts and times; nothing that its script parser reads apart."""
_SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc")


@dataclass(frozen=True)
class Submission:
    """A job that is ready: its folder RUN/submit/N and its script."""

    folder: Path
    script: str


def submit(args: argparse.Namespace) -> int:
    """Check, write RUN/submit/N, call sbatch and print the job's number.

    Raises:
        ConfigError: a configuration that could not be trained, sizes or names that SLURM would
            not take, or no sbatch here.
    """
    sizes = _sizes(args)
    _check_names(args)
    cfg, run = _checked(args, sizes)
    _check_run(run, args)
    folder = (Path(run.exp_manager.exp_dir) / run.exp_manager.name).absolute()
    if args.dry_run:
        sys.stdout.write(_script(args, run, folder / "submit" / "N"))
        return 0
    if (sbatch := shutil.which("sbatch")) is None:
        raise ConfigError("no sbatch here: run this on a login node, or with --dry-run")
    with _new_submission(folder / "submit") as made:
        _fill(made, args, cfg, run)
    sys.stdout.write(f"{_hand_over(sbatch, made)}\n")
    sys.stderr.write(f"selfpref: script, settings and code in {made}\n")
    return 0


# -- what is refused ------------------------------------------------------------------------------


def _sizes(args: argparse.Namespace) -> list[str]:
    """The overrides that say how many ranks there are."""
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("engine_nodes", 0)):
        if (given := getattr(args, name)) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {given}: expected {least} or more")
    devices = max(args.gpus_per_node, 1)
    return [f"trainer.num_nodes={args.nodes}", f"trainer.devices={devices}"]


def _check_names(args: argparse.Namespace) -> None:
    for option in ("partition", "account", "qos", "time"):
        given = getattr(args, option)
        if given is not None and not _NAME.fullmatch(given):
            raise ConfigError(
                f"--{option} {given!r}: expected letters, digits and _ . , : @ / + -, beginning "
                "with a letter, digit or _"
            )


def _checked(args: argparse.Namespace, sizes: Sequence[str]) -> tuple[DictConfig, RunConfig]:
    """The settings, resolved, and the same typed; nothing but files is looked at."""
    schemas = {name: cls.config_class for name, cls in algorithms().items()}
    engines = ["rollout.engine=vllm"] if args.engine_nodes else []
    overrides = [*sizes, *args.overrides, *engines]
    cfg = load_config(args.config_name, overrides, schemas, args.config_dir)
    _check_sizes(cfg, args)
    with _without_engines(bool(args.engine_nodes or args.container)):
        return cfg, check_before_work(cfg)


@contextmanager
def _without_engines(wanted: bool) -> Iterator[None]:
    """Where vLLM is in the image or on other nodes it cannot be looked for here; only the first
    rank does."""
    before = os.environ.get("RANK")
    if wanted:
        os.environ["RANK"] = "1"
    try:
        yield
    finally:
        if before is not None:
            os.environ["RANK"] = before
        elif wanted:
            del os.environ["RANK"]


def _check_sizes(cfg: DictConfig, args: argparse.Namespace) -> None:
    devices = max(args.gpus_per_node, 1)
    for where, given, wanted, option in (
        ("trainer.num_nodes", cfg.trainer.num_nodes, args.nodes, "--nodes"),
        ("trainer.devices", cfg.trainer.devices, devices, "--gpus-per-node"),
    ):
        if given != wanted:
            raise ConfigError(f"{where}={given}, but the job has {wanted}: leave it to {option}")


def _check_run(run: RunConfig, args: argparse.Namespace) -> None:
    """Refuse what would end the job at its second start; say what it would lose."""
    if args.max_requeues and not run.exp_manager.resume_if_exists:
        raise ConfigError(
            "exp_manager.resume_if_exists=false: a job that is queued again could not go on. Leave "
            "it out, or give --max-requeues 0"
        )
    if not run.exp_manager.checkpoint_callback_params.every_n_train_steps:
        sys.stderr.write(
            "selfpref: a stage saves only at its end or when asked to stop; for what a lost node "
            "would cost set exp_manager.checkpoint_callback_params.every_n_train_steps\n"
        )


# -- what is written ------------------------------------------------------------------------------


def _script(args: argparse.Namespace, run: RunConfig, folder: Path) -> str:
    config_dir = folder / "config" if args.config_dir else None
    engines = EngineNodes(args.engine_nodes, args.engine_gpus or args.gpus_per_node)
    asked = {"partition": args.partition, "account": args.account, "qos": args.qos}
    return job_script(
        JobScript(
            name=run.name,
            config_name=args.config_name,
            overrides=args.overrides,  # run.sh gives the sizes, as SLURM has granted them
            nodes=args.nodes,
            gpus_per_node=args.gpus_per_node,
            cpus_per_task=args.cpus_per_task,
            options={k: v for k, v in {**asked, "time": args.time}.items() if v is not None},
            engines=engines if args.engine_nodes else None,
            log=folder / "job-%j.log",
            working_dir=Path.cwd(),
            environment={
                "SELFPREF_HOME": str(folder / "code"),
                "MAX_REQUEUES": str(args.max_requeues),
                "CONTAINER_IMAGE": args.container,
                "CONTAINER_MOUNTS": args.container_mounts,
                "VENV": None if args.container else sys.prefix,
                "CONFIG_DIR": None if config_dir is None else str(config_dir),
            },
        )
    )


@contextmanager
def _new_submission(parent: Path) -> Iterator[Path]:
    """A folder with the next free number; earlier ones may belong to jobs that still wait."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
    while True:
        folder = parent / f"{number:03d}"
        try:
            folder.mkdir()
            break
        except FileExistsError:
            number += 1
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fill(folder: Path, args: argparse.Namespace, cfg: DictConfig, run: RunConfig) -> None:
    _copy_code(folder / "code")
    if args.config_dir:
        shutil.copytree(args.config_dir, folder / "config", ignore=_SKIPPED)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg))
    write_text(folder / "job.sh", _script(args, run, folder))


def slurm_dir() -> Path:
    """Folder of the job scripts' common parts.

    Raises:
        ConfigError: the package was installed without them.
    """
    package = Path(nemo_selfpref.__file__).resolve().parent
    for folder in (package / "slurm", package.parent / "slurm"):
        if (folder / "run.sh").is_file():
            return folder
    raise ConfigError(
        f"no slurm/run.sh beside {package}: submit from a checkout of the project (pip install "
        "--no-deps --editable .)"
    )


def _copy_code(target: Path) -> None:
    """The package, its configurations and the scripts, so that a job which waits, or starts again,
    runs what was there when it was submitted."""
    scripts = slurm_dir()
    package = Path(nemo_selfpref.__file__).resolve().parent
    shutil.copytree(package, target / "nemo_selfpref", ignore=_SKIPPED)
    if not (target / "nemo_selfpref" / "conf").exists():
        shutil.copytree(conf_dir(), target / "conf", ignore=_SKIPPED)
    shutil.copytree(scripts, target / "slurm", ignore=_SKIPPED, dirs_exist_ok=True)


def _hand_over(sbatch: str, folder: Path) -> str:
    """The number of the job."""
    done = subprocess.run(
        [sbatch, "--parsable", str(folder / "job.sh")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SelfPrefError(f"sbatch refused {folder / 'job.sh'}: {done.stderr.strip()}")
    job = done.stdout.strip().split(";")[0]
    write_text(folder / "job-id", f"{job}\n")
    return job
