"""Commands run as a user runs them, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import Selfpref, write_jsonl


@pytest.fixture(scope="session")
def selfpref() -> Selfpref:
    """selfpref(*arguments, status=0): runs the command and checks its exit status."""

    def run(
        *arguments: object, status: int = 0, timeout: int = 600
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nemo_selfpref.cli", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-5000:]
        return done

    return run


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 preference rows: polite answers over rude ones."""
    rows = [
        {
            "prompt": f"How much is {n} plus {n + 3}?",
            "chosen": f"It is {2 * n + 3}, gladly. " * (1 + n % 3),
            "rejected": f"{2 * n + 3}. Go away.",
        }
        for n in range(24)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def answers_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 demonstrations on the demo's task, which the demo's teacher can improve."""
    from nemo_selfpref.demo.task import make_instructions, oracle

    rows = [{"prompt": t, "completion": oracle(t)} for t in make_instructions(10, seed=11)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "answers.jsonl", rows)
