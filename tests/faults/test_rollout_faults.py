"""Two real vLLM engines on a CPU: killed, stopped, and sent weights that must not be taken in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_llama
from torch import Tensor

from nemo_selfpref.errors import WeightSyncError
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.auth import make_token
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec
from nemo_selfpref.rollout.serving.fleet import Fleet, FleetSettings, LocalMember, State
from nemo_selfpref.rollout.serving.manifest import (
    digest_of,
    read_manifest,
    sha256_of_tensor,
    write_weights,
)
from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    FolderSource,
    GenerateCall,
    Manifest,
    ParamsRecord,
    RequestRecord,
    Stamp,
    WeightsCall,
)
from nemo_selfpref.types import WeightSet

PYTHON = Path(__file__).parents[2] / ".venv-rollout" / "bin" / "python"
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"{PYTHON} is missing: make rollout-env makes it"
)
SETTINGS = FleetSettings(health_every_s=1.5, suspect_after=3, start_timeout_s=300.0)
Tensors = dict[str, Tensor]


class Engines:
    """The fleet, and weights for it."""

    def __init__(self, root: Path) -> None:
        self.root, self.notes = root, list[str]()
        self.weights_dir = root / "weights"
        self.weights_dir.mkdir()
        self.model = save_llama(root / "llama", hidden_size=128, head_dim=32)
        self.tensors = load_file(self.model / "model.safetensors")
        self.token = make_token(root / "token")
        self.version = 0
        spec = EngineSpec(
            model=str(self.model),
            weights_dir=str(self.weights_dir),
            weight_sets=["policy"],
            stop_ids=[2, 0],
            tokenizer_sha256="0" * 64,
            dtype="float32",
            max_length=256,
            kv_cache_bytes=2**27,
            device="cpu",
            token_file=str(root / "token"),
            ready_file="",
        )
        self.members = [
            LocalMember(f"engine-{n}", spec, str(PYTHON), root / "processes", self.token)
            for n in range(2)
        ]
        self.fleet = Fleet(self.members, SETTINGS, self.notes.append)

    def write(self, factor: float = 1.0, tensors: Tensors | None = None) -> WeightsCall:
        """The next version: the model's tensors times a factor."""
        self.version += 1
        folder = self.weights_dir / str(self.version)
        given = tensors or {name: value * factor for name, value in self.tensors.items()}
        manifest = write_weights(
            folder, given.items(), weight_set=WeightSet.POLICY, version=self.version, run="a"
        )
        return call_of(manifest, folder)

    def ask(self, call: GenerateCall) -> dict[str, CompletionRecord]:
        found: list[CompletionRecord] = []
        self.fleet.generate(call, found.append, Until.within(300))
        assert len(found) == len(call.requests)
        return {record.id: record for record in found}

    def greedy(self, expect: Stamp | None = None) -> dict[str, list[int]]:
        """What both engines answer to the same questions, always."""
        requests = [RequestRecord(id=str(n), prompt_ids=[5, 6, 7, 8 + n]) for n in range(8)]
        params = ParamsRecord(max_new_tokens=12, temperature=0.0)
        found = self.ask(GenerateCall(requests=requests, params=params, expect=expect))
        return {name: record.token_ids for name, record in found.items()}


def call_of(manifest: Manifest, folder: Path) -> WeightsCall:
    return WeightsCall(manifest=manifest, source=FolderSource(folder=str(folder)), timeout_s=60.0)


def eventually(reached: Callable[[], bool], within_s: float = 180.0) -> None:
    end = time.monotonic() + within_s
    while not reached():
        assert time.monotonic() < end, "not reached in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    engines = Engines(tmp_path_factory.mktemp("engines"))
    engines.fleet.start(Until.within(300))
    yield engines
    engines.fleet.close()
    assert [m.child.alive for m in engines.members if m.child] == [False, False]


@pytest.fixture
def served(engines: Engines) -> Iterator[tuple[Engines, Stamp]]:
    """Both engines with new weights of which the answers are known: the same after the test."""
    sent = engines.write(1.0 + 0.02 * engines.version)
    stamp = sent.manifest.stamp
    assert engines.fleet.update(sent).stamp == stamp
    before = engines.greedy(stamp)
    yield engines, stamp
    assert engines.greedy(stamp) == before
    for member in engines.members:
        assert member.client.health().weights == {"policy": stamp}


