"""A real engine process of vLLM's environment, and a client of it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from contract import MAX_LENGTH, STOP_IDS, wait_for

import nemo_selfpref
from nemo_selfpref.rollout.serving.auth import make_token
from nemo_selfpref.rollout.serving.client import ServerClient
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec

ROOT = Path(nemo_selfpref.__file__).parents[1]
ROLLOUT_PYTHON = ROOT / ".venv-rollout/bin/python"
needs_vllm = pytest.mark.skipif(
    not ROLLOUT_PYTHON.exists(),
    reason=f"{ROLLOUT_PYTHON} does not exist: make rollout-env makes vLLM's environment",
)


@dataclass(frozen=True)
class EngineServer:
    client: ServerClient
    token: str
    weights_dir: Path
    process: subprocess.Popen[bytes]


@contextmanager
def engine_server(model: Path, folder: Path) -> Iterator[EngineServer]:
    """An engine process on the weights of `model`; it has ended after the block."""
    token_file, ready = folder / "token", folder / "ready.json"
    token = make_token(token_file)
    spec = EngineSpec(
        model=str(model),
        weights_dir=str(folder / "weights"),
        weight_sets=["policy"],
        stop_ids=list(STOP_IDS),
        tokenizer_sha256="0" * 64,
        dtype="float32",
        max_length=MAX_LENGTH,
        max_num_seqs=64,
        kv_cache_bytes=2**26,
        device="cpu",
        token_file=str(token_file),
        ready_file=str(ready),
    )
    (folder / "spec.json").write_text(spec.model_dump_json())
    command = [ROLLOUT_PYTHON, "-m", "nemo_selfpref.rollout.serving.engine_process"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*map(str, command), str(folder / "spec.json")],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert process.stdin is not None
    try:
        wait_for(lambda: ready.exists() or process.poll() is not None, "the engine's start", 180)
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        client = ServerClient(f"http://127.0.0.1:{json.loads(ready.read_text())['port']}", token)
        yield EngineServer(client, token, Path(spec.weights_dir), process)
        client.close()
    finally:
        process.stdin.close()  # it ends with its standard input
        try:
            code = process.wait(30)
        finally:
            process.kill()
    assert code == 0, (folder / "log").read_text()[-3000:]
