from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    FolderSource,
    GenerateCall,
    GroupSource,
    Health,
    LabelRecord,
    LabelsCall,
    Line,
    Manifest,
    ParamsRecord,
    Probe,
    RequestRecord,
    Stamp,
    TensorEntry,
    WeightsCall,
)
from nemo_selfpref.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    LabelScores,
    SamplingParams,
    WeightSet,
)

REQUEST = {"id": "a", "prompt_ids": [5, 6], "seed": 3}
PARAMS = {"max_new_tokens": 4}
CALL = {"requests": [REQUEST], "params": PARAMS}
COMPLETION = {
    "id": "a",
    "token_ids": [7],
    "logprobs": [-0.5],
    "finish_reason": "stop",
    "weight_set": "ema",
    "weight_version": 3,
    "weight_digest": "d",
}
MANIFEST = {
    "weight_set": "policy",
    "version": 1,
    "run": "r",
    "digest": "0" * 64,
    "tensors": [
        {"name": "w", "shape": [2], "dtype": "float32", "sha256": "1" * 64, "file": "f.safetensors"}
    ],
}


def again(record: BaseModel) -> BaseModel:
    """There and back over JSON."""
    return type(record).model_validate_json(record.model_dump_json())


def parsed(kind: type[BaseModel], **fields: Any) -> BaseModel:
    return kind.model_validate_json(json.dumps(fields))


def test_what_is_asked_comes_back_as_it_was() -> None:
    for request in (
        GenerationRequest("a", (5, 6), 2**63 - 1, 3),
        GenerationRequest("\u00fc \n", (0,)),
    ):
        record = again(RequestRecord.of(request))
        assert isinstance(record, RequestRecord) and record.request() == request
    params = SamplingParams(9, 0.7, 0.9, 40, (3, 4))
    record = again(ParamsRecord.of(params))
    assert isinstance(record, ParamsRecord) and record.params() == params
    # A whole number is a temperature, too: YAML makes no difference.
    assert ParamsRecord.of(SamplingParams(9, temperature=1)).temperature == 1.0


def test_what_is_answered_comes_back_as_it_was() -> None:
    completion = Completion(
        "a", (7, 2), (-0.1, -1 / 3), FinishReason.STOP, WeightSet.EMA, 12, cached_tokens=128
    )
    record = again(CompletionRecord.of(completion, "digest"))
    assert isinstance(record, CompletionRecord)
    assert record.completion() == completion and record.weight_digest == "digest"
    label = again(LabelRecord(index=3, logprobs=[-1 / 7, -2.0], best=-0.1))
    assert isinstance(label, LabelRecord)
    assert label.scores() == LabelScores((-1 / 7, -2.0), -0.1)


def test_a_call() -> None:
    call = parsed(GenerateCall, **CALL)
    assert isinstance(call, GenerateCall)
    assert call.weight_set is WeightSet.POLICY and call.expect is None and call.timeout_s is None
    expect = {"version": 3, "digest": "d"}
    call = parsed(LabelsCall, prompts=[[5]], labels=[1], weight_set="ema", expect=expect)
    assert isinstance(call, LabelsCall) and again(call) == call
    assert call.weight_set is WeightSet.EMA and call.expect == Stamp(version=3, digest="d")


def test_a_line_says_one_thing() -> None:
    assert Line().json_line() == b"{}\n"
    assert Line(done=3).json_line() == b'{"done":3}\n'
    record = CompletionRecord.model_validate_json(json.dumps(COMPLETION))
    line = Line(completion=record)
    assert line.json_line().count(b"\n") == 1 and Line.model_validate_json(line.json_line()) == line
    assert set(json.loads(line.json_line())) == {"completion"}


