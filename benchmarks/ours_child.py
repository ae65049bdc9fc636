"""One measured DPO run of ours, as `selfpref train --config-name dpo` does it.

    python benchmarks/ours_child.py job.json result.json

Counted: the training stage whole, that is reference log-probs, optimizer set-up, every step, and
the records a stage writes. Not counted: imports, model loading, tokenisation, writing weights.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import BenchmarkError, versions

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.config.loader import load_config
from nemo_selfpref.files import write_json
from nemo_selfpref.training import trainer
from nemo_selfpref.training.run import Run
from nemo_selfpref.training.steps import FixedSteps
from nemo_selfpref.training.train import train


class Stopwatch:
    """Seconds spent in functions, by name of the part they make up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    def around(
        self, owner: Any, name: str, part: str, look: Callable[..., None] | None = None
    ) -> None:
        """Time every call of owner.name; `look` is shown the arguments first."""
        inner = getattr(owner, name, None)
        if inner is None:
            raise BenchmarkError(f"{owner.__name__} has no {name} any more; correct ours_child.py")

        def timed(*args: Any, **kwargs: Any) -> Any:
            if look is not None:
                look(*args, **kwargs)
            started, cpu_started = time.perf_counter(), time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                spent, cpu = time.perf_counter() - started, time.process_time() - cpu_started
                self.seconds[part] = self.seconds.get(part, 0.0) + spent
                self.cpu_seconds[part] = self.cpu_seconds.get(part, 0.0) + cpu

        setattr(owner, name, timed)


def overrides(job: dict[str, Any]) -> list[str]:
    """The job in our configuration's words."""
    return [
        f"name={Path(job['out']).name}",
        f"seed={job['seed']}",
        f"exp_manager.exp_dir={Path(job['out']) / 'run'}",
        "exp_manager.create_tensorboard_logger=false",
        "exp_manager.resume_if_exists=false",
        f"model.restore_from_path={job['model']}",
        f"model.micro_batch_size={job['micro_batch']}",
        f"model.global_batch_size={job['global_batch']}",
        "model.optim.name=adamw",
        f"model.optim.lr={job['lr']}",
        f"model.optim.betas={job['betas']}".replace(" ", ""),
        f"model.optim.eps={job['eps']}",
        "model.optim.weight_decay=0.0",
        "model.optim.sched.name=constant",
        "model.optim.sched.warmup_ratio=0.0",
        f"trainer.gradient_clip_val={job['clip']}",
        "trainer.accelerator=cpu",
        "trainer.precision=fp32",
        "trainer.max_epochs=1",
        "trainer.enable_progress_bar=false",
        f"data.train_path=[{job['pairs']}]",
        f"data.limit={job['num_pairs']}",
        f"data.max_length={job['max_length']}",
        f"data.max_prompt_length={job['max_length'] - 1}",
        "data.shuffle=false",
        f"algorithm.beta={job['beta']}",
        "export.hf=false",
        *job.get("overrides", []),
    ]


def losses_of(run: Path) -> list[float]:
    """The loss of every step, from the stage's own record."""
    files = list((run / "stages").glob("*/metrics.jsonl"))
    if len(files) != 1:
        raise BenchmarkError(f"{run}: expected one stage with metrics.jsonl, found {len(files)}")
    lines = files[0].read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main() -> None:
    job_path, result_path = (Path(argument) for argument in sys.argv[1:3])
    job = json.loads(job_path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    watch, tokens = Stopwatch(), []

    def keep(_: Run, name: str, rows: Any, *args: Any, **kwargs: Any) -> None:
        tokens.extend([r.prompt_ids, r.chosen_ids, r.rejected_ids] for r in rows)

    watch.around(Run, "train", "stage", keep)
    watch.around(Run, "preferences", "tokenise")
    watch.around(FixedSteps, "score_once", "reference")
    watch.around(trainer, "save_weights", "save")
    schemas = {name: cls.config_class for name, cls in algorithms().items()}
    cfg = load_config("dpo", overrides(job), schemas)
    profiler = torch.profiler.profile() if job.get("profile") else nullcontext()
    with profiler:
        outcome = train(cfg)
    if job.get("profile"):
        averages = profiler.key_averages()  # type: ignore
        table = averages.table(sort_by="self_cpu_time_total", row_limit=40)
        Path(job["profile"]).write_text(table, encoding="utf-8")
    spent, cpu = watch.seconds, watch.cpu_seconds
    seconds = spent["stage"] - spent["save"]
    result = {
        "seconds": seconds,
        "cpu_seconds": cpu["stage"] - cpu["save"],
        "parts": {
            "reference": spent["reference"],
            "reference_cpu": cpu["reference"],
            "train": seconds - spent["reference"],
            "tokenise": spent["tokenise"],
        },
        "losses": losses_of(outcome.folder),
        "threads": torch.get_num_threads(),
        "versions": versions(["torch", "transformers", "megatron-core", "lightning"]),
    }
    write_json(result_path.with_name("tokens.json"), tokens)
    write_json(result_path, result)


if __name__ == "__main__":
    main()
