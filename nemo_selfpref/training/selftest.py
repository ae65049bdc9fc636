"""`selfpref selftest`: whether this machine, in this layout, computes what it should.

A tiny random model, in the layout, precision and kernels of a configuration, against literal
numbers, one process, the rollout engines and its own checkpoint. No model and no data are needed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.loader import load_config
from nemo_selfpref.config.model_schema import Fp8Recipe
from nemo_selfpref.config.schema import AlgorithmConfig, RolloutEngineName, RunConfig
from nemo_selfpref.errors import SelfPrefError
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.training.launch import launch, needs_launch
from nemo_selfpref.types import WeightSet

_COLUMNS = ("check", "measured", "allowed", "", "")
_VLLM = "log-probs: trainer against vLLM"


def selftest(args: argparse.Namespace) -> int:
    """Run every check; 1 where one failed. Starts the ranks of trainer.devices as training does.

    Raises:
        ConfigError: settings that contradict each other. DataError: --vectors cannot be used.
    """
    from nemo_selfpref.training.selftest_model import tiny_config

    cfg = tiny_config(read_config(args.config_name, args.overrides, args.config_dir))
    if needs_launch(cfg):
        return launch(cfg, args.argv)
    from nemo_selfpref.models.nemo_adapter import quiet

    quiet()
    results = run_checks(cfg, args.vectors)
    console = Console(enabled=_is_main())
    shown = [[r.check, _number(r.measured), _number(r.allowed), r.verdict, r.note] for r in results]
    console.table("Self-test", _COLUMNS, shown)
    wrong = [r.check for r in results if r.verdict == "failed"]
    console.say(f"failed: {', '.join(wrong)}" if wrong else "nothing failed")
    return 1 if wrong else 0


def read_config(name: str, overrides: Sequence[str], config_dir: Path | None) -> RunConfig:
    """The groups of a configuration that the self-test follows; what else it lacks is no matter.

    Raises:
        ConfigError: as for training.
    """
    schemas = {name: algorithm.config_class for name, algorithm in algorithms().items()}
    cfg: DictConfig = load_config(name, overrides, schemas, config_dir, allow_missing=True)
    groups: dict[str, Any] = {
        group: OmegaConf.to_object(cfg[group])
        for group in ("trainer", "exp_manager", "model", "rollout")
    }
    return RunConfig(
        name="selftest", seed=cfg.seed, algorithm=AlgorithmConfig("selftest"), **groups
    )


def run_checks(cfg: RunConfig, vectors: Path | None = None) -> list[Any]:
    """The results of every check, equal on every rank. Collective.

    Args:
        cfg: of a tiny model (selftest_model.tiny_config).
    """
    from nemo_selfpref.megatron.parallel import all_gather_json, world_group
    from nemo_selfpref.objectives.vectors import OWN_VECTORS
    from nemo_selfpref.training import selftest_checks as checks
    from nemo_selfpref.training.selftest_model import Answer, TinyTraining, one_process_answer

    world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    alone = asdict(one_process_answer(cfg, world)) if _is_main() else None
    training = TinyTraining(cfg, world)
    policy = training.policy
    device = policy.platform.device()
    results = list(checks.loss_vectors(vectors or OWN_VECTORS, device))
    results.append(checks.first_loss(training))
    expected = Answer(**all_gather_json(alone, world_group(), device)[0])
    layout = f"{device.type}, {policy.layout.describe()}"
    results.append(checks.same_answer(training.answer(), expected, cfg, layout))
    with _scratch(cfg, training) as folder:
        results += _engines(training, folder)
        results.append(_fp8(training))
        results.append(_tried("checkpoint round trip", lambda: checks.round_trip(training, folder)))
    return _worst_of_all(results, training)


def _tried(check: str, act: Any) -> Any:
    """A check's result; what stops it is a failure. These errors reach every rank alike."""
    from nemo_selfpref.training.selftest_checks import failed

    try:
        return act()
    except SelfPrefError as error:
        return failed(check, str(error))


