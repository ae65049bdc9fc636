"""The real scripts on a real SLURM: to the end, stopped and queued again, failing, cancelled."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, cluster, eventually, missing
from tiny import save_llama

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-rollout" / "bin" / "python"
LONG = "trainer.max_epochs=40"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(
        bool(missing()), reason=f"no SLURM here: {', '.join(missing())} (slurm-wlm and munge)"
    ),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture(scope="module")
def work(slurm: Cluster) -> Path:
    """Where jobs are submitted: a model, some rows, and a name with a space in it."""
    folder = slurm.folder / "work here"
    save_llama(folder / "llama")
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(32)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


SETTINGS = [
    "exp_manager.create_tensorboard_logger=false",
    "model.restore_from_path=llama",
    "data.train_path=[rows.jsonl]",
    "data.max_length=250",
    "data.max_prompt_length=200",
    "model.micro_batch_size=2",
    "model.global_batch_size=8",
    "model.optim.lr=1e-3",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "trainer.precision=fp32",
    "export.verify=false",
]
SIZE = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=30"]


def sbatch(slurm: Cluster, work: Path, name: str, *more: str, **knobs: str) -> str:
    """The number of a job with slurm/sft_4node.sh, on two nodes of one rank."""
    script = str(ROOT / "slurm" / "sft_4node.sh")
    options = [*SIZE, "--parsable", "--output=%j.log", script]
    where = {"SELFPREF_HOME": str(ROOT), "VENV": sys.prefix, **knobs}
    settings = [f"name={name}", *SETTINGS, *more]
    return slurm.run("sbatch", *options, *settings, cwd=work, **where).strip()


def submit(
    slurm: Cluster, work: Path, name: str, *more: str, config: str = "sft", engines: int = 0
) -> str:
    """The same by `selfpref submit`."""
    options = ["--nodes", "2", "--gpus-per-node", "1", "--cpus-per-task", "1", "--time", "30"]
    command = [sys.executable, "-m", "nemo_selfpref.cli", "submit", "--config-name", config]
    command += [*options, "--engine-nodes", str(engines), f"name={name}", *SETTINGS, *more]
    return slurm.run(*command, cwd=work, PYTHONPATH=str(ROOT)).strip()


def steps(work: Path, name: str) -> list[dict]:
    found = list((work / "runs" / name / "stages").glob("*-policy/metrics.jsonl"))
    return [json.loads(line) for line in found[0].read_text().splitlines()] if found else []


def logs(work: Path, name: str, job: str, start: int = 0) -> Path:
    return work / "runs" / name / "logs" / f"{job}.{start}"


def losses(work: Path, name: str) -> list[float]:
    return [step["loss"] for step in steps(work, name)]


def processes_of(name: str) -> dict[int, list[str]]:
    """What runs on this machine for a run, by process: ranks, their wrappers, srun."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_text(errors="replace").split("\0")
            if f"name={name}" in words:
                found[int(folder.name)] = words
    return found


def rank_of(name: str, number: int) -> int:
    """The process of a rank."""
    for pid, words in processes_of(name).items():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={number}".encode() in environment and "-m" in words[:2]:
                return pid
    raise AssertionError(f"no rank {number}: {processes_of(name)}")


def test_a_job_that_is_stopped_goes_on_to_the_same_losses(slurm: Cluster, work: Path) -> None:
    whole = sbatch(slurm, work, "whole", "trainer.max_epochs=6")
    assert slurm.until(whole, log=work / f"{whole}.log") == "COMPLETED"
    assert (work / "runs" / "whole" / "summary.json").exists()
    assert sorted(p.name for p in logs(work, "whole", whole).iterdir()) == [
        "rank-0.log",
        "rank-1.log",
    ]

    job = submit(slurm, work, "cut", "trainer.max_epochs=6")
    log = work / "runs" / "cut" / "submit" / "001" / f"job-{job}.log"
    eventually(lambda: len(steps(work, "cut")) >= 2, 240, lambda: slurm.state(job))
    slurm.run("scancel", "--signal=USR1", job)
    slurm.until(job, "PENDING", log=log)
    assert slurm.facts(job)["Restarts"] == "1"
    assert "status 75: queued again" in log.read_text()
    before = len(steps(work, "cut"))
    assert slurm.until(job, log=log) == "COMPLETED"
    assert 2 <= before < len(steps(work, "cut"))
    assert losses(work, "cut") == losses(work, "whole")
    assert (logs(work, "cut", job, 0) / "first-failure").read_text().split()[1] == "75"
    assert not (logs(work, "cut", job, 1) / "first-failure").exists()


