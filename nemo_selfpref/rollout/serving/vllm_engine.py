"""vLLM's engine as ours: built from a spec, asked with the wire's calls, read into its records.

All that knows vLLM is here and in vllm_worker.py. But for `info` and `asleep`, an engine is used by
one thread at a time (engine_line.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from nemo_selfpref.errors import RolloutError, WeightSyncError
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec
from nemo_selfpref.rollout.serving.weight_files import TensorFacts, bytes_of
from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    GenerateCall,
    Info,
    LabelRecord,
    LabelsCall,
    Probe,
    Stamp,
)
from nemo_selfpref.types import FinishReason

Question = tuple[list[int], Any]
"""A prompt, and vLLM's sampling parameters."""

_HOTTEST = 2.0
_MOST_LABELS = 128
"""vLLM's own bounds on the temperature and on the tokens whose log-probs it gives by name."""
_CPU_STEP_TOKENS = 4096
"""Prompt tokens that a step on a CPU reads at most, where the longest prompt is shorter."""


class VLLMEngine:
    """One vLLM engine.

    Args:
        facts: of every tensor that makes up the model's weights, by name.

    Raises:
        RolloutError: vLLM is not there, or cannot load the model.
    """

    def __init__(self, spec: EngineSpec, facts: Mapping[str, TensorFacts]) -> None:
        self.spec, self.facts = spec, facts
        self.asleep = False
        self._vllm = _import_vllm(spec)
        self._engine = _build(self._vllm, spec)
        self.info = self._describe()

    def _describe(self) -> Info:
        cache = self._engine.vllm_config.cache_config
        kv = self.spec.kv_cache_bytes or getattr(cache, "kv_cache_memory_bytes", None) or 0
        torch = str(import_module("torch").__version__)
        return Info(
            engine="vllm",
            versions={"vllm": self._vllm.__version__, "torch": torch},
            model=self.spec.model,
            dtype=self.spec.dtype,
            vocab_size=self._engine.model_config.get_vocab_size(),
            max_length=self.spec.max_length,
            stop_ids=list(self.spec.stop_ids),
            tokenizer_sha256=self.spec.tokenizer_sha256,
            weight_sets=list(self.spec.weight_sets),
            memory={
                "weights": sum(map(bytes_of, self.facts.values())),
                "kv_cache": kv * self.spec.tensor_parallel_size,
            },
            max_temperature=_HOTTEST,
            max_labels=_MOST_LABELS,
        )

    # -- questions and answers ----------------------------------------------------------------

    def questions(self, call: GenerateCall | LabelsCall) -> list[Question]:
        """A call as vLLM's questions, one for each of its places."""
        final_only = import_module("vllm.sampling_params").RequestOutputKind.FINAL_ONLY
        common = {"detokenize": False, "ignore_eos": True, "output_kind": final_only}
        if isinstance(call, LabelsCall):
            return self._label_questions(call, common)
        return self._generate_questions(call, common)

    def _label_questions(self, call: LabelsCall, common: Mapping[str, Any]) -> list[Question]:
        wanted = sorted(set(call.labels))
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=1, logprobs=len(wanted), logprob_token_ids=wanted, **common
        )
        return [(prompt, params) for prompt in call.prompts]

    def _generate_questions(self, call: GenerateCall, common: Mapping[str, Any]) -> list[Question]:
        given = call.params
        # vLLM refuses a stop token that the model cannot make.
        stops = {*self.spec.stop_ids, *given.stop_token_ids}
        stop = sorted(token for token in stops if token < self.info.vocab_size)

        def params(number: int, seed: int) -> Any:
            return self._vllm.SamplingParams(
                temperature=given.temperature,
                top_p=given.top_p,
                top_k=given.top_k,
                seed=seed,
                max_tokens=call.limit(number),
                stop_token_ids=stop,
                logprobs=0,
                **common,
            )

        return [(r.prompt_ids, params(number, r.seed)) for number, r in enumerate(call.requests)]

    def add(self, name: str, question: Question, salt: str) -> str:
        """Start a question; the name vLLM itself has for it, which `abort` needs. What has another
        salt shares no prefix cache with it."""
        prompt, params = question
        given = {"prompt_token_ids": prompt, "cache_salt": salt}
        # Older vLLMs return nothing and know the request by the name it was given.
        return self._engine.add_request(name, given, params) or name

    def abort(self, own_names: Sequence[str]) -> None:
        self._engine.abort_request(list(own_names), internal=True)

    def step(self) -> Iterator[tuple[str, Any]]:
        """One step of all that runs: the name and the output of what it finished."""
        for output in self._engine.step():
            if output.finished:
                yield output.request_id, output

    def read(
        self, call: GenerateCall | LabelsCall, number: int, output: Any, stamp: Stamp
    ) -> CompletionRecord | LabelRecord:
        """The answer to one place of a call, made by the weights of `stamp`."""
        made = output.outputs[0]
        tokens = list(made.token_ids)
        if isinstance(call, LabelsCall):
            (found,) = made.logprobs
            scores = [found[label].logprob for label in call.labels]
            return LabelRecord(index=number, logprobs=scores, best=found[tokens[0]].logprob)
        if made.finish_reason not in ("stop", "length"):
            raise RolloutError(f"vLLM ended a request with {made.finish_reason!r}")
        return CompletionRecord(
            id=call.requests[number].id,
            token_ids=tokens,
            logprobs=[at[token].logprob for at, token in zip(made.logprobs, tokens, strict=True)],
            finish_reason=FinishReason(made.finish_reason),
            weight_set=call.weight_set,
            weight_version=stamp.version,
            weight_digest=stamp.digest,
            cached_tokens=output.num_cached_tokens or 0,
        )

    # -- while nothing runs -------------------------------------------------------------------

    def load(self, files: Sequence[Path]) -> None:
        """Put the tensors of these files, which must be all of the model's, in the place of those
        before, and empty the prefix cache."""
        self._engine.collective_rpc("selfpref_load", args=([str(path) for path in files],))
        if self._engine.reset_prefix_cache() is False:
            raise WeightSyncError("vLLM did not empty its prefix cache")

    def probe(self, probe: Probe) -> float:
        """How far the log-probs of the probe are from the trainer's, per token.

        Raises:
            WeightSyncError: further than the probe tolerates.
        """
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False
        )
        self._engine.add_request("probe", {"prompt_token_ids": list(probe.token_ids)}, params)
        found = None
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                found = output.prompt_logprobs or found
        if found is None:
            raise WeightSyncError("vLLM did not answer the probe")
        tokens = probe.token_ids[1:]
        total = sum(at[t].logprob for at, t in zip(found[1:], tokens, strict=True))
        error = abs(total - probe.logprob) / len(tokens)
        if not error <= probe.tolerance:
            raise WeightSyncError(
                f"the probe's log-probs are {error:.2e} a token from the trainer's (at most "
                f"{probe.tolerance:.0e}): the weights were not loaded as they were sent"
            )
        return error

    def sleep(self) -> None:
        self._engine.sleep(level=1)
        self.asleep = True

    def wake(self) -> None:
        self._engine.wake_up()
        self.asleep = False


