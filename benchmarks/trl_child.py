"""One measured run of TRL's DPOTrainer, in an environment of its own.

    .venv-bench/bin/python benchmarks/trl_child.py job.json result.json

Counted: trainer.train(), and the reference log-probs where they are computed before it. Not
counted: imports, model loading, tokenisation. Nothing is written to disk. Imports nothing of ours.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer


class RecordingTrainer(DPOTrainer):
    """DPOTrainer that keeps what it was given and how long the reference took."""

    precompute_seconds = precompute_cpu_seconds = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # References only: they are read when the clock has stopped.
        self.batches: list[dict[str, torch.Tensor]] = []
        self.batch_losses: list[torch.Tensor] = []
        super().__init__(*args, **kwargs)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        started, cpu_started = time.perf_counter(), time.process_time()
        dataset = super()._precompute_ref_logps(*args, **kwargs)
        self.precompute_seconds += time.perf_counter() - started
        self.precompute_cpu_seconds += time.process_time() - cpu_started
        return dataset

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        names = ("input_ids", "attention_mask", "completion_mask")
        self.batches.append({name: inputs[name] for name in names})
        self.batch_losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss

    def losses(self, batches_per_step: int) -> list[float]:
        """Mean loss of each optimizer step; its batches are equally large."""
        values = [float(loss) for loss in self.batch_losses]
        starts = range(0, len(values), batches_per_step)
        return [sum(values[i : i + batches_per_step]) / batches_per_step for i in starts]

    def tokens(self) -> list[list[list[int]]]:
        """Prompt, chosen and rejected ids of each pair, in the order of training."""
        found = []
        for batch in self.batches:
            half = batch["input_ids"].shape[0] // 2
            for row in range(half):
                prompt, chosen = _split(batch, row)
                other, rejected = _split(batch, half + row)
                if other != prompt:
                    raise SystemExit("TRL's chosen and rejected rows differ in their prompts")
                found.append([prompt, chosen, rejected])
        return found


def _split(batch: dict[str, torch.Tensor], row: int) -> tuple[list[int], list[int]]:
    """Prompt and answer of one padded row."""
    ids, real = batch["input_ids"][row], batch["attention_mask"][row].bool()
    answer = batch["completion_mask"][row].bool()
    return ids[real & ~answer].tolist(), ids[answer].tolist()


def read_rows(job: dict[str, Any]) -> Dataset:
    """The pairs as conversations: TRL then applies the chat template, as we do."""
    lines = Path(job["pairs"]).read_text(encoding="utf-8").split("\n")[: job["num_pairs"]]
    pairs = [json.loads(line) for line in lines if line]
    turn = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = [{k: [{"role": r, "content": p[k]}] for k, r in turn.items()} for p in pairs]
    return Dataset.from_list(rows)


def settings(job: dict[str, Any]) -> DPOConfig:
    """The job in TRL's words; what is not named is TRL's default."""
    return DPOConfig(
        output_dir=job["out"],
        seed=job["seed"],
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["global_batch"] // job["micro_batch"],
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=job["lr"],
        adam_beta1=job["betas"][0],
        adam_beta2=job["betas"][1],
        adam_epsilon=job["eps"],
        weight_decay=0.0,
        max_grad_norm=job["clip"],
        lr_scheduler_type="constant",
        beta=job["beta"],
        loss_type=["sigmoid"],
        max_length=job["max_length"],
        precompute_ref_log_probs=job["precompute"],
        # TRL's defaults are bfloat16 and recomputed activations; both would cost it time here.
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        # Gathering its metrics every step would cost it time; losses are recorded above.
        logging_steps=1000,
    )


def main() -> None:
    job_path, result_path = (Path(argument) for argument in sys.argv[1:3])
    job = json.loads(job_path.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    trainer = RecordingTrainer(
        model=model,
        args=settings(job),
        train_dataset=read_rows(job),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    started, cpu_started = time.perf_counter(), time.process_time()
    trainer.train()
    train_seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - cpu_started + trainer.precompute_cpu_seconds
    if job["precompute"] != (trainer.precompute_seconds > 0):
        raise SystemExit("TRL's reference pass was not where it was expected")
    packages = ("torch", "trl", "transformers", "accelerate", "datasets")
    result = {
        "seconds": train_seconds + trainer.precompute_seconds,
        "cpu_seconds": cpu_seconds,
        "parts": {"reference": trainer.precompute_seconds, "train": train_seconds},
        "losses": trainer.losses(job["global_batch"] // job["micro_batch"]),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
        "versions": {"python": platform.python_version()} | {n: version(n) for n in packages},
    }
    result_path.with_name("tokens.json").write_text(json.dumps(trainer.tokens()), encoding="utf-8")
    result_path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
