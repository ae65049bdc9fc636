"""Two sets of weights that share one engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from backends import FOLDER, Sender, make_backend
from contract import GREEDY, PROMPTS, Reference, requests_of, tokens_of
from safetensors.torch import load_file, save_file

from nemo_selfpref.errors import RolloutError, WeightSyncError
from nemo_selfpref.rollout.serving.local_client import BackendEngine
from nemo_selfpref.rollout.serving.vllm_backend import VLLMBackend
from nemo_selfpref.rollout.serving.wire import Probe
from nemo_selfpref.types import TokenIds, WeightSet

References = Callable[[float], Reference]
POLICY, EMA = WeightSet.POLICY, WeightSet.EMA


@pytest.fixture(scope="module")
def shared(weights_dir: Path) -> VLLMBackend:
    return make_backend(FOLDER / "model", weights_dir, "policy", "ema")


def greedy(backend: VLLMBackend, weight_set: WeightSet) -> list[TokenIds]:
    found = BackendEngine(backend).generate(requests_of(), GREEDY, weight_set)
    assert {c.weight_set for c in found} == {weight_set}
    return tokens_of(found)


def test_both_start_from_the_folder(shared: VLLMBackend, reference: References) -> None:
    want = [reference(1.0).greedy(p) for p in PROMPTS]
    assert greedy(shared, EMA) == greedy(shared, POLICY) == want


def test_each_set_keeps_its_own_weights(
    shared: VLLMBackend, sender: Sender, reference: References
) -> None:
    want = {s: [reference(s).greedy(p) for p in PROMPTS] for s in (1.0, 1.3, 0.8)}
    assert want[1.3] != want[1.0] != want[0.8] != want[1.3]
    shared.update(sender.call(1.3, 5, weight_set=POLICY, run="sets"))
    assert greedy(shared, EMA) == want[1.0] and greedy(shared, POLICY) == want[1.3]
    shared.update(sender.call(0.8, 2, weight_set=EMA, run="sets"))
    assert greedy(shared, POLICY) == want[1.3] and greedy(shared, EMA) == want[0.8]
    held = shared.health().weights
    assert (held["policy"].version, held["ema"].version) == (5, 2)


def test_both_are_asked_at_once(shared: VLLMBackend, sender: Sender, reference: References) -> None:
    shared.update(sender.call(1.3, 0, weight_set=POLICY, run="at once"))
    shared.update(sender.call(0.8, 0, weight_set=EMA, run="at once"))
    want = {
        POLICY: [reference(1.3).greedy(p) for p in PROMPTS],
        EMA: [reference(0.8).greedy(p) for p in PROMPTS],
    }

    def ask(weight_set: WeightSet) -> list[bool]:
        return [greedy(shared, weight_set) == want[weight_set] for _ in range(8)]

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, weight_set) for weight_set in (POLICY, EMA, POLICY, EMA)]
        assert [future.result(60) for future in asking] == [[True] * 8] * 4


def test_a_set_is_not_kept_waiting(shared: VLLMBackend) -> None:
    """A call stands in the line behind what came before it, not behind what comes later."""
    engine = BackendEngine(shared)
    with ThreadPoolExecutor(3) as pool:
        stop: list[bool] = []

        def ask() -> None:
            while not stop:
                engine.generate(requests_of(), GREEDY, POLICY)

        asking = [pool.submit(ask) for _ in range(2)]
        try:
            for _ in range(3):
                assert len(pool.submit(greedy, shared, EMA).result(60)) == len(PROMPTS)
        finally:
            stop.append(True)
        for future in asking:
            future.result(60)


def test_a_set_whose_files_are_gone_is_refused_and_the_other_served(
    shared: VLLMBackend, sender: Sender, reference: References
) -> None:
    call = sender.call(0.9, 0, weight_set=EMA, run="gone")
    shared.update(call)
    shared.update(sender.call(1.3, 0, weight_set=POLICY, run="gone"))
    shutil.rmtree(Path(call.source.folder))
    with pytest.raises(WeightSyncError, match="is missing"):
        greedy(shared, EMA)
    assert greedy(shared, POLICY) == [reference(1.3).greedy(p) for p in PROMPTS]
    assert shared.health().status == "serving"
    shared.update(sender.call(0.9, 1, weight_set=EMA, run="gone"))
    assert greedy(shared, EMA) == [reference(0.9).greedy(p) for p in PROMPTS]


def test_a_failed_update_of_one_set_leaves_the_other(
    shared: VLLMBackend, sender: Sender, reference: References
) -> None:
    shared.update(sender.call(1.3, 0, weight_set=POLICY, run="failed"))
    shared.update(sender.call(0.8, 0, weight_set=EMA, run="failed"))
    greedy(shared, POLICY)
    probe = Probe(token_ids=[5, 6, 7], logprob=-1.0, tolerance=1e-4)
    with pytest.raises(WeightSyncError, match="was not taken in: the probe's log-probs"):
        shared.update(sender.call(1.0, 1, weight_set=EMA, run="failed", probe=probe))
    assert greedy(shared, POLICY) == [reference(1.3).greedy(p) for p in PROMPTS]
    assert greedy(shared, EMA) == [reference(0.8).greedy(p) for p in PROMPTS]
    with pytest.raises(RolloutError, match="no frozen weights are held here"):
        greedy(shared, WeightSet.FROZEN)


def test_a_folder_that_holds_its_weights_in_another_form_too(
    weights_dir: Path, sender: Sender, reference: References, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(FOLDER / "model", model)
    save_file({"layers.0.wq": torch.zeros(4)}, model / "consolidated.safetensors")
    places = dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    made = make_backend(model, weights_dir, "policy", "ema")
    made.update(sender.call(1.3, 1, weight_set=POLICY, run="forms"))
    for _ in range(2):  # from what was sent to the folder's own, and back
        assert greedy(made, EMA) == [reference(1.0).greedy(p) for p in PROMPTS]
        assert greedy(made, POLICY) == [reference(1.3).greedy(p) for p in PROMPTS]