def _import_vllm(spec: EngineSpec) -> Any:
    """vLLM's module. Its settings come from the spec, not from the environment."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE"):
        os.environ.pop(name, None)
    if spec.device == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if _one_process(spec):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        return import_module("vllm")
    except ImportError as error:
        raise RolloutError(
            f"vLLM cannot be imported here: {error}. Set rollout.vllm.python to the interpreter "
            "of an environment with vLLM (make rollout-env makes one without a GPU)."
        ) from error


def _one_process(spec: EngineSpec) -> bool:
    """On few cores a second process costs more than it overlaps."""
    return spec.device == "cpu" and spec.tensor_parallel_size == 1


def _build(vllm: Any, spec: EngineSpec) -> Any:
    settings: dict[str, Any] = {}
    if _one_process(spec):
        settings["distributed_executor_backend"] = "uni"
    if spec.device == "cpu":
        # A prompt read in two parts has vLLM wind back its seeded generator, which a CPU's cannot.
        settings["enable_chunked_prefill"] = False
        settings["max_num_batched_tokens"] = max(_CPU_STEP_TOKENS, spec.max_length)
    if spec.kv_cache_bytes is not None:
        settings["kv_cache_memory_bytes"] = spec.kv_cache_bytes
    arguments = vllm.EngineArgs(
        model=spec.model,
        # Not Mistral's own form of it, which may lie beside: new weights come by these names.
        config_format="hf",
        load_format="safetensors",
        skip_tokenizer_init=True,
        trust_remote_code=False,
        dtype=spec.dtype,
        seed=spec.seed,
        max_model_len=spec.max_length,
        max_num_seqs=spec.max_num_seqs,
        tensor_parallel_size=spec.tensor_parallel_size,
        gpu_memory_utilization=spec.gpu_memory_utilization,
        enable_prefix_caching=spec.enable_prefix_caching,
        enforce_eager=spec.enforce_eager or spec.device == "cpu",
        enable_sleep_mode=spec.enable_sleep_mode,
        max_logprobs=_MOST_LABELS,
        disable_log_stats=True,
        worker_extension_cls="nemo_selfpref.rollout.serving.vllm_worker.WeightReceiver",
        **settings,
    )
    try:
        return vllm.LLMEngine.from_engine_args(arguments)
    except Exception as error:
        raise RolloutError(f"vLLM cannot load {spec.model}: {error}") from error
