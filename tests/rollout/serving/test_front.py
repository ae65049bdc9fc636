"""The front: its plan, weights that arrive over the network, and the process itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from stub_engine import stub_answer
from stub_fleet import Stubs, eventually

from nemo_selfpref.config.schema import (
    Accelerator,
    AlgorithmConfig,
    Placement,
    Precision,
    RolloutConfig,
    RunConfig,
    TrainerConfig,
    VLLMConfig,
)
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import ConfigError, WeightSyncError
from nemo_selfpref.rollout.serving.auth import make_token
from nemo_selfpref.rollout.serving.client import ServerClient
from nemo_selfpref.rollout.serving.front_process import Front
from nemo_selfpref.rollout.serving.front_spec import FrontSpec
from nemo_selfpref.rollout.serving.plan import exposure_warning, front_spec_of
from nemo_selfpref.rollout.serving.receiver import GroupSender
from nemo_selfpref.rollout.serving.wire import FolderSource, Manifest, Stamp, WeightsCall
from nemo_selfpref.types import GenerationRequest, SamplingParams, WeightSet


def spec_of(tmp_path: Path, placement: Placement = Placement.colocated, **more: Any) -> FrontSpec:
    trainer = more.pop("trainer", TrainerConfig(accelerator=Accelerator.cpu))
    fingerprint = more.pop("fingerprint", "0" * 64)
    tokenizer_folder = more.pop("tokenizer_folder", tmp_path / "model")
    sets = more.pop("sets", ("policy", "ema"))
    cfg = RunConfig(
        name="r",
        trainer=trainer,
        rollout=RolloutConfig(placement=placement, vllm=VLLMConfig(**more)),
        algorithm=AlgorithmConfig(name="none"),
    )
    return front_spec_of(
        cfg,
        model_folder=tmp_path / "model",
        tokenizer_folder=tokenizer_folder,
        stop_ids=[2, 0],
        tokenizer_sha256=fingerprint,
        max_length=64,
        weight_sets=sets,
        work=tmp_path / "work",
        token_file=tmp_path / "token",
        weights_dir=tmp_path / "weights",
    )


# -- the plan ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "count", "expected"),
    [
        (Placement.colocated, 1, {"policy-0": ["policy"], "ema-0": ["ema"]}),
        (
            Placement.disaggregated,
            2,
            {"policy-0": ["policy"], "policy-1": ["policy"], "ema-0": ["ema"], "ema-1": ["ema"]},
        ),
        (Placement.shared, 1, {"shared-0": ["policy", "ema"]}),
        (Placement.shared, 2, {"shared-0": ["policy", "ema"], "shared-1": ["policy", "ema"]}),
    ],
)
def test_each_placement_has_its_engines(
    tmp_path: Path, placement: Placement, count: int, expected: dict[str, list[str]]
) -> None:
    spec = spec_of(tmp_path, placement, engines_per_set=count)
    assert {e.name: e.spec.weight_sets for e in spec.engines} == expected
    assert len({e.spec.ready_file for e in spec.engines}) == len(expected)
    assert FrontSpec.model_validate_json(spec.model_dump_json()) == spec


def test_an_engine_on_a_cpu(tmp_path: Path) -> None:
    engine = spec_of(tmp_path, max_num_seqs=7).engines[0].spec
    assert (engine.device, engine.dtype, engine.kv_cache_bytes) == ("cpu", "float32", 2**30)
    assert not engine.enable_sleep_mode
    assert (engine.max_num_seqs, engine.max_length, engine.stop_ids) == (7, 64, [0, 2])
    smaller = spec_of(tmp_path, kv_cache_gb=0.25).engines[0].spec
    assert smaller.kv_cache_bytes == 2**28


@pytest.mark.parametrize("placement", list(Placement))
def test_an_engine_on_a_gpu(tmp_path: Path, placement: Placement) -> None:
    trainer = TrainerConfig(accelerator=Accelerator.gpu, precision=Precision.bf16)
    engine = spec_of(tmp_path, placement, trainer=trainer).engines[0].spec
    assert (engine.device, engine.dtype, engine.kv_cache_bytes) == ("cuda", "bfloat16", None)
    assert engine.enable_sleep_mode == (placement is Placement.colocated)


def test_every_engine_has_its_devices(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, devices=["0", "1,2"])
    assert {e.name: e.devices for e in spec.engines} == {"policy-0": "0", "ema-0": "1,2"}
    assert [e.devices for e in spec_of(tmp_path).engines] == [None, None]
    with pytest.raises(ConfigError, match=r"devices has 3 entries for 2 engines \(policy-0, ema-0"):
        spec_of(tmp_path, devices=["0", "1", "2"])


def test_paths_and_fleet_settings(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, python="env/bin/python", max_restarts=7, health_every_s=0.5)
    assert spec.python == str(Path.cwd() / "env/bin/python")
    assert spec_of(tmp_path, python="python3").python == "python3"
    settings = spec.fleet.settings()
    assert (settings.max_restarts, settings.health_every_s) == (7, 0.5)


@pytest.mark.parametrize("name", ["VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE"])
def test_an_environment_that_opens_vllm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for harmless in ("0", "", "False"):
        monkeypatch.setenv(name, harmless)
        spec_of(tmp_path)
    for open_ in ("1", "true", "yes"):
        monkeypatch.setenv(name, open_)
        with pytest.raises(ConfigError, match=f"{name}={open_}.*unset {name}"):
            spec_of(tmp_path)


def test_a_server_for_other_machines_is_warned_of() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert exposure_warning(host) is None
    for host in ("0.0.0.0", "::", "10.0.0.5", "node7"):
        assert "not encrypted" in (exposure_warning(host) or "")


# -- weights over the network -----------------------------------------------------------------


@pytest.fixture
def stubs(tmp_path: Path) -> Iterator[Stubs]:
    stubs = Stubs(tmp_path)
    yield stubs
    stubs.close()


def broadcast(front: Front, manifest: Manifest, values: float) -> Stamp:
    """Hand a front the stubs' one tensor, full of `values`, by gloo; what it says it took."""
    sender = GroupSender("127.0.0.1", "gloo", 2, 60)
    call = WeightsCall(manifest=manifest, source=sender.source(1), timeout_s=60.0)
    tensors = [("weight", torch.full((2,), values))]
    thread = threading.Thread(target=sender.send, args=(tensors,), daemon=True)
    thread.start()
    report = front.update(call)
    thread.join(60)
    return report.stamp


