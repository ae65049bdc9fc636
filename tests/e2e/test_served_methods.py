"""Every method that asks the model goes on bitwise where it was cut off, with vLLM as well."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_methods import SETTINGS, Runs, arguments, files, training_stages, work, write_inputs
from tiny import save_llama

from nemo_selfpref.algorithms.base import algorithms
from nemo_selfpref.training.store import read_completions

PYTHON = Path(__file__).resolve().parents[2] / ".venv-rollout" / "bin" / "python"
VLLM = ("rollout=vllm", f"rollout.vllm.python={PYTHON}", "rollout.vllm.kv_cache_gb=0.1")
ASKING = sorted(
    name for name, cls in algorithms().items() if cls(cls.config_class()).asked_weights()
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-rollout: make rollout-env"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served")
    write_inputs(made)
    # vLLM's attention on a CPU takes heads of 32 channels and more.
    wide = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 768}
    save_llama(made / "llama", initializer_range=0.3, **wide)
    return made


@pytest.fixture(params=ASKING)
def runs(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, Path]:
    """A run, and the same cut off after the first step of its last training stage and resumed."""
    name = request.param
    assert name in SETTINGS
    one, resumed = folder / "one" / name, folder / "resumed" / name
    commands = [
        arguments(folder, "one", name, *VLLM),
        ["cut", str(one), str(resumed)],
        arguments(folder, "resumed", name, *VLLM),
    ]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(commands))
    done = Runs(folder, work(path))
    return done.of("one", name), done.of("resumed", name)


def test_an_interrupted_run_goes_on_bitwise(runs: tuple[Path, Path]) -> None:
    one, resumed = runs
    last = training_stages(one)[-1].relative_to(one)
    first = "checkpoints/step-000001/checkpoint.json"
    times = [(run / last / first).stat().st_mtime_ns for run in runs]
    assert times[0] == times[1], "the first step was done again"
    for pattern in ("stages/*/metrics.jsonl", "checkpoint/**/*.safetensors", "stages/*/pairs/*"):
        assert files(resumed, pattern) == files(one, pattern), pattern
    assert files(one, "checkpoint/**/*.safetensors")
    answers = [read_completions(path) for path in one.glob("stages/*/completions.parquet")]
    logs = list(one.glob("rollout/**/*.log"))
    assert logs and all(answer.token_ids for stage in answers for answer in stage)
