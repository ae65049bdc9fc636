"""Weights handed to rollout servers: written whole, announced with a probe, confirmed or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import MakePolicy, in_precision, save_llama, scale
from transformers import AutoModelForCausalLM

from nemo_selfpref.checkpoint.export import export_checkpoint
from nemo_selfpref.checkpoint.hf_weights import RandomSource
from nemo_selfpref.checkpoint.sharded import load_state
from nemo_selfpref.checkpoint.training_state import save_weights
from nemo_selfpref.checkpoint.verify import verify_export
from nemo_selfpref.config.schema import Precision, WeightTransport
from nemo_selfpref.data.tokenizer import ChatTokenizer
from nemo_selfpref.errors import CheckpointError, RolloutError, RolloutTimeout, WeightSyncError
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.megatron.weights import WeightSets
from nemo_selfpref.rollout.serving.manifest import (
    check_complete,
    facts_of_folder,
    read_manifest,
    verify_files,
)
from nemo_selfpref.rollout.serving.receiver import receive
from nemo_selfpref.rollout.serving.wire import FolderSource, Stamp, UpdateReport, WeightsCall
from nemo_selfpref.training.publish import WeightPublisher, probe_ids, write_model_folder
from nemo_selfpref.types import WeightSet

POLICY, EMA, FROZEN, LAGGED = WeightSet.POLICY, WeightSet.EMA, WeightSet.FROZEN, WeightSet.LAGGED
NAME = "model.layers.2.self_attn.k_proj.weight"


class Server:
    """Checks what it is handed as an engine does, and remembers the calls."""

    def __init__(self) -> None:
        self.calls: list[WeightsCall] = []
        self.failure: Exception | None = None

    def __call__(self, call: WeightsCall) -> UpdateReport:
        assert isinstance(call.source, FolderSource)
        assert read_manifest(Path(call.source.folder)) == call.manifest
        verify_files(Path(call.source.folder), call.manifest)
        self.calls.append(call)
        if self.failure is not None:
            raise self.failure
        return UpdateReport(
            stamp=call.manifest.stamp, wait_s=0, verify_s=0, load_s=0, probe_s=0, probe_error=0
        )


@pytest.fixture
def weights(policy: Policy) -> WeightSets:
    return WeightSets(policy)


@pytest.fixture
def publisher(policy: Policy, weights: WeightSets, tmp_path: Path) -> WeightPublisher:
    return WeightPublisher(policy, weights, folder=tmp_path / "weights", run="run-1")


def folders(publisher: WeightPublisher) -> list[str]:
    return sorted(path.name for path in publisher.folder.iterdir())


def test_what_a_server_is_handed(
    publisher: WeightPublisher, policy: Policy, llama_folder: Path
) -> None:
    policy.weight_version = 7
    server = Server()
    stamp = publisher.publish(POLICY, server)
    (call,) = server.calls
    assert (call.manifest.weight_set, call.manifest.version, call.manifest.run) == (
        POLICY,
        7,
        "run-1",
    )
    assert stamp == call.manifest.stamp == publisher.stamp(POLICY)
    check_complete(call.manifest, facts_of_folder(llama_folder))
    written = load_file(publisher.folder / "policy-7-1" / "weights-00000.safetensors")
    for name, tensor in load_file(llama_folder / "model.safetensors").items():
        assert torch.equal(written[name], tensor), name
    assert publisher.last.bytes == sum(t.nbytes for t in written.values())
    assert publisher.last.gather_s > 0 and publisher.last.write_s > 0
    assert publisher.reports[0].probe_error == 0


def test_the_probe_is_what_transformers_computes(
    publisher: WeightPublisher, policy: Policy, weights: WeightSets, tokenizer: ChatTokenizer
) -> None:
    """Under each set of weights, and the network holds the policy's again afterwards."""
    weights.take(LAGGED, POLICY)
    scale(policy, 1.2)
    found = {}
    for name in (POLICY, LAGGED):
        server = Server()
        publisher.publish(name, server)
        (call,) = server.calls
        assert call.manifest.probe is not None
        found[name] = call.manifest.probe
    folder = publisher.folder.parent / "model"
    write_model_folder(policy, tokenizer, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    probe = found[POLICY]
    with torch.no_grad():
        logprobs = model(torch.tensor([probe.token_ids])).logits[0].log_softmax(-1)
    expected = sum(float(logprobs[i, token]) for i, token in enumerate(probe.token_ids[1:]))
    assert probe.logprob == pytest.approx(expected, abs=1e-3)
    assert abs(found[LAGGED].logprob - probe.logprob) > 0.1
    assert len(probe.token_ids) == 16 and probe.tolerance == 1e-3


def test_the_probe_fits_the_model(policy: Policy) -> None:
    assert len(probe_ids(policy)) == 16
    assert len(probe_ids(policy, max_length=10)) == 9
    assert probe_ids(policy) == probe_ids(policy)
    assert max(probe_ids(policy)) < 500


def test_in_bf16(policy: Policy, llama_folder: Path, tmp_path: Path) -> None:
    half = in_precision(policy, Precision.bf16, llama_folder)
    weights, server = WeightSets(half), Server()
    weights.take(EMA, POLICY)
    publisher = WeightPublisher(half, weights, folder=tmp_path, run="r")
    publisher.publish(EMA, server)
    manifest = server.calls[0].manifest
    assert {entry.dtype for entry in manifest.tensors} == {"bfloat16"}
    assert manifest.probe is not None and manifest.probe.tolerance == 0.1


def test_equal_weights_have_one_digest(
    publisher: WeightPublisher, policy: Policy, weights: WeightSets
) -> None:
    weights.take(FROZEN, POLICY)
    first = publisher.publish(POLICY, None)
    assert publisher.publish(FROZEN, None) == first
    scale(policy)
    assert publisher.publish(POLICY, None).digest != first.digest


def change_policy(weights: WeightSets) -> None:
    scale(weights.policy)


def move_average(weights: WeightSets) -> None:
    weights.average(0.5)


def take_average_again(weights: WeightSets) -> None:
    weights.take(EMA, POLICY)


def fill_average(weights: WeightSets) -> None:
    source = RandomSource(weights.policy.arch, 3)
    weights.fill(EMA, lambda state: load_state(source, state), weights.version(EMA))


def drop_average(weights: WeightSets) -> None:
    weights.drop(EMA)


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (change_policy, POLICY),
        (move_average, EMA),
        (take_average_again, EMA),
        (fill_average, EMA),
        (drop_average, EMA),
    ],
)
def test_only_what_changed_is_needed(
    change: Callable[[WeightSets], None],
    changed: WeightSet,
    publisher: WeightPublisher,
    weights: WeightSets,
) -> None:
    """An average taken anew has the version of the one before it, and other contents."""
    weights.take(EMA, POLICY)
    weights.take(LAGGED, POLICY)
    sets = (POLICY, EMA, LAGGED)
    assert all(map(publisher.needed, sets))
    for name in sets:
        publisher.publish(name, None)
    with weights.using(EMA):
        pass
    assert not any(map(publisher.needed, sets))
    change(weights)
    assert [publisher.needed(name) for name in sets] == [name is changed for name in sets]
    publisher.forget(LAGGED)
    assert publisher.needed(LAGGED) and publisher.stamp(LAGGED) is not None