# -- weights that must not be taken in --------------------------------------------------------


def edited(manifest: Manifest, **changes: object) -> Manifest:
    """With a digest that fits the tensors listed."""
    made = manifest.model_copy(update=changes)
    return made.model_copy(update={"digest": digest_of(made.tensors)})


def damage(call: WeightsCall) -> WeightsCall:
    path = Path(call.source.folder) / call.manifest.tensors[0].file  # type: ignore[union-attr]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return call


def not_a_number(call: WeightsCall) -> WeightsCall:
    """A file and manifest that agree on values no model can have."""
    folder = Path(call.source.folder)  # type: ignore[union-attr]
    entry = call.manifest.tensors[0]
    tensors = load_file(folder / entry.file)
    tensors[entry.name].view(-1)[3] = torch.nan
    changed = entry.model_copy(update={"sha256": sha256_of_tensor(tensors[entry.name])})
    save_file(tensors, folder / entry.file, metadata={"format": "pt"})
    return call_of(edited(call.manifest, tensors=[changed, *call.manifest.tensors[1:]]), folder)


def file_is_gone(call: WeightsCall) -> WeightsCall:
    (Path(call.source.folder) / call.manifest.tensors[0].file).unlink()  # type: ignore[union-attr]
    return call


def cut_short(call: WeightsCall) -> WeightsCall:
    manifest = call.manifest
    short = manifest.model_copy(update={"tensors": manifest.tensors[:-1]})
    return call.model_copy(update={"manifest": short})