def test_weights_from_a_group_reach_every_engine(stubs: Stubs, tmp_path: Path) -> None:
    fleet, _ = stubs.fleet(2)
    received = tmp_path / "received"
    front = Front(fleet, received)
    for version in (1, 2, 3):
        manifest = stubs.weights(version).manifest
        assert broadcast(front, manifest, float(version)) == manifest.stamp
        assert front.health().weights == {"policy": manifest.stamp}
    # The latest, and the one before that an engine may have to put back.
    assert sorted(p.name.split("-")[1] for p in received.iterdir()) == ["2", "3"]
    front.close()
    assert list(received.iterdir()) == []


def test_weights_that_arrive_changed_are_not_served(stubs: Stubs, tmp_path: Path) -> None:
    fleet, _ = stubs.fleet(1)
    front = Front(fleet, tmp_path / "received")
    first = stubs.weights(1).manifest
    broadcast(front, first, 1.0)
    with pytest.raises(WeightSyncError, match="did not arrive as announced: weight differs"):
        broadcast(front, stubs.weights(2).manifest, 2.5)
    assert front.health().weights == {"policy": first.stamp}
    assert [p.name.split("-")[1] for p in (tmp_path / "received").iterdir()] == ["1"]


def test_weights_in_a_folder_go_straight_on(stubs: Stubs, tmp_path: Path) -> None:
    fleet, _ = stubs.fleet(1)
    front = Front(fleet, tmp_path / "received")
    call = stubs.weights(4)
    assert front.update(call).stamp == call.manifest.stamp
    assert not (tmp_path / "received").exists()
    assert isinstance(call.source, FolderSource) and Path(call.source.folder).exists()


