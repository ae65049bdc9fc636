"""What travels between a rollout server and its clients: JSON, nothing else, every field checked.

Replies to /rollout/generate and /rollout/labels are lines of JSON, one as soon as each answer is
there, the last of them {"done": count} or {"error": ...}.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from nemo_selfpref.types import (
    Completion,
    FinishReason,
    GenerationRequest,
    LabelScores,
    SamplingParams,
    WeightSet,
)

Token = Annotated[int, Field(ge=0, lt=2**31)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Strict: unknown fields and values of another type are refused, numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Stamp(Record):
    """Which weights: their version, and the digest of their contents (Manifest.digest)."""

    version: int
    digest: str

    def __str__(self) -> str:
        return f"version {self.version} ({self.digest[:12]})"


class RequestRecord(Record):
    id: str
    prompt_ids: list[Token]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None

    @classmethod
    def of(cls, request: GenerationRequest) -> RequestRecord:
        return cls(
            id=request.id,
            prompt_ids=list(request.prompt_ids),
            seed=request.seed,
            max_new_tokens=request.max_new_tokens,
        )

    def request(self) -> GenerationRequest:
        return GenerationRequest(self.id, tuple(self.prompt_ids), self.seed, self.max_new_tokens)


class ParamsRecord(Record):
    max_new_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    stop_token_ids: list[Token] = []

    @classmethod
    def of(cls, params: SamplingParams) -> ParamsRecord:
        return cls(
            max_new_tokens=params.max_new_tokens,
            temperature=float(params.temperature),
            top_p=float(params.top_p),
            top_k=params.top_k,
            stop_token_ids=list(params.stop_token_ids),
        )

    def params(self) -> SamplingParams:
        return SamplingParams(
            self.max_new_tokens,
            self.temperature,
            self.top_p,
            self.top_k,
            tuple(self.stop_token_ids),
        )


WeightSetName = Annotated[WeightSet, Field(strict=False)]


class Call(Record):
    """What every question says: of which weights, and how long an answer is waited for.

    `expect`: the weights must be these; a server that holds others refuses with status 409.
    """

    weight_set: WeightSetName = WeightSet.POLICY
    expect: Stamp | None = None
    timeout_s: Annotated[float, Field(gt=0)] | None = None


class GenerateCall(Call):
    requests: list[RequestRecord]
    params: ParamsRecord

    def limit(self, number: int) -> int:
        """Tokens of one request's answer, at most."""
        own, most = self.requests[number].max_new_tokens, self.params.max_new_tokens
        return most if own is None else min(own, most)


class LabelsCall(Call):
    prompts: list[list[Token]]
    labels: Annotated[list[Token], Field(min_length=1)]


class CompletionRecord(Record):
    id: str
    token_ids: list[Token]
    logprobs: list[float]
    finish_reason: Annotated[FinishReason, Field(strict=False)]
    weight_set: WeightSetName
    weight_version: int
    weight_digest: str
    cached_tokens: int = 0

    @classmethod
    def of(cls, completion: Completion, digest: str) -> CompletionRecord:
        return cls(
            id=completion.id,
            token_ids=list(completion.token_ids),
            logprobs=list(completion.logprobs),
            finish_reason=completion.finish_reason,
            weight_set=completion.weight_set,
            weight_version=completion.weight_version,
            weight_digest=digest,
            cached_tokens=completion.cached_tokens,
        )

    def completion(self) -> Completion:
        return Completion(
            self.id,
            tuple(self.token_ids),
            tuple(self.logprobs),
            self.finish_reason,
            self.weight_set,
            self.weight_version,
            self.cached_tokens,
        )


class LabelRecord(Record):
    index: int
    logprobs: list[float]
    best: float

    def scores(self) -> LabelScores:
        return LabelScores(tuple(self.logprobs), self.best)


class Failure(Record):
    """Why an answer did not come: the name of one of our exceptions, and its message."""

    kind: str
    message: str


class Line(Record):
    """One line of a streamed reply: one field is set, or none to say that work goes on."""

    completion: CompletionRecord | None = None
    label: LabelRecord | None = None
    done: int | None = None
    error: Failure | None = None

    def json_line(self) -> bytes:
        return self.model_dump_json(exclude_none=True).encode() + b"\n"


class TensorEntry(Record):
    """One tensor of a set of weights, by its Hugging Face name."""

    name: str
    shape: list[int]
    dtype: Literal["float32", "bfloat16", "float16"]
    sha256: Sha256
    file: str


class Probe(Record):
    """Log-prob of a fixed text under the weights, as the trainer computes it: an engine that
    loaded them right finds the same."""

    token_ids: Annotated[list[Token], Field(min_length=2)]
    logprob: float
    """Of token_ids[1:], summed; each given those before it."""
    tolerance: Annotated[float, Field(gt=0)]
    """Largest difference, per token."""


class Manifest(Record):
    """Everything there is to know of a set of weights before they are loaded."""

    weight_set: WeightSetName
    version: int
    run: str
    """Of the trainer's process: within one run, versions of a set do not go back."""
    digest: Sha256
    """Over names, shapes, dtypes and contents (manifest.digest_of)."""
    tensors: list[TensorEntry]
    probe: Probe | None = None

    @property
    def stamp(self) -> Stamp:
        return Stamp(version=self.version, digest=self.digest)


class FolderSource(Record):
    """The tensors lie in files of a folder below the server's weights folder."""

    kind: Literal["folder"] = "folder"
    folder: str


class GroupSource(Record):
    """The tensors are broadcast by rank 0 of a process group that the server joins."""

    kind: Literal["group"] = "group"
    backend: Literal["gloo", "nccl"]
    host: str
    port: Annotated[int, Field(gt=0, lt=65536)]
    rank: Annotated[int, Field(ge=1)]
    world_size: Annotated[int, Field(ge=2)]


class WeightsCall(Record):
    manifest: Manifest
    source: Annotated[FolderSource | GroupSource, Field(discriminator="kind")]
    timeout_s: Annotated[float, Field(gt=0)] = 600.0


class UpdateReport(Record):
    """What taking in new weights cost, in seconds, and how far the probe was off, per token."""

    stamp: Stamp
    wait_s: float
    verify_s: float
    load_s: float
    probe_s: float
    probe_error: float | None = None


class Health(Record):
    """`serving`: answers questions. `starting`: will, before long. `quarantined`: reachable, but
    its weights are not to be trusted, or its engine has died; `reason` says why."""

    status: Literal["serving", "starting", "quarantined", "sleeping"]
    reason: str = ""
    beat_age_s: float = 0.0
    """Since the engine itself, not the server before it, last showed that it runs."""
    running: int = 0
    weights: dict[str, Stamp] = {}


class Info(Record):
    """What a server is, fixed at its start."""

    engine: str
    versions: dict[str, str]
    model: str
    dtype: str
    vocab_size: int
    max_length: int
    stop_ids: list[int]
    tokenizer_sha256: str
    weight_sets: list[str]
    memory: dict[str, int]
    """Bytes: weights, kv_cache, and what else is known."""
    max_temperature: float | None = None
    max_labels: int | None = None
    """Bounds of the engine's own, beside those of its model; None for none. Labels are counted once
    each."""