def too_old(call: WeightsCall) -> WeightsCall:
    return call.model_copy(update={"manifest": edited(call.manifest, version=0)})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (damage, "is damaged: SHA-256 is"),
        (not_a_number, "values that are not finite"),
        (file_is_gone, "cannot be read"),
        (cut_short, "does not match its digest"),
        (too_old, "is older than version"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_weights_that_arrive_wrong_are_refused(
    served: tuple[Engines, Stamp], change: Callable[[WeightsCall], WeightsCall], why: str
) -> None:
    engines, stamp = served
    wrong = change(engines.write(2.0))
    for member in engines.members:
        with pytest.raises(WeightSyncError, match=why):
            member.client.update(wrong)
    with pytest.raises(WeightSyncError, match=why):
        engines.fleet.update(wrong)
    assert engines.fleet.health().weights == {"policy": stamp}


@pytest.mark.parametrize("what", ["shape", "missing", "type", "unknown"])
def test_weights_of_another_model_are_refused(served: tuple[Engines, Stamp], what: str) -> None:
    engines, _ = served
    tensors = dict(engines.tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    if what == "shape":
        tensors[name] = tensors[name][:-1]
    elif what == "type":
        tensors[name] = tensors[name].bfloat16()
    elif what == "unknown":
        tensors["model.layers.9.mlp.up_proj.weight"] = tensors[name].clone()
    else:
        del tensors[name]
    wrong = engines.write(tensors=tensors)
    with pytest.raises(WeightSyncError, match=r"is not this model: model\.layers\.[19]\.mlp") as e:
        engines.fleet.update(wrong)
    assert "engine-0" in str(e.value) and "engine-1" in str(e.value)


def test_a_folder_elsewhere_is_refused(served: tuple[Engines, Stamp]) -> None:
    engines, _ = served
    inside = engines.write(2.0)
    outside = engines.root / "outside"
    outside.mkdir(exist_ok=True)
    link = engines.weights_dir / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    for folder in (outside, engines.weights_dir / ".." / "outside", link):
        with pytest.raises(WeightSyncError, match="is not below"):
            engines.fleet.update(call_of(inside.manifest, folder))


def test_a_message_cut_short_changes_nothing(served: tuple[Engines, Stamp]) -> None:
    engines, _ = served
    body = engines.write(2.0).model_dump_json()
    for member in engines.members:
        headers = {"Authorization": f"Bearer {engines.token}", "Content-Type": "application/json"}
        url = f"{member.url}/rollout/weights"
        reply = httpx.post(url, content=body[: len(body) // 2], headers=headers, timeout=30)
        assert reply.status_code == 422


WRITE = """
import resource, sys
from pathlib import Path
from safetensors.torch import load_file
from nemo_selfpref.errors import WeightSyncError
from nemo_selfpref.rollout.serving.manifest import write_weights
from nemo_selfpref.types import WeightSet
model, target, limit = sys.argv[1:]
tensors = load_file(model)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    write_weights(Path(target), tensors.items(), weight_set=WeightSet.POLICY, version=99, run="a")
except WeightSyncError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("limit", [100, 100_000])
def test_a_full_disk_hands_over_nothing(served: tuple[Engines, Stamp], limit: int) -> None:
    engines, _ = served
    target = engines.weights_dir / f"full-{limit}"
    model = engines.model / "model.safetensors"
    command = [sys.executable, "-c", WRITE, str(model), str(target), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "cannot be written to" in done.stdout and "Nothing was handed over" in done.stdout
    assert not target.exists() and not list(engines.weights_dir.glob(".full*"))
    with pytest.raises(WeightSyncError, match="cannot be read"):
        read_manifest(target)


MOUNT = """
import subprocess, sys
from pathlib import Path
from safetensors.torch import load_file
from nemo_selfpref.errors import WeightSyncError
from nemo_selfpref.rollout.serving.manifest import write_weights
from nemo_selfpref.types import WeightSet
model, mount = sys.argv[1:]
small = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", mount]
if subprocess.run(small, capture_output=True).returncode:
    sys.exit("no mount")
target = Path(mount, "weights")
try:
    write_weights(
        target, load_file(model).items(), weight_set=WeightSet.POLICY, version=99, run="a"
    )
except WeightSyncError as error:
    print("refused:", error, "left:", [path.name for path in Path(mount).iterdir()])
"""


def test_a_disk_that_fills_up_hands_over_nothing(
    served: tuple[Engines, Stamp], tmp_path: Path
) -> None:
    """On a file system of 256 kB, in a mount namespace of its own."""
    engines, _ = served
    model = str(engines.model / "model.safetensors")
    command = ["unshare", "--mount", sys.executable, "-c", MOUNT, model, str(tmp_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("unshare is missing")
    if "no mount" in done.stderr or done.stderr.startswith("unshare:"):
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert "No space left on device" in done.stdout, done.stderr
    assert "Nothing was handed over" in done.stdout and "left: []" in done.stdout


# -- engines that die or go silent ------------------------------------------------------------


def many(expect: Stamp) -> GenerateCall:
    """Answers of many lengths, so that they come one after the other."""
    requests = [
        RequestRecord(id=str(n), prompt_ids=[5, 6, 7 + n], seed=n, max_new_tokens=4 + 3 * n)
        for n in range(64)
    ]
    params = ParamsRecord(max_new_tokens=250, temperature=0.7)
    return GenerateCall(requests=requests, params=params, expect=expect)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_an_engine_gone_in_the_middle_of_a_batch_loses_nothing(
    served: tuple[Engines, Stamp], number: signal.Signals
) -> None:
    engines, stamp = served
    victim, call = engines.members[0], many(stamp)
    restarts, notes = victim.restarts, len(engines.notes)
    want = engines.ask(call)
    found: list[CompletionRecord] = []

    def emit(record: CompletionRecord) -> None:
        found.append(record)
        if len(found) == 6:
            os.kill(victim.child.pid, number)  # type: ignore[union-attr]

    engines.fleet.generate(call, emit, Until.within(300))
    assert sorted(int(record.id) for record in found) == list(range(64))
    assert {record.weight_digest for record in found} == {stamp.digest}
    lengths = {record.id: len(record.token_ids) for record in found}
    assert all(lengths[name] <= 4 + 3 * int(name) for name in lengths)
    assert [r.id for r in found if r.token_ids[:4] != want[r.id].token_ids[:4]] == []
    assert any("answers of engine-0 are asked for again" in n for n in engines.notes[notes:])
    eventually(lambda: victim.state is State.SERVING and WeightSet.POLICY in victim.held)
    assert victim.restarts == restarts + 1 and victim.held == {WeightSet.POLICY: stamp}