# -- the process ------------------------------------------------------------------------------


def stub_python(folder: Path) -> Path:
    """What starts a stub when it is told to start an engine."""
    stub = Path(__file__).with_name("stub_engine.py")
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {stub} "$3"\n')
    path.chmod(0o700)
    return path


@contextmanager
def front_process(spec: FrontSpec) -> Iterator[subprocess.Popen[bytes]]:
    folder = Path(spec.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "front.json").write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "nemo_selfpref.rollout.serving.front_process"]
    with open(folder / "front.log", "wb") as log:
        process = subprocess.Popen(
            [*command, str(folder / "front.json")],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def spec(tmp_path: Path, llama_folder: Path, tokenizer: ChatTokenizer) -> FrontSpec:
    (tmp_path / "model").mkdir()
    make_token(tmp_path / "token")
    return spec_of(
        tmp_path,
        Placement.shared,
        python=str(stub_python(tmp_path)),
        tokenizer_folder=llama_folder,
        fingerprint=tokenizer.fingerprint(),
    )


def pids(spec: FrontSpec) -> list[int]:
    files = [spec.ready_file, *(e.spec.ready_file for e in spec.engines)]
    return [json.loads(Path(file).read_text())["pid"] for file in files]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_process_answers_and_takes_its_engines_with_it(
    spec: FrontSpec, tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    token = (tmp_path / "token").read_text().strip()
    with front_process(spec) as process:
        eventually(lambda: Path(spec.ready_file).exists() or process.poll() is not None, 60)
        assert process.poll() is None, (tmp_path / "work/front.log").read_text()
        started = pids(spec)
        assert started[0] == process.pid and all(map(alive, started))
        url = f"http://127.0.0.1:{json.loads(Path(spec.ready_file).read_text())['port']}"
        client = ServerClient(url, token)
        assert client.info().weight_sets == ["ema", "policy"]
        stamp = client.health().weights["ema"]
        request = GenerationRequest("r", (5, 6), 3)
        (answer,) = client.generate([request], SamplingParams(4), WeightSet.EMA)
        assert list(answer.token_ids) == stub_answer([5, 6], 3, stamp)
        with httpx.Client(headers={"Authorization": f"Bearer {token}"}, timeout=30) as http:
            (row,) = http.get(f"{url}/rollout/fleet").json()
            assert (row["name"], row["state"]) == ("shared-0", "serving")
            body = {"model": "policy", "prompt": [5, 6], "max_tokens": 4}
            reply = http.post(f"{url}/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
        client.close()
    assert process.returncode == 0
    eventually(lambda: not any(map(alive, started)))


def test_the_process_ends_with_its_starter_while_engines_start(
    spec: FrontSpec, tmp_path: Path
) -> None:
    never = tmp_path / "python"
    never.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/engine.pid\nexec sleep 600\n")
    with front_process(spec) as process:
        eventually(lambda: (tmp_path / "engine.pid").exists(), 60)
        assert process.poll() is None
    assert process.returncode == 1
    engine = int((tmp_path / "engine.pid").read_text())
    eventually(lambda: not alive(engine))


def test_another_tokenizer_is_refused(spec: FrontSpec, tmp_path: Path) -> None:
    engine = spec.engines[0]
    other = engine.model_copy(
        update={"spec": engine.spec.model_copy(update={"tokenizer_sha256": "f" * 64})}
    )
    with front_process(spec.model_copy(update={"engines": [other]})) as process:
        assert process.wait(60) == 1
    said = (tmp_path / "work/front.log").read_text()
    assert "is not the one that shared-0 is for (ffffffffffff)" in said
