"""Weights of a Megatron policy in a real vLLM engine: it samples what the trainer would."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import MakePolicy, save_llama, scale
from tiny_mixtral import mixtral_policy, save_mixtral

from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.rollout.engine import RolloutEngine
from nemo_selfpref.rollout.serving.auth import make_token
from nemo_selfpref.rollout.serving.client import ServerClient
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec
from nemo_selfpref.training.publish import WeightPublisher, write_model_folder
from nemo_selfpref.training.session import embedded_engine
from nemo_selfpref.types import GenerationRequest, SamplingParams, TokenIds, WeightSet

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-rollout" / "bin" / "python"
STOP = [0, 2]
START_S = 180.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(), reason="no environment with vLLM here: make rollout-env makes one"
    ),
]


@pytest.fixture(params=[pytest.param("untied", marks=pytest.mark.long), "tied", "experts"])
def wide_policy(request: pytest.FixtureRequest, make_policy: MakePolicy, tmp_path: Path) -> Policy:
    """Heads of 32 channels, the fewest that vLLM's attention on a CPU takes."""
    changes = {"hidden_size": 128, "head_dim": 32, "tie_word_embeddings": request.param == "tied"}
    if request.param == "experts":
        policy = mixtral_policy(save_mixtral(tmp_path / "mixtral", **changes))
    else:
        policy = make_policy(save_llama(tmp_path / "llama", **changes))
    scale(policy, 0.9)
    return policy


@pytest.fixture
def client(wide_policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path) -> Iterator[ServerClient]:
    """An engine process that starts from the policy's folder and holds a policy and an EMA."""
    write_model_folder(wide_policy, tokenizer, tmp_path / "model")
    token, ready = tmp_path / "token", tmp_path / "ready"
    spec = EngineSpec(
        model=str(tmp_path / "model"),
        weights_dir=str(tmp_path / "weights"),
        weight_sets=["policy", "ema"],
        stop_ids=STOP,
        tokenizer_sha256="0" * 64,
        dtype="float32",
        max_length=256,
        kv_cache_bytes=2**28,
        device="cpu",
        ready_file=str(ready),
        token_file=str(token),
    )
    secret = make_token(token)
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(
            [PYTHON, "-m", "nemo_selfpref.rollout.serving.engine_process", tmp_path / "spec.json"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        ) as process,
    ):
        until = time.monotonic() + START_S
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < until, log_of(tmp_path)
            time.sleep(0.1)
        found = ServerClient(f"http://127.0.0.1:{json.loads(ready.read_text())['port']}", secret)
        yield found
        found.close()
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()[-3000:]


def greedy(engine: RolloutEngine, name: WeightSet) -> list[TokenIds]:
    requests = [GenerationRequest(str(n), (5, 6, 7, 20 + n)) for n in range(8)]
    return [c.token_ids for c in engine.generate(requests, SamplingParams(24, 0.0), name)]


def test_the_engine_samples_what_the_trainer_would(
    wide_policy: Policy, client: ServerClient, tmp_path: Path
) -> None:
    """From the folder it started from, from weights it was sent, and from two sets in turn."""
    policy, weights = wide_policy, WeightSets(wide_policy)
    publisher = WeightPublisher(policy, weights, folder=tmp_path / "weights", run="r")
    own = embedded_engine(policy, frozenset(STOP), 8, weights)
    before = greedy(own, WeightSet.POLICY)
    assert greedy(client, WeightSet.POLICY) == before
    weights.take(WeightSet.EMA, WeightSet.POLICY)
    scale(policy, 1.3)
    for name in (WeightSet.POLICY, WeightSet.EMA):
        stamp = publisher.publish(name, client.update)
        assert client.health().weights[name.value] == stamp
        (report,) = publisher.reports
        assert report.probe_error is not None and report.probe_error < 1e-4
    for _ in range(2):
        for name in (WeightSet.POLICY, WeightSet.EMA):
            assert greedy(client, name) == greedy(own, name)
    assert greedy(client, WeightSet.EMA) == before != greedy(client, WeightSet.POLICY)