def test_two_folders_of_a_set_are_kept(
    publisher: WeightPublisher, policy: Policy, weights: WeightSets
) -> None:
    weights.take(LAGGED, POLICY)
    publisher.publish(LAGGED, None)
    for _ in range(4):
        publisher.publish(POLICY, None)
        scale(policy)
    assert folders(publisher) == ["lagged-0-1", "policy-2-4", "policy-3-5"]
    publisher.close()
    assert folders(publisher) == []


@pytest.mark.parametrize(
    "failure", [RolloutTimeout("too late"), WeightSyncError("refused"), OSError("no route")]
)
def test_a_server_that_fails(
    failure: Exception, publisher: WeightPublisher, policy: Policy
) -> None:
    """The stamp stays, and so does the folder of the weights before until others are confirmed."""
    server = Server()
    first = publisher.publish(POLICY, server)
    scale(policy)
    server.failure = failure
    for _ in range(2):
        with pytest.raises(WeightSyncError, match=str(failure)):
            publisher.publish(POLICY, server)
        assert publisher.stamp(POLICY) == first and publisher.needed(POLICY)
        assert "policy-0-1" in folders(publisher)
    server.failure = None
    second = publisher.publish(POLICY, server)
    assert publisher.stamp(POLICY) == second != first and not publisher.needed(POLICY)
    assert folders(publisher) == ["policy-0-1", "policy-1-4"]