def test_where_weights_come_from() -> None:
    folder = parsed(WeightsCall, manifest=MANIFEST, source={"kind": "folder", "folder": "/f"})
    assert isinstance(folder, WeightsCall) and folder.source == FolderSource(folder="/f")
    group = {"kind": "group", "backend": "gloo", "host": "h", "port": 9, "rank": 1, "world_size": 2}
    call = parsed(WeightsCall, manifest=MANIFEST, source=group)
    assert isinstance(call, WeightsCall) and isinstance(call.source, GroupSource)
    assert again(call) == call
    assert call.manifest.stamp == Stamp(version=1, digest="0" * 64)
    assert str(call.manifest.stamp) == "version 1 (000000000000)"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (RequestRecord, {**REQUEST, "seed": -1}),
        (RequestRecord, {**REQUEST, "seed": 2**63}),
        (RequestRecord, {**REQUEST, "seed": 1.0}),
        (RequestRecord, {**REQUEST, "seed": "1"}),
        (RequestRecord, {**REQUEST, "seed": True}),
        (RequestRecord, {**REQUEST, "prompt_ids": [-1]}),
        (RequestRecord, {**REQUEST, "prompt_ids": [2**31]}),
        (RequestRecord, {**REQUEST, "prompt_ids": ["5"]}),
        (RequestRecord, {**REQUEST, "prompt_ids": "56"}),
        (RequestRecord, {**REQUEST, "max_new_tokens": 0}),
        (RequestRecord, {**REQUEST, "id": 1}),
        (RequestRecord, {**REQUEST, "more": 1}),
        (RequestRecord, {"id": "a"}),
        (ParamsRecord, {**PARAMS, "temperature": -0.1}),
        (ParamsRecord, {**PARAMS, "temperature": float("nan")}),
        (ParamsRecord, {**PARAMS, "temperature": float("inf")}),
        (ParamsRecord, {**PARAMS, "top_p": 0.0}),
        (ParamsRecord, {**PARAMS, "top_p": 1.01}),
        (ParamsRecord, {**PARAMS, "top_k": -1}),
        (ParamsRecord, {**PARAMS, "stop_token_ids": [-1]}),
        (ParamsRecord, {"max_new_tokens": 0}),
        (GenerateCall, {**CALL, "weight_set": "other"}),
        (GenerateCall, {**CALL, "timeout_s": 0}),
        (GenerateCall, {**CALL, "expect": {"version": 1}}),
        (LabelsCall, {"prompts": [[5]], "labels": []}),
        (CompletionRecord, {**COMPLETION, "finish_reason": "abort"}),
        (CompletionRecord, {**COMPLETION, "logprobs": [float("-inf")]}),
        (CompletionRecord, {**COMPLETION, "logprobs": [None]}),
        (CompletionRecord, {**COMPLETION, "weight_version": "3"}),
        (Line, {"done": 1, "other": 2}),
        (Manifest, {**MANIFEST, "digest": "0" * 63}),
        (Manifest, {**MANIFEST, "tensors": [{**MANIFEST["tensors"][0], "dtype": "float64"}]}),
        (TensorEntry, {**MANIFEST["tensors"][0], "sha256": "X" * 64}),
        (Probe, {"token_ids": [5], "logprob": -1.0, "tolerance": 1e-3}),
        (Probe, {"token_ids": [5, 6], "logprob": -1.0, "tolerance": 0}),
        (WeightsCall, {"manifest": MANIFEST, "source": {"folder": "/f", "kind": "elsewhere"}}),
        (WeightsCall, {"manifest": MANIFEST, "source": {"kind": "folder"}}),
        (Health, {"status": "well"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value)[:60],
)
def test_what_is_not_of_the_form_is_refused(kind: type[BaseModel], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        parsed(kind, **fields)


def test_the_forms_above_are_right_but_for_the_one_fault() -> None:
    for kind, fields in (
        (RequestRecord, REQUEST),
        (ParamsRecord, PARAMS),
        (GenerateCall, CALL),
        (LabelsCall, {"prompts": [[5]], "labels": [1]}),
        (CompletionRecord, COMPLETION),
        (Manifest, MANIFEST),
        (TensorEntry, MANIFEST["tensors"][0]),
        (Probe, {"token_ids": [5, 6], "logprob": -1.0, "tolerance": 1e-3}),
        (Health, {"status": "serving"}),
    ):
        assert isinstance(parsed(kind, **fields), kind)


def test_a_record_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Stamp(version=1, digest="d").version = 2  # type: ignore[misc]