def test_a_job_that_fails_is_not_queued_again(slurm: Cluster, work: Path) -> None:
    job = sbatch(slurm, work, "failing", "data.train_path=[gone.jsonl]")
    assert slurm.until(job) == "FAILED"
    facts, told = slurm.facts(job), (work / f"{job}.log").read_text()
    assert (facts["ExitCode"], facts["Restarts"]) == ("2:0", "0")
    assert "gone.jsonl does not exist" in told and "not queued again" in told


def test_a_wrong_setting_is_refused_before_ranks_start(slurm: Cluster, work: Path) -> None:
    job = sbatch(slurm, work, "wrong", "model.no_such_setting=1")
    assert slurm.until(job) == "FAILED"
    assert slurm.facts(job)["ExitCode"] == "2:0"
    assert "unknown setting" in (work / f"{job}.log").read_text()
    assert not (work / "runs" / "wrong").exists()


def test_the_rank_that_failed_first_decides_and_restarts_are_bounded(
    slurm: Cluster, work: Path
) -> None:
    job = sbatch(slurm, work, "killed", LONG, MAX_REQUEUES="0", PATIENCE_S="20")
    eventually(lambda: len(steps(work, "killed")) >= 2, 240, lambda: slurm.state(job))
    os.kill(rank_of("killed", 1), signal.SIGKILL)
    assert slurm.until(job) == "FAILED"
    assert (logs(work, "killed", job) / "first-failure").read_text() == "1 137\n"
    assert slurm.facts(job)["Restarts"] == "0"
    assert "MAX_REQUEUES" in (work / f"{job}.log").read_text()
    eventually(lambda: not processes_of("killed"), 60)


def test_a_job_that_is_cancelled_stays_so_and_leaves_nothing(slurm: Cluster, work: Path) -> None:
    job = sbatch(slurm, work, "cancelled", LONG)
    eventually(lambda: len(steps(work, "cancelled")) >= 2, 240, lambda: slurm.state(job))
    slurm.run("scancel", job)
    assert slurm.until(job) == "CANCELLED"
    eventually(lambda: not processes_of("cancelled"), 60)
    assert slurm.facts(job)["Restarts"] == "0"
    assert "queued again" not in (work / f"{job}.log").read_text()


@pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-rollout: make rollout-env")
def test_engines_on_nodes_of_their_own_are_handed_over_and_stop_with_the_run(
    slurm: Cluster, work: Path
) -> None:
    # vLLM's attention on a CPU takes heads of 32 channels and more.
    wide = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 768}
    save_llama(work / "wide", initializer_range=0.3, **wide)
    asked = ["rollout=vllm", f"rollout.vllm.python={PYTHON}", "rollout.vllm.kv_cache_gb=0.1"]
    small = ["rollout.max_new_tokens=16", "algorithm.segment_length=8", "trainer.max_epochs=2"]
    settings = [*asked, *small, "model.restore_from_path=wide"]
    job = submit(slurm, work, "served", *settings, config="self_augmented_po", engines=1)
    log = work / "runs" / "served" / "submit" / "001" / f"job-{job}.log"
    eventually(lambda: steps(work, "served"), 300, lambda: log.read_text())
    hand = work / "runs" / "served" / "engines"
    assert (hand / f"{job}.0" / "token").stat().st_mode & 0o777 == 0o600
    slurm.run("scancel", "--signal=USR1", job)
    slurm.until(job, "PENDING", log=log)
    assert slurm.until(job, log=log, within_s=400) == "COMPLETED"
    assert slurm.facts(job)["Restarts"] == "1"
    assert log.read_text().count("engines: http://127.0.0.1:") == 2
    assert [path.name for path in hand.glob("*/weights")] == []
    eventually(lambda: not processes_of("served"), 60)