def test_one_of_two_servers_fails(publisher: WeightPublisher) -> None:
    good, bad = Server(), Server()
    bad.failure = WeightSyncError("refused")
    with pytest.raises(WeightSyncError, match=r"policy version 0 .*every server: refused"):
        publisher.publish(POLICY, [good, bad])
    assert len(good.calls) == len(bad.calls) == 1 and publisher.stamp(POLICY) is None
    bad.failure = None
    publisher.publish(POLICY, [good, bad])
    assert len(publisher.reports) == 2


def test_a_server_that_confirms_other_weights(publisher: WeightPublisher) -> None:
    def confused(call: WeightsCall) -> UpdateReport:
        return Server()(call).model_copy(update={"stamp": Stamp(version=0, digest="other")})

    with pytest.raises(WeightSyncError, match=r"a server holds version 0 \(other\)"):
        publisher.publish(POLICY, confused)


def test_by_broadcast(policy: Policy, weights: WeightSets, tmp_path: Path) -> None:
    """Two servers that see none of the trainer's folders, over the network."""
    servers = [Server(), Server()]

    def send(number: int) -> Callable[[WeightsCall], UpdateReport]:
        folder = tmp_path / f"server-{number}"
        return lambda call: servers[number](receive(call, folder))

    publisher = WeightPublisher(
        policy,
        weights,
        folder=tmp_path / "weights",
        run="r",
        transport=WeightTransport.gloo,
        timeout_s=60,
    )
    stamp = publisher.publish(POLICY, [send(0), send(1)])
    for number, server in enumerate(servers):
        (call,) = server.calls
        assert call.manifest.stamp == stamp and call.manifest.probe is not None
        assert isinstance(call.source, FolderSource)
        assert Path(call.source.folder).parent == tmp_path / f"server-{number}"


def test_a_broadcast_that_a_server_refuses(
    policy: Policy, weights: WeightSets, tmp_path: Path
) -> None:
    """Its reason is what is raised, and it is not waited for."""
    other = Server()

    def refuse(call: WeightsCall) -> UpdateReport:
        raise WeightSyncError("no room")

    publisher = WeightPublisher(
        policy,
        weights,
        folder=tmp_path / "weights",
        run="r",
        transport=WeightTransport.gloo,
        timeout_s=120,
    )
    with pytest.raises(WeightSyncError, match="no room"):
        publisher.publish(POLICY, [lambda call: other(receive(call, tmp_path / "other")), refuse])
    assert not other.calls


def test_what_is_no_number_is_not_sent(publisher: WeightPublisher, policy: Policy) -> None:
    server = Server()
    key = "decoder.layers.1.mlp.linear_fc2.weight"
    policy.module.get_parameter(key).data[3, 4] = float("nan")
    with pytest.raises(WeightSyncError, match=r"layers\.1\.mlp\.down_proj\.weight .* not finite"):
        publisher.publish(POLICY, server)
    assert not server.calls and folders(publisher) == []


def test_weights_that_compute_no_number_are_not_sent(
    publisher: WeightPublisher, policy: Policy
) -> None:
    server = Server()
    policy.module.get_parameter("decoder.final_layernorm.weight").data.fill_(3e38)
    with pytest.raises(WeightSyncError, match=r"is nan, though every weight is finite"):
        publisher.publish(POLICY, server)
    assert not server.calls


def test_a_folder_that_cannot_be_written(
    policy: Policy, weights: WeightSets, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    publisher = WeightPublisher(policy, weights, folder=tmp_path / "file", run="r")
    with pytest.raises(WeightSyncError, match=r"cannot be written .*weights_dir"):
        publisher.publish(POLICY, None)
    assert publisher.needed(POLICY)


def test_a_set_that_is_not_held(publisher: WeightPublisher) -> None:
    with pytest.raises(RolloutError, match="no ema weights are held"):
        publisher.publish(EMA, None)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "vocab_size": 501}])
def test_a_model_folder_is_an_export(
    changes: dict, make_policy: MakePolicy, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    policy = make_policy(save_llama(tmp_path / "llama", **changes))
    scale(policy, 1.1)
    write_model_folder(policy, tokenizer, tmp_path / "model")
    save_weights(tmp_path / "checkpoint", policy, tokenizer)
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "hf")
    ours, theirs = tmp_path / "model", tmp_path / "hf"
    names = {path.name for path in theirs.iterdir()} - {"manifest.json"}
    assert {path.name for path in ours.iterdir()} == names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    verify_export(policy, tokenizer, ours)


def test_a_model_folder_that_cannot_be_written(
    policy: Policy, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        write_model_folder(policy, tokenizer, tmp_path / "file" / "model")
