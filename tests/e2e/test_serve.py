"""`selfpref serve` as a user runs it: vLLM engines, the OpenAI client, new weights, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_llama

import nemo_selfpref
from nemo_selfpref.rollout.serving.client import ServerClient
from nemo_selfpref.rollout.serving.manifest import write_weights
from nemo_selfpref.rollout.serving.receiver import GroupSender
from nemo_selfpref.rollout.serving.wire import FolderSource, Manifest, WeightsCall
from nemo_selfpref.types import WeightSet

ROOT = Path(nemo_selfpref.__file__).parents[1]
ROLLOUT_PYTHON = ROOT / ".venv-rollout/bin/python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not ROLLOUT_PYTHON.exists(),
        reason=f"{ROLLOUT_PYTHON} does not exist: make rollout-env makes vLLM's environment",
    ),
]


def wait_for(reached: Callable[[], bool], what: str, within_s: float) -> None:
    end = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < end, f"{what}: not within {within_s} s"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@dataclass
class Served:
    """A server at work."""

    process: subprocess.Popen[bytes]
    folder: Path
    url: str
    token_file: Path
    pids: list[int]
    """Of the front and its engines."""

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def asked(self) -> dict[str, Any]:
        """See openai_asks.py."""
        script = Path(__file__).with_name("openai_asks.py")
        command = [ROLLOUT_PYTHON, script, self.url, self.token_file]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # vLLM's attention on a CPU takes heads of 32 and more.
    return save_llama(tmp_path_factory.mktemp("model"), hidden_size=128, head_dim=32)


@pytest.fixture
def served(model: Path, tmp_path: Path) -> Iterator[Served]:
    command = [
        *(sys.executable, "-m", "nemo_selfpref.cli", "serve", "--config-name", "sgpo"),
        f"model.restore_from_path={model}",
        f"exp_manager.exp_dir={tmp_path}",
        f"rollout.vllm.python={ROLLOUT_PYTHON}",
        f"rollout.vllm.token_file={tmp_path / 'token'}",
        f"rollout.vllm.weights_dir={tmp_path / 'weights'}",
        "rollout.vllm.kv_cache_gb=0.0625",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "output", "wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        yield _ready(process, tmp_path)
    finally:
        process.terminate()
        try:
            process.wait(90)
        finally:
            process.kill()
            process.wait()


def _ready(process: subprocess.Popen[bytes], folder: Path) -> Served:
    def said() -> str:
        return (folder / "output").read_text()

    wait_for(lambda: "Ctrl-C ends it" in said() or process.poll() is not None, "start", 300)
    assert process.poll() is None, said()
    (url,) = [line.split()[1] for line in said().splitlines() if line.startswith("url ")]
    files = sorted(folder.glob("serve/*/*.ready.json"))
    assert [file.name.split(".")[0] for file in files] == ["ema-0", "front", "policy-0"]
    pids = [json.loads(file.read_text())["pid"] for file in files]
    return Served(process, folder, url, folder / "token", pids)


def test_serve(served: Served, model: Path) -> None:
    first = served.asked()
    check_answers(first)
    assert "rollout.vllm.urls=[" + served.url in served.output
    assert served.token_file.stat().st_mode & 0o777 == 0o600

    tensors = load_file(model / "model.safetensors")
    client = ServerClient(served.url, served.token_file.read_text().strip())
    scaled = [(name, tensor * 1.3) for name, tensor in tensors.items()]
    sent = send_folder(client, served.folder / "weights/p1", scaled, version=1)
    changed = served.asked()
    assert changed["texts"]["policy"] != first["texts"]["policy"]
    assert changed["texts"]["ema"] == first["texts"]["ema"]
    assert changed["fingerprints"]["policy"] == f"1-{sent.digest[:12]}"
    assert changed["fingerprints"]["ema"] == "-1-initial"

    send_group(client, served.folder / "unseen", list(tensors.items()), version=2)
    back = served.asked()
    assert back["texts"] == first["texts"]
    assert back["fingerprints"]["policy"].startswith("2-")
    client.close()

    assert all(map(alive, served.pids))
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(120) == 0, served.output
    wait_for(lambda: not any(map(alive, served.pids)), "the engines' end", 60)


def check_answers(found: dict[str, Any]) -> None:
    assert found["models"] == ["ema", "policy"] and found["one"] == "ema"
    # Both sets are still what the folder held.
    assert found["texts"]["policy"] == found["texts"]["ema"] != ""
    text = found["texts"]["policy"]
    assert found["streamed"] == text and found["usage"] == 8
    assert len({*found["two"]}) == 2
    assert found["cut"] == text[: text.index(text[3:5])]
    assert found["completion"]
    assert found["errors"] == {
        "unknown model": ["NotFoundError", "model_not_found", "model"],
        "unsupported": ["BadRequestError", "unsupported_parameter", "frequency_penalty"],
        "token": "refused",
    }


def send_folder(
    client: ServerClient, folder: Path, tensors: list[tuple[str, torch.Tensor]], version: int
) -> Manifest:
    manifest = write_weights(
        folder, tensors, weight_set=WeightSet.POLICY, version=version, run="test"
    )
    source = FolderSource(folder=str(folder))
    report = client.update(WeightsCall(manifest=manifest, source=source, timeout_s=120.0))
    assert report.stamp == manifest.stamp
    return manifest


def send_group(
    client: ServerClient, folder: Path, tensors: list[tuple[str, torch.Tensor]], version: int
) -> None:
    """The server never sees this folder: the tensors are broadcast to it."""
    manifest = write_weights(
        folder, tensors, weight_set=WeightSet.POLICY, version=version, run="test"
    )
    sender = GroupSender("127.0.0.1", "gloo", 2, 120.0)
    thread = threading.Thread(target=sender.send, args=(tensors,), daemon=True)
    thread.start()
    call = WeightsCall(manifest=manifest, source=sender.source(1), timeout_s=120.0)
    assert client.update(call).stamp == manifest.stamp
    thread.join(60)
    assert not thread.is_alive()