def _engines(training: Any, folder: Path) -> Iterator[Any]:
    from nemo_selfpref.training.selftest_checks import rollout_logprobs, skipped
    from nemo_selfpref.training.selftest_model import STOP_IDS
    from nemo_selfpref.training.session import embedded_engine

    check, size = "log-probs: trainer against embedded engine", training.cfg.rollout.batch_size
    engine = embedded_engine(training.policy, STOP_IDS, size)
    yield _tried(check, lambda: rollout_logprobs(check, engine, training))
    if reason := _no_vllm(training.cfg):
        yield skipped(_VLLM, reason)
        return
    yield _tried(_VLLM, lambda: _against_vllm(training, folder))


def _no_vllm(cfg: RunConfig) -> str | None:
    v = cfg.rollout.vllm
    if cfg.rollout.engine is not RolloutEngineName.vllm:
        return "rollout=vllm was not asked for"
    if v.urls:
        return "the servers at rollout.vllm.urls hold another model; leave urls out to start one"
    if shutil.which(Path(v.python).expanduser()) is None:
        return f"rollout.vllm.python={v.python}: no such interpreter"
    return None


def _against_vllm(training: Any, folder: Path) -> Any:
    from nemo_selfpref.data.tokenizer import load_tokenizer
    from nemo_selfpref.megatron.parallel import barrier
    from nemo_selfpref.megatron.weights import WeightSets
    from nemo_selfpref.training.places import WeightPlaces
    from nemo_selfpref.training.selftest_checks import rollout_logprobs
    from nemo_selfpref.training.selftest_model import write_tokenizer
    from nemo_selfpref.training.service import RolloutService
    from nemo_selfpref.training.session import Start

    cfg, policy = training.cfg, training.policy
    if policy.layout.is_main:
        write_tokenizer(folder / "tokenizer")
    barrier()
    named = replace(cfg.model.tokenizer, path=str(folder / "tokenizer"))
    cfg = replace(cfg, model=replace(cfg.model, tokenizer=named))
    start = Start(None, policy.arch, load_tokenizer(named), cfg.model.lora)
    places = WeightPlaces(WeightSets(policy), start, cfg.seed)
    quiet = Console(enabled=False)
    asked = frozenset({WeightSet.POLICY})
    service = RolloutService(cfg, policy, places, start, folder, quiet, asked)
    try:
        service.open()
        return rollout_logprobs(_VLLM, service, training)
    finally:
        service.close()


def _fp8(training: Any) -> Any:
    from nemo_selfpref.training import selftest_checks as checks
    from nemo_selfpref.training.selftest_model import TinyTraining

    cfg, check = training.cfg, "FP8 against BF16"
    if reason := checks.fp8_fault(cfg, training.policy.platform):
        return checks.skipped(check, reason)
    limit = cfg.model.fp8_max_noise
    if training.policy.in_fp8:
        return checks.fp8_noise(training, limit)
    model = replace(cfg.model, fp8_recipe=Fp8Recipe.tensorwise)
    in_fp8 = TinyTraining(replace(cfg, model=model), training.policy.layout.world_size)
    return checks.fp8_noise(in_fp8, limit)


@contextmanager
def _scratch(cfg: RunConfig, training: Any) -> Iterator[Path]:
    """A folder in exp_dir that every rank sees, gone afterwards. Collective."""
    from nemo_selfpref.megatron.parallel import all_gather_json, barrier, world_group

    parent, made = Path(cfg.exp_manager.exp_dir), None
    if _is_main():
        parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=".selftest-", dir=parent)
    device = training.policy.platform.device()
    folder = Path(cast(str, all_gather_json(made, world_group(), device)[0]))
    try:
        yield folder
        barrier()
    finally:
        if _is_main():
            shutil.rmtree(folder, ignore_errors=True)


def _worst_of_all(results: list[Any], training: Any) -> list[Any]:
    """Each check as the rank sees it where it went worst. Collective."""
    from nemo_selfpref.megatron.parallel import all_gather_json, world_group
    from nemo_selfpref.training.selftest_checks import Result

    device = training.policy.platform.device()
    ranks = all_gather_json([asdict(r) for r in results], world_group(), device)
    by_check = [[Result(**found) for found in column] for column in zip(*ranks, strict=True)]
    worst = {"skipped": 0, "ok": 1, "failed": 2}
    return [max(column, key=lambda result: worst[result.verdict]) for column in by_check]


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
