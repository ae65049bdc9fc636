"""New weights while questions are asked. Every test leaves other weights than it found, so none
counts on those of another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from backends import FOLDER, Sender, make_backend
from contract import (
    GREEDY,
    HOT,
    LONG,
    PROMPTS,
    Reference,
    long_requests,
    requests_of,
    tokens_of,
    wait_for,
)

from nemo_selfpref.errors import RolloutCancelled, RolloutError, StaleWeightsError, WeightSyncError
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.local_client import BackendEngine
from nemo_selfpref.rollout.serving.vllm_backend import VLLMBackend
from nemo_selfpref.rollout.serving.wire import (
    FolderSource,
    GenerateCall,
    LabelsCall,
    ParamsRecord,
    Probe,
    RequestRecord,
    Stamp,
)
from nemo_selfpref.types import Completion, GenerationRequest, SamplingParams, TokenIds, WeightSet

References = Callable[[float], Reference]
NEAR = 1e-3
"""Between log-probs of two implementations over long answers and scaled weights."""


def made_by(reference: Reference, prompt: TokenIds, completion: Completion) -> None:
    want = reference.of_answer(prompt, completion.token_ids)
    assert completion.logprobs == pytest.approx(want, abs=NEAR)


def serves(backend: VLLMBackend, reference: Reference) -> None:
    found = BackendEngine(backend).generate(requests_of(), GREEDY)
    assert tokens_of(found) == [reference.greedy(p) for p in PROMPTS]
    for prompt, completion in zip(PROMPTS, found, strict=True):
        made_by(reference, prompt, completion)


def stamp(backend: VLLMBackend) -> Stamp:
    return backend.health().weights["policy"]


def in_line(backend: VLLMBackend) -> int:
    """Calls and updates that wait for what runs."""
    return backend._line.waiting


def test_new_weights_are_served(
    backend: VLLMBackend, sender: Sender, reference: References
) -> None:
    for version, scale in enumerate((1.2, 0.9, 1.2)):
        call = sender.call(scale, version, run="served")
        report = backend.update(call)
        assert report.stamp == call.manifest.stamp == stamp(backend)
        assert min(report.wait_s, report.verify_s, report.load_s, report.probe_s) >= 0
        assert report.probe_error is None
        serves(backend, reference(scale))


def test_the_prefix_cache_does_not_outlive_the_weights(
    backend: VLLMBackend, sender: Sender, reference: References
) -> None:
    asked = GenerationRequest("x", tuple(3 + i * 5 % 490 for i in range(200)))
    engine = BackendEngine(backend)
    for version, scale in enumerate((1.1, 0.8, 0.8)):  # the same weights again, too
        backend.update(sender.call(scale, version, run="cache"))
        first, again = (engine.generate([asked], GREEDY)[0] for _ in range(2))
        assert (first.cached_tokens, again.cached_tokens) == (0, 128)
        assert again.token_ids == first.token_ids == reference(scale).greedy(asked.prompt_ids)


def test_an_update_waits_for_what_runs(
    backend: VLLMBackend, sender: Sender, reference: References
) -> None:
    backend.update(sender.call(1.0, 0, run="waits"))
    engine, before = BackendEngine(backend), stamp(backend)
    newer = sender.call(1.3, 1, run="waits")
    asked = [
        GenerationRequest(str(i), (3 + i, 7, 11), i, max_new_tokens=300 + i) for i in range(64)
    ]
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(engine.generate, asked, SamplingParams(400))
        wait_for(lambda: backend.health().running >= 64, "the first call runs")
        update = pool.submit(backend.update, newer)
        wait_for(lambda: in_line(backend) == 1, "the update waits")
        # Behind the update in the line: the check passes, the weights change, it is refused.
        held = BackendEngine(backend, expect=lambda _: before)
        late = pool.submit(held.generate, requests_of(), HOT)
        after = engine.generate(requests_of(), GREEDY)
        assert update.result(60).stamp.version == 1
        with pytest.raises(StaleWeightsError, match=r"version 0 .* were asked for; version 1 "):
            late.result(60)
        for request, completion in zip(asked, running.result(60), strict=True):
            assert completion.weight_version == 0
            made_by(reference(1.0), request.prompt_ids, completion)
    assert {c.weight_version for c in after} == {1}
    assert tokens_of(after) == [reference(1.3).greedy(p) for p in PROMPTS]


def test_calls_during_updates_carry_one_version_each_and_the_right_one(
    backend: VLLMBackend, sender: Sender, reference: References
) -> None:
    scales = {0: 1.0, 1: 1.25, 2: 0.85, 3: 1.0, 4: 1.25}
    backend.update(sender.call(scales[0], 0, run="flight"))
    calls = [sender.call(scales[v], v, run="flight") for v in (1, 2, 3, 4)]
    engine, stop = BackendEngine(backend), threading.Event()
    params = SamplingParams(24, 0.9)
    seen: list[tuple[int, int, list[Completion]]] = []

    def ask(number: int) -> None:
        while not stop.is_set():
            first = stamp(backend).version
            found = engine.generate(requests_of(seed=str(number)), params)
            seen.append((first, stamp(backend).version, found))

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask, number) for number in range(3)]
        try:
            for call in calls:
                count = len(seen)
                wait_for(lambda count=count: len(seen) >= count + 4, "calls between two updates")
                backend.update(call)
                (fresh,) = engine.generate(requests_of(PROMPTS[:1]), params)
                assert fresh.weight_version == call.manifest.version
        finally:
            stop.set()
        for future in asking:
            future.result(60)
    assert {found[0].weight_version for _, _, found in seen} >= {1, 2, 3}
    for first, last, found in seen:
        (version,) = {c.weight_version for c in found}
        assert first <= version <= last
        made_by(reference(scales[version]), PROMPTS[2], found[2])


def test_other_weights_than_expected(
    backend: VLLMBackend, sender: Sender, reference: References
) -> None:
    backend.update(sender.call(1.0, 3, run="expected"))
    right, other = stamp(backend), Stamp(version=4, digest="0" * 64)
    found = BackendEngine(backend, expect=lambda _: right).generate(requests_of(), GREEDY)
    assert {c.weight_version for c in found} == {3}
    stale = BackendEngine(backend, expect=lambda _: other)
    with pytest.raises(StaleWeightsError, match=r"version 4 .* asked for; version 3 .* are held"):
        stale.generate(requests_of(), GREEDY)
    with pytest.raises(StaleWeightsError, match=r"version 4 .* asked for; version 3 .* are held"):
        stale.label_scores(PROMPTS, (10, 11))


def test_a_probe(backend: VLLMBackend, sender: Sender, reference: References) -> None:
    ids = (5, 6, 7, 8, 9, 10, 11)
    logprob = sum(reference(1.0).of_answer(ids[:1], ids[1:]))
    probe = Probe(token_ids=list(ids), logprob=logprob, tolerance=1e-4)
    report = backend.update(sender.call(1.0, 0, run="probe", probe=probe))
    assert report.probe_error is not None and report.probe_error <= 1e-4
    before = stamp(backend)
    wrong = sender.call(1.3, 1, run="probe", probe=probe)
    message = "was not taken in: the probe's log-probs are .* a token from the trainer's"
    with pytest.raises(WeightSyncError, match=message) as caught:
        backend.update(wrong)
    assert f"{before} is served" in str(caught.value)
    assert stamp(backend) == before and backend.health().status == "serving"
    serves(backend, reference(1.0))
    for ids in ([5] * 512, [5, 500]):
        bad = probe.model_copy(update={"token_ids": ids})
        with pytest.raises(WeightSyncError, match="is no prompt of this model"):
            backend.update(sender.call(1.3, 1, run="probe", probe=bad))
    serves(backend, reference(1.0))


def test_versions_do_not_go_back_within_a_run(
    backend: VLLMBackend, sender: Sender, reference: References
) -> None:
    backend.update(sender.call(1.0, 7, run="one"))
    with pytest.raises(WeightSyncError, match=r"version 6 .* is older than version 7 .*: refused"):
        backend.update(sender.call(1.3, 6, run="one"))
    serves(backend, reference(1.0))
    backend.update(sender.call(1.3, 7, run="one"))  # another process of the trainer is another run
    backend.update(sender.call(0.9, 2, run="two"))
    assert stamp(backend).version == 2
    serves(backend, reference(0.9))


def test_an_update_overtaken_by_a_newer_one_is_refused(
    backend: VLLMBackend, sender: Sender, reference: References
) -> None:
    backend.update(sender.call(1.0, 0, run="overtaken"))
    newer, older = sender.call(1.3, 2, run="overtaken"), sender.call(0.9, 1, run="overtaken")
    gone = threading.Event()
    with ThreadPoolExecutor(3) as pool:
        long = pool.submit(
            BackendEngine(backend).generate,
            long_requests(),
            LONG,
            until=Until(cancelled=gone.is_set),
        )
        wait_for(lambda: backend.health().running >= 64, "the long call runs")
        first = pool.submit(backend.update, newer)
        wait_for(lambda: in_line(backend) == 1, "the newer update waits")
        second = pool.submit(backend.update, older)
        wait_for(lambda: in_line(backend) == 2, "the older update waits behind it")
        gone.set()
        assert first.result(60).stamp.version == 2
        with pytest.raises(WeightSyncError, match=r"version 1 .* is older than version 2"):
            second.result(60)
        with pytest.raises(RolloutCancelled):
            long.result(60)
    serves(backend, reference(1.3))


def test_an_update_does_not_wait_forever(
    backend: VLLMBackend, sender: Sender, reference: References
) -> None:
    backend.update(sender.call(1.0, 0, run="forever"))
    gone = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(
            BackendEngine(backend).generate,
            long_requests(),
            LONG,
            until=Until(cancelled=gone.is_set),
        )
        wait_for(lambda: backend.health().running > 0, "the long call runs")
        message = "was not loaded: what runs did not end within .* version 0 .* is served"
        with pytest.raises(WeightSyncError, match=message):
            backend.update(sender.call(1.3, 1, run="forever", timeout_s=0.3))
        gone.set()
        with pytest.raises(RolloutCancelled):
            long.result(60)
    serves(backend, reference(1.0))


def test_weights_that_are_not_whole_are_refused(
    backend: VLLMBackend, sender: Sender, reference: References, tmp_path: Path
) -> None:
    backend.update(sender.call(1.0, 0, run="whole"))

    def damaged() -> Path:
        return Path(call.source.folder) / "weights-00000.safetensors"

    refusals: list[str] = []
    for case in ("flipped", "cut", "gone", "extra", "partial", "outside", "foreign set"):
        call = sender.call(1.3, 1, run="whole")
        assert isinstance(call.source, FolderSource)
        if case == "flipped":
            data = bytearray(damaged().read_bytes())
            data[-5] ^= 1
            damaged().write_bytes(data)
        elif case == "cut":
            damaged().write_bytes(damaged().read_bytes()[:-100])
        elif case == "gone":
            damaged().unlink()
        elif case == "extra":  # a file the manifest does not speak of
            other = Path(sender.call(0.5, 1, run="whole").source.folder)
            (damaged().with_name("weights-00001.safetensors")).write_bytes(
                (other / damaged().name).read_bytes()
            )
        elif case == "partial":
            tensors = call.manifest.tensors[:-1]
            manifest = call.manifest.model_copy(update={"tensors": tensors})
            call = call.model_copy(update={"manifest": manifest})
        elif case == "outside":
            call = call.model_copy(update={"source": FolderSource(folder=str(tmp_path))})
        else:
            manifest = call.manifest.model_copy(update={"weight_set": WeightSet.EMA})
            call = call.model_copy(update={"manifest": manifest})
        with pytest.raises(WeightSyncError) as caught:
            backend.update(call)
        refusals.append(str(caught.value))
        assert stamp(backend).version == 0 and backend.health().status == "serving"
    serves(backend, reference(1.0))
    wanted = (
        "damaged",
        "cannot be read",
        "cannot be read",
        "comes twice",
        "digest",
        "is not below",
    )
    for message, part in zip(refusals, (*wanted, "does not hold ema"), strict=True):
        assert part in message


def test_sleep_needs_a_gpu(backend: VLLMBackend) -> None:
    with pytest.raises(RolloutError, match="cannot sleep: vLLM's sleep mode needs a GPU"):
        backend.sleep()
    backend.wake()
    assert backend.health().status == "serving"


def test_what_vllm_itself_refuses_does_not_end_the_engine(
    backend: VLLMBackend, sender: Sender, reference: References
) -> None:
    """Past the check, where a mistake of ours would get."""
    backend.update(sender.call(1.0, 0, run="refused"))
    good = RequestRecord.of(requests_of()[0])
    bad = good.model_copy(update={"prompt_ids": [5] * 600})
    calls = [
        GenerateCall(requests=[good], params=ParamsRecord(max_new_tokens=4, temperature=3.0)),
        GenerateCall(requests=[good, bad], params=ParamsRecord(max_new_tokens=4)),
        GenerateCall(requests=[good, good], params=ParamsRecord(max_new_tokens=4, temperature=9)),
    ]
    for call in calls:
        with pytest.raises(RolloutError, match="vLLM refused or failed"):
            backend.generate(call, lambda _: None, Until.within(30))
    for labels in ([10_000], list(range(300))):
        with pytest.raises(RolloutError, match="vLLM refused or failed"):
            backend.label_scores(
                LabelsCall(prompts=[[5]], labels=labels), lambda _: None, Until.within(30)
            )
    assert backend.health().running == 0
    serves(backend, reference(1.0))


def test_a_caller_that_fails_does_not_end_the_engine(
    backend: VLLMBackend, sender: Sender, reference: References
) -> None:
    backend.update(sender.call(1.0, 0, run="failing"))

    def emit(record: object) -> None:
        raise RuntimeError("nobody listens")

    records = [RequestRecord.of(r) for r in requests_of()]
    call = GenerateCall(requests=records, params=ParamsRecord(max_new_tokens=4))
    with pytest.raises(RolloutError, match="nobody listens"):
        backend.generate(call, emit, Until.within(30))
    assert backend.health().running == 0
    serves(backend, reference(1.0))


def test_tied_embeddings(weights_dir: Path) -> None:
    tied = make_backend(FOLDER / "tied", weights_dir, "policy")
    sender = Sender(FOLDER / "tied", weights_dir)
    assert "lm_head.weight" not in sender.tensors
    serves(tied, Reference(FOLDER / "tied"))
    for version, scale in enumerate((1.4, 0.8)):
        tied.update(sender.call(scale, version, run="tied"))
        serves(tied, Reference(FOLDER / "tied", scale))
    (score,) = BackendEngine(tied).label_scores(PROMPTS[:1], (10, 11))
    want = Reference(FOLDER / "tied", 0.8).next(PROMPTS[0])[[10, 11]].tolist()
    assert score.logprobs == pytest.approx(want, abs=NEAR)


def test_an_engine_that_was_closed_says_so(weights_dir: Path) -> None:
    closed = make_backend(FOLDER / "model", weights_dir, "policy")
    engine = BackendEngine(closed)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(engine.generate, long_requests(64), LONG)
        wait_for(lambda: closed.health().running > 0, "the call runs")
        closed.close()
        with pytest.raises(RolloutError, match="the engine was closed"):
            running.result(60)
    assert closed.health().status == "quarantined"
    with pytest.raises(RolloutError, match="the engine was closed"):
        engine.generate(requests_of(), replace(GREEDY, max_new_tokens=1))
    call = GenerateCall(
        requests=[RequestRecord.of(requests_of()[0])], params=ParamsRecord(max_new_tokens=1)
    )
    with pytest.raises(RolloutError, match="the engine was closed"):
        closed.generate(call, lambda _: None, Until.within(30))
    with suppress(RolloutError):
        closed.wake()
