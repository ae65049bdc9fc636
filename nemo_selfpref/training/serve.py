"""`selfpref serve`: rollout servers that outlive a run, for trainers and for OpenAI clients."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omegaconf import OmegaConf

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.checkpoint.folders import is_checkpoint
from nemo_selfpref.config.checks import check_config
from nemo_selfpref.config.loader import load_config, to_typed
from nemo_selfpref.config.schema import DataConfig, RunConfig
from nemo_selfpref.errors import ConfigError, RolloutCancelled, RolloutError
from nemo_selfpref.files import write_text
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.auth import make_token
from nemo_selfpref.rollout.serving.front_spec import FrontSpec
from nemo_selfpref.rollout.serving.launcher import ChildProcess, engine_environment
from nemo_selfpref.rollout.serving.plan import front_spec_of, refuse_insecure_environment
from nemo_selfpref.training.serve_report import show
from nemo_selfpref.training.session import find_start
from nemo_selfpref.types import WeightSet

TOKEN_FILE = Path("~/.config/nemo_selfpref/token")
_GRACE_S = 30.0
"""Longer than an engine may take to end, so that the front can wait for its engines."""
_FRONT_S = 60.0
"""Longer than the engines take, the front itself does not take."""
_LOOK_S = 0.5


def serve(args: argparse.Namespace) -> None:
    """Start the engines of a configuration and answer until interrupted.

    Raises:
        ConfigError, CheckpointError, DataError: what is asked for cannot be served.
        RolloutError: an engine did not start, or the server ended by itself.
    """
    refuse_insecure_environment()
    cfg = serve_config(args.config_name, args.overrides, args.config_dir)
    with _interrupts() as stopped, _weights_dir(cfg) as weights_dir:
        spec = plan(cfg, args.weights, weights_dir)
        console = Console()
        console.say(f"starting {len(spec.engines)} engines; logs in {spec.folder}")
        with front_process(spec) as front:
            try:
                until = Until.within(spec.fleet.start_timeout_s + _FRONT_S, stopped.is_set)
                port = front.wait_ready(until)
            except RolloutCancelled:
                return
            show(console, spec, port)
            while not stopped.wait(_LOOK_S):
                if not front.alive:
                    raise RolloutError(f"the server ended by itself:\n{front.tail()}")
            console.say("stopping")


# -- what is to be served ---------------------------------------------------------------------


def serve_config(name: str, overrides: Sequence[str], config_dir: Path | None) -> RunConfig:
    """The configuration of a run as far as its engines need it: data is not.

    Raises:
        ConfigError: as for training, and where it names servers that run already.
    """
    schemas = {name: algorithm.config_class for name, algorithm in algorithms().items()}
    if not any(override.startswith("rollout=") for override in overrides):
        overrides = ["rollout=vllm", *overrides]
    cfg = load_config(name, overrides, schemas, config_dir, allow_missing=True)
    # A training's own line may be used: what that says of data need not fit what is served.
    cfg.data = OmegaConf.structured(DataConfig(train_path=[], max_length=2, max_prompt_length=1))
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise ConfigError(f"no value for {', '.join(missing)}. Give one: {missing[0]}=...")
    typed = to_typed(cfg)
    if typed.rollout.vllm.urls:
        raise ConfigError(
            "rollout.vllm.urls names servers that run already; selfpref serve starts one: leave it "
            "out"
        )
    check_config(typed)
    return typed


def plan(cfg: RunConfig, weights: str, weights_dir: Path) -> FrontSpec:
    """The front that serves a configuration.

    Args:
        weights: names of sets of weights, with commas between.

    Raises:
        ConfigError: no Hugging Face folder to start from, or an unknown set of weights.
    """
    folder = _model_folder(cfg)
    names = _weight_sets(weights)
    start = find_start(cfg)
    work = (Path(cfg.exp_manager.exp_dir) / "serve" / f"{cfg.name}-{os.getpid()}").resolve()
    token_file = Path(cfg.rollout.vllm.token_file or TOKEN_FILE).expanduser().resolve()
    make_token(token_file)
    return front_spec_of(
        cfg,
        model_folder=folder,
        tokenizer_folder=Path(cfg.model.tokenizer.path or folder).resolve(),
        stop_ids=sorted(start.tokenizer.stop_ids),
        tokenizer_sha256=start.tokenizer.fingerprint(),
        max_length=start.arch.max_position_embeddings,
        weight_sets=names,
        work=work,
        token_file=token_file,
        weights_dir=weights_dir,
    )


def _model_folder(cfg: RunConfig) -> Path:
    given = cfg.model.restore_from_path
    if given is None:
        raise ConfigError("nothing to serve: set model.restore_from_path to a Hugging Face folder")
    folder = Path(given)
    if is_checkpoint(folder):
        raise ConfigError(
            f"model.restore_from_path={folder} is a checkpoint; vLLM reads Hugging Face folders: "
            f"export it first: selfpref export --checkpoint {folder} --out FOLDER"
        )
    return folder.resolve()


def _weight_sets(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [name.value for name in WeightSet]
    unknown = [name for name in names if name not in known]
    if unknown or not names or len({*names}) != len(names):
        raise ConfigError(f"--weights {text}: expected names out of {', '.join(known)}, each once")
    return names


# -- the process ------------------------------------------------------------------------------


def front_command(spec_file: Path) -> list[str]:
    """How a front is started, in this very environment."""
    return [sys.executable, "-m", "nemo_selfpref.rollout.serving.front_process", str(spec_file)]


@contextmanager
def front_process(spec: FrontSpec) -> Iterator[ChildProcess]:
    """A front that ends with the block, and its engines before it."""
    work = Path(spec.folder)
    spec_file = work / "front.spec.json"
    write_text(spec_file, spec.model_dump_json(indent=1))
    child = ChildProcess(
        front_command(spec_file),
        ready_file=Path(spec.ready_file),
        log=work / "front.log",
        env=engine_environment(None),
    )
    try:
        yield child
    finally:
        child.stop(_GRACE_S)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set by Ctrl-C and by being told to end, also where a shell had them ignored."""
    stopped = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _weights_dir(cfg: RunConfig) -> Iterator[Path]:
    """The folder for new weights; one of our own goes when the server does."""
    given = cfg.rollout.vllm.weights_dir
    if given is not None:
        folder = Path(given).expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        yield folder
        return
    shared = Path("/dev/shm")
    root = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    folder = root / f"selfpref-serve-{os.getuid()}-{secrets.token_hex(4)}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
