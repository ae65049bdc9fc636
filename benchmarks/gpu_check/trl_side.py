"""TRL's side on a GPU: benchmarks/trl_child.py with the device, precision and kernels of the job.

    python trl_side.py job.json result.json

Imports nothing of ours: TRL may live in an environment of its own.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

# Our neighbours have names that other packages use too, so they leave the path.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
import trl_child  # noqa: E402
from transformers import TrainerCallback  # noqa: E402


class _StepEnds(TrainerCallback):
    """When each step's work was done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter())


def adapt(job: dict[str, Any]) -> _StepEnds:
    """Replace what the child fixes for a CPU; returns the clock of its steps."""
    changes = {
        "use_cpu": job["device"] == "cpu",
        "bf16": job["bf16"],
        "use_liger_kernel": job["liger"],
    }
    config, model, base = (
        trl_child.DPOConfig,
        trl_child.AutoModelForCausalLM,
        trl_child.RecordingTrainer,
    )
    dtype = torch.bfloat16 if job["bf16_weights"] else torch.float32
    ends = _StepEnds()

    class Model:
        @staticmethod
        def from_pretrained(folder: str, **_: Any) -> Any:
            return model.from_pretrained(folder, dtype=dtype)

    class Trainer(base):  # pyright: ignore[reportUntypedBaseClass, reportGeneralTypeIssues]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(ends)

    trl_child.DPOConfig = lambda **given: config(**{**given, **changes})
    trl_child.AutoModelForCausalLM = Model
    trl_child.RecordingTrainer = Trainer
    return ends


def main() -> None:
    job_path, result_path = (Path(argument) for argument in sys.argv[1:3])
    ends = adapt(json.loads(job_path.read_text(encoding="utf-8")))
    trl_child.main()
    result = json.loads(result_path.read_text(encoding="utf-8"))
    result["step_ends"] = ends.seconds
    result_path.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
