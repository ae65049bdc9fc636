"""The contract on vLLM: in a process of its own environment, and behind a server."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import httpx
import pytest

pytest.register_assert_rewrite("contract", "contract_served")

from contract import GREEDY, PROMPTS, Reference, requests_of, tokens_of, wait_for  # noqa: E402
from contract_folder import make_contract_folder  # noqa: E402
from contract_served import ServedContract, ServedSubject  # noqa: E402
from engine_server import ROLLOUT_PYTHON, ROOT, EngineServer, engine_server, needs_vllm  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from nemo_selfpref.errors import RolloutError, StaleWeightsError, WeightSyncError  # noqa: E402
from nemo_selfpref.rollout.serving.client import ServerClient  # noqa: E402
from nemo_selfpref.rollout.serving.manifest import write_weights  # noqa: E402
from nemo_selfpref.rollout.serving.wire import FolderSource, WeightsCall  # noqa: E402
from nemo_selfpref.types import WeightSet  # noqa: E402

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_contract_folder(tmp_path_factory.mktemp("contract"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    with engine_server(folder / "model", tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def client(server: EngineServer) -> ServerClient:
    return server.client


@needs_vllm
def test_vllm_in_process(folder: Path, tmp_path: Path) -> None:
    """The contract, updates and shared engines, over there; see vllm_contract/conftest.py."""
    tests = HERE / "vllm_contract"
    report = tmp_path / "report.xml"
    options = [f"--confcutdir={tests}", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [str(ROLLOUT_PYTHON), "-m", "pytest", *options, str(tests)],
        cwd=ROOT,
        env={
            **os.environ,
            "SELFPREF_CONTRACT": str(folder),
            "PYTHONPATH": str(HERE),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    ran = [case for case in ElementTree.parse(report).iter("testcase") if len(case) == 0]
    names = {str(case.get("name")).partition("[")[0] for case in ran}
    wanted = {name for name in dir(ServedContract) if name.startswith("test_")}
    for path in tests.glob("test_*.py"):
        wanted |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    assert names == wanted and len(ran) >= 75


@needs_vllm
class TestServer(ServedContract):
    @pytest.fixture(scope="class")
    def subject(self, server: EngineServer, folder: Path) -> ServedSubject:
        client = server.client
        return ServedSubject(
            client,
            Reference(folder / "model"),
            version=-1,
            running=lambda: client.health().running,
            embedded_greedy=(folder / "greedy.json").read_text(),
        )


BAD_BODIES = {
    "a negative temperature": {"params": {"max_new_tokens": 4, "temperature": -1.0}},
    "a negative seed": {"requests": [{"id": "0", "prompt_ids": [5], "seed": -1}]},
    "a seed too large": {"requests": [{"id": "0", "prompt_ids": [5], "seed": 2**63}]},
    "no limit": {"params": {"max_new_tokens": 0}},
    "a limit beyond all memory": {"params": {"max_new_tokens": 2**70}},
    "a token that is none": {"requests": [{"id": "0", "prompt_ids": [500]}]},
    "an empty prompt": {"requests": [{"id": "0", "prompt_ids": []}]},
    "text for tokens": {"requests": [{"id": "0", "prompt_ids": "5 6"}]},
    "a field nobody knows": {"logit_bias": {"5": 100}},
    "a set nobody knows": {"weight_set": "other"},
    "a set not held": {"weight_set": "ema"},
    "a temperature beyond vLLM's": {"params": {"max_new_tokens": 4, "temperature": 1e30}},
}


@needs_vllm
@pytest.mark.parametrize("change", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_refused_and_the_engine_goes_on(
    client: ServerClient, change: dict[str, object]
) -> None:
    body = {"requests": [{"id": "0", "prompt_ids": [5, 6]}], "params": {"max_new_tokens": 4}}
    reply = client._http.post("/rollout/generate", json={**body, **change})
    assert reply.status_code == 422 and reply.json()["error"]["message"]
    reply = client._http.post("/rollout/generate", json=body)
    assert reply.status_code == 200 and len(reply.text.splitlines()) == 2


@needs_vllm
def test_the_token_is_needed(client: ServerClient) -> None:
    stranger = ServerClient(client.url, "wrong" * 8)
    for ask in (
        lambda: stranger.generate(requests_of(), GREEDY),
        lambda: stranger.label_scores(PROMPTS, (10, 11)),
        stranger.info,
        stranger.sleep,
    ):
        with pytest.raises(RolloutError, match="a bearer token is needed"):
            ask()
    stranger.close()
    assert httpx.get(f"{client.url}/rollout/health", trust_env=False).status_code == 401


@needs_vllm
def test_it_cannot_sleep(client: ServerClient) -> None:
    with pytest.raises(RolloutError, match="cannot sleep: vLLM's sleep mode needs a GPU"):
        client.sleep()
    assert client.wake().status == "serving"


@needs_vllm
def test_new_weights(server: EngineServer, client: ServerClient, folder: Path) -> None:
    """The last test of this server: it leaves other weights."""
    start = client.health().weights["policy"]
    scaled = {k: v * 1.3 for k, v in load_file(folder / "model/model.safetensors").items()}

    def send(target: Path) -> WeightsCall:
        manifest = write_weights(
            target, scaled.items(), weight_set=WeightSet.POLICY, version=3, run="run"
        )
        return WeightsCall(manifest=manifest, source=FolderSource(folder=str(target)))

    with pytest.raises(WeightSyncError, match="is not below"):
        client.update(send(folder / "elsewhere"))
    assert client.health().weights["policy"] == start
    call = send(server.weights_dir / "sent")
    assert client.update(call).stamp == call.manifest.stamp
    reference = Reference(folder / "model", 1.3)
    fresh = ServerClient(client.url, server.token, expect=lambda _: call.manifest.stamp)
    found = fresh.generate(requests_of(), GREEDY)
    assert tokens_of(found) == [reference.greedy(p) for p in PROMPTS]
    assert {c.weight_version for c in found} == {3}
    fresh.close()
    stale = ServerClient(client.url, server.token, expect=lambda _: start)
    with pytest.raises(StaleWeightsError, match=r"version 3 \(.*\) are held"):
        stale.generate(requests_of(), GREEDY)
    stale.close()


@needs_vllm
def test_a_client_that_dies_leaves_no_work_behind(server: EngineServer) -> None:
    """The reply is dropped in the middle; nobody reads its lines any more."""
    client = server.client
    wait_for(lambda: client.health().running == 0, "the engine is idle")
    prompts = [{"id": str(i), "prompt_ids": [3 + i % 400, 7]} for i in range(512)]
    body = {"requests": prompts, "params": {"max_new_tokens": 400, "temperature": 0.0}}
    with client._http.stream("POST", "/rollout/generate", json=body) as reply:
        assert reply.status_code == 200
        wait_for(lambda: client.health().running > 0, "the call runs")
    wait_for(lambda: client.health().running == 0, "the call was ended")
