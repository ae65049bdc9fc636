"""Runs whose answers come from vLLM: those of the embedded engine, through every interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_runs import Selfpref, metrics, settings, write_jsonl
from tiny import save_llama

from nemo_selfpref.training.store import read_completions, read_pairs
from nemo_selfpref.types import Completion, PreferencePair

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-rollout" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-rollout: make rollout-env"),
]
EVERY_STEP = (
    "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
    "exp_manager.checkpoint_callback_params.save_top_k=-1",
)
VLLM = ("rollout=vllm", f"rollout.vllm.python={PYTHON}", "rollout.vllm.kv_cache_gb=0.1")
SAPO = (
    "model.global_batch_size=4",
    "algorithm.segment_length=4",
    "algorithm.ema_every=1",
    "export.hf=false",
)
OSP = (
    *("model.global_batch_size=6", "algorithm.num_samples=2", "algorithm.pairing=spin"),
    *("export.hf=false", "trainer.max_epochs=2"),
)


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's attention on a CPU takes heads of 32 channels and more."""
    folder = tmp_path_factory.mktemp("wide")
    return save_llama(folder, hidden_size=128, head_dim=32, max_position_embeddings=1024)


def arguments(
    folder: Path, name: str, method: str, model: Path, data: Path, *more: str
) -> list[str]:
    short = ("rollout.max_new_tokens=16", "rollout.temperature=0", "data.max_length=1000")
    wide = settings(folder, name, model, data, *short, "data.max_prompt_length=900", *more)
    return ["train", "--config-name", method, *wide]


def pairs_of(run: Path) -> list[list[PreferencePair]]:
    """The pairs of every step."""
    return [read_pairs(p) for p in sorted(run.glob("stages/*-policy/pairs/step-*.parquet"))]


def answers_of(run: Path) -> dict[str, list[Completion]]:
    found = sorted(run.glob("stages/*/completions.parquet"))
    return {path.parent.name: read_completions(path) for path in found}


def same_pairs(ours: Sequence[PreferencePair], theirs: Sequence[PreferencePair]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.prompt_ids == other.prompt_ids and one.chosen_ids == other.chosen_ids
        assert one.rejected_ids == other.rejected_ids, one.id
        assert one.strength == pytest.approx(other.strength, abs=1e-4)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        pytest.param("self_augmented_po", SAPO, id="sapo"),
        pytest.param("osp", OSP, id="osp", marks=pytest.mark.long),
    ],
)
def test_greedy_answers_are_those_of_the_embedded_engine(
    method: str,
    more: tuple[str, ...],
    selfpref: Selfpref,
    wide_llama: Path,
    answers_file: Path,
    tmp_path: Path,
) -> None:
    """Token by token, at the first step and after five updates."""
    given = (wide_llama, answers_file, "trainer.max_steps=6", *more)
    selfpref(*arguments(tmp_path, "embedded", method, *given))
    selfpref(*arguments(tmp_path, "vllm", method, *given, *VLLM))
    ours, theirs = pairs_of(tmp_path / "vllm"), pairs_of(tmp_path / "embedded")
    assert len(ours) == len(theirs) == 6 and all(ours)
    for one, other in zip(ours, theirs, strict=True):
        same_pairs(one, other)
    assert len({pair.rejected_ids for step in ours for pair in step}) > 6
    for one, other in zip(metrics(tmp_path / "vllm"), metrics(tmp_path / "embedded"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
        assert one["rollout/logprob_diff_max"] < 1e-4 and one["rollout/ess"] > 0.999


@pytest.mark.long
def test_sgpo_with_vllm(
    selfpref: Selfpref, wide_llama: Path, answers_file: Path, tmp_path: Path
) -> None:
    targets = tmp_path / "targets.jsonl"
    ids = [f"{answers_file.name}:{n}" for n in range(1, 11)]
    given = (
        *("algorithm.targets.source=file", f"algorithm.targets.path={targets}"),
        *("algorithm.improver.num_prompts=10", "model.global_batch_size=4", "export.hf=false"),
    )
    common = (wide_llama, answers_file, *given, "algorithm.drop_truncated_chosen=false")
    questions = [f"{i}/{kind}" for i in ids for kind in ("improve", "answer")]
    write_jsonl(targets, [{"id": q, "answer": f"it is {n}"} for n, q in enumerate(questions)])
    selfpref(*arguments(tmp_path, "embedded", "sgpo", *common))
    selfpref(*arguments(tmp_path, "vllm", "sgpo", *common, *VLLM))
    ours, theirs = answers_of(tmp_path / "vllm"), answers_of(tmp_path / "embedded")
    assert ours.keys() == theirs.keys() and len(ours) == 3  # draft, answer, improve
    for name, completions in ours.items():
        tokens = [(c.id, c.token_ids, c.weight_version) for c in completions]
        assert tokens == [(c.id, c.token_ids, c.weight_version) for c in theirs[name]], name


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.long), 2])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    staleness: int, selfpref: Selfpref, wide_llama: Path, answers_file: Path, tmp_path: Path
) -> None:
    command = arguments(
        *(tmp_path, "run", "self_augmented_po", wide_llama, answers_file, *SAPO, *VLLM),
        *("rollout.temperature=0.8", "trainer.max_steps=6", *EVERY_STEP),
        f"rollout.max_staleness={staleness}",
    )
    selfpref(*command)
    run = tmp_path / "run"
    whole, pairs = metrics(run), pairs_of(run)
    assert ages(run) == [float(min(step, staleness)) for step in range(6)]
    cut_off_after_three(run)
    selfpref(*command)
    assert metrics(run) == whole and pairs_of(run) == pairs
    if not staleness:
        return
    # On-policy from here on: what was sampled ahead is too old, and its replay buffer with it.
    cut_off_after_three(run)
    selfpref(*command, "rollout.max_staleness=0")
    assert ages(run) == [0.0, 1.0, 2.0, 0.0, 0.0, 0.0] and pairs_of(run)[:3] == pairs[:3]


def ages(run: Path) -> list[float]:
    return [step.get("rollout/staleness", 0.0) for step in metrics(run)]


def cut_off_after_three(run: Path) -> None:
    """What a kill after the third of six steps leaves."""
    stage = next(run.glob("stages/*-policy"))
    for step in (4, 5, 6):
        shutil.rmtree(stage / "checkpoints" / f"step-{step:06d}")
    for path in (stage / "weights", run / "checkpoint"):
        shutil.rmtree(path)
    (stage / "done.json").unlink()


@pytest.mark.long
def test_two_ranks_ask_as_one(
    selfpref: Selfpref, wide_llama: Path, answers_file: Path, tmp_path: Path
) -> None:
    given = (wide_llama, answers_file, *SAPO, "trainer.max_steps=3", *VLLM)
    selfpref(*arguments(tmp_path, "one", "self_augmented_po", *given))
    split = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
    selfpref(*arguments(tmp_path, "two", "self_augmented_po", *given, *split))
    for one, other in zip(pairs_of(tmp_path / "one"), pairs_of(tmp_path / "two"), strict=True):
        same_pairs(one, other)


# -- engines that die ---------------------------------------------------------------------------


@contextmanager
def training(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "nemo_selfpref.cli", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(what: str, found: Any, process: subprocess.Popen[str], seconds: float = 180) -> Any:
    end = time.monotonic() + seconds
    while not (value := found()):
        if process.poll() is not None:
            raise AssertionError(f"ended before {what}: {process.stdout and process.stdout.read()}")
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.05)
    return value


def engine_pid(run: Path) -> int | None:
    path = run / "rollout" / "ema-0.ready.json"
    return json.loads(path.read_text())["pid"] if path.exists() else None


def steps_done(run: Path) -> int:
    found = list(run.glob("stages/*-policy/metrics.jsonl"))
    return len(found[0].read_text().splitlines()) if found else 0


def kill_engine_after(steps: int, command: Sequence[str], run: Path) -> tuple[int, str]:
    """The run's exit status and output, its engine killed once so many steps are done."""
    with training(command) as process:
        wait_for("an engine", lambda: engine_pid(run), process)
        wait_for(f"{steps} steps", lambda: steps_done(run) >= steps, process)
        pid = engine_pid(run)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output


def test_a_run_outlives_its_engine(wide_llama: Path, answers_file: Path, tmp_path: Path) -> None:
    given = (wide_llama, answers_file, *SAPO, "trainer.max_steps=12", *VLLM)
    command = arguments(
        *(tmp_path, "run", "self_augmented_po", *given),
        *("rollout.vllm.health_every_s=0.5", "rollout.vllm.suspect_after=1"),
    )
    run = tmp_path / "run"
    status, output = kill_engine_after(3, command, run)
    assert status == 0, output[-4000:]
    assert steps_done(run) == 12
    assert "started again" in (run / "rollout" / "front.log").read_text() + output


@pytest.mark.long
def test_too_few_engines_stop_the_run_with_everything_saved(
    selfpref: Selfpref, wide_llama: Path, answers_file: Path, tmp_path: Path
) -> None:
    given = (wide_llama, answers_file, *SAPO, "trainer.max_steps=12", *VLLM)
    command = arguments(tmp_path, "run", "self_augmented_po", *given)
    run = tmp_path / "run"
    status, output = kill_engine_after(3, [*command, "rollout.vllm.max_restarts=0"], run)
    assert status == 2 and "min_engines" in output and "Traceback" not in output, output[-4000:]
    done = steps_done(run)
    stage = next(run.glob("stages/*-policy"))
    assert 3 <= done < 12 and (stage / "checkpoints" / f"step-{done:06d}").is_dir()
    before = pairs_of(run)[:done]
    selfpref(*command)
    assert steps_done(run) == 12 and pairs_of(run)[:done] == before


# -- a server of its own ------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("transport", ["folder", "gloo"])
def test_training_with_a_server_that_runs_already(
    transport: str, selfpref: Selfpref, wide_llama: Path, answers_file: Path, tmp_path: Path
) -> None:
    token, weights = tmp_path / "token", tmp_path / "weights"
    serve = [
        *("serve", "--config-name", "self_augmented_po", "--weights", "ema"),
        *(f"model.restore_from_path={wide_llama}", f"rollout.vllm.python={PYTHON}"),
        *(f"rollout.vllm.token_file={token}", f"rollout.vllm.weights_dir={weights}"),
        "rollout.vllm.kv_cache_gb=0.1",
    ]
    given = (wide_llama, answers_file, *SAPO, "trainer.max_steps=3")
    selfpref(*arguments(tmp_path, "own", "self_augmented_po", *given, *VLLM))
    with training(serve) as server:
        assert server.stdout is not None
        url = next(line.split()[1] for line in server.stdout if line.startswith("url"))
        served = (
            *("rollout=vllm", f"rollout.vllm.urls=[{url}]", f"rollout.vllm.token_file={token}"),
            *(f"rollout.vllm.weights_dir={weights}", f"rollout.vllm.transport={transport}"),
        )
        selfpref(*arguments(tmp_path, "run", "self_augmented_po", *given, *served))
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    for one, other in zip(pairs_of(tmp_path / "run"), pairs_of(tmp_path / "own"), strict=True):
        same_pairs(one, other)
