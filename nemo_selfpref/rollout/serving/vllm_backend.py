"""vLLM in this process, behind one thread that owns it.

Every step, weight update and probe happens on that thread, one after the other. An update waits for
what runs and holds back what comes, so no answer is ever made by two versions; and a set of weights
that shares the engine with another is swapped in between two batches, never within one.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from nemo_selfpref.errors import (
    RolloutError,
    RolloutTimeout,
    StaleWeightsError,
    WeightSyncError,
)
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.engine_spec import EngineSpec
from nemo_selfpref.rollout.serving.manifest import (
    TensorFacts,
    check_complete,
    check_digest,
    check_names,
    facts_of_folder,
    verify_files,
)
from nemo_selfpref.rollout.serving.wire import (
    CompletionRecord,
    FolderSource,
    GenerateCall,
    Health,
    Info,
    LabelRecord,
    LabelsCall,
    Manifest,
    Probe,
    Stamp,
    UpdateReport,
    WeightsCall,
)
from nemo_selfpref.types import FinishReason, WeightSet

INITIAL = Stamp(version=-1, digest="initial")
"""The weights of the model's folder, before any were sent."""
_IDLE_S = 0.2
_HOTTEST = 2.0
_MOST_LABELS = 128
"""vLLM's own bounds on the temperature and on the tokens whose log-probs it gives by name."""


@dataclass(frozen=True)
class _Held:
    """Where a set of weights can be loaded from."""

    folder: Path
    stamp: Stamp
    run: str = ""
    probe: Probe | None = None


@dataclass(eq=False)
class _Job:
    """A call being answered."""

    call: GenerateCall | LabelsCall
    emit: Callable[[Any], None]
    until: Until
    done: Future[None]
    open: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Requests in the engine: place in the call, and the name vLLM itself has for it."""


@dataclass(eq=False)
class _Order:
    """Something to do while nothing runs."""

    act: Callable[[], Any]
    done: Future[Any]
    until: Until


class VLLMBackend:
    """Backend over one vLLM engine.

    Raises:
        RolloutError: vLLM cannot load the model.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._root = Path(spec.weights_dir).resolve()
        first = _Held(Path(spec.model), INITIAL)
        self._held = {WeightSet(name): first for name in spec.weight_sets}
        self._loaded = next(iter(self._held))
        # Sent in the engine's own type, whatever that of the folder is.
        self._facts: dict[str, TensorFacts] = {
            name: (shape, spec.dtype) for name, (shape, _) in facts_of_folder(first.folder).items()
        }
        self._engine, self._vllm = _build(spec)
        self._info = self._describe()
        self._inbox: queue.SimpleQueue[_Job | _Order | None] = queue.SimpleQueue()
        self._waiting: deque[_Job | _Order] = deque()
        self._running: dict[str, _Job] = {}
        self._beat, self._calls = time.monotonic(), 0
        self._failure = ""
        self._asleep = self._over = False
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()

    # -- called from any thread ---------------------------------------------------------------

    def info(self) -> Info:
        return self._info

    def health(self) -> Health:
        dead = not self._thread.is_alive()
        reason = self._failure or ("the engine's thread has ended" if dead else "")
        status = "quarantined" if reason else "sleeping" if self._asleep else "serving"
        return Health(
            status=status,
            reason=reason,
            beat_age_s=time.monotonic() - self._beat,
            running=len(self._running) + len(self._waiting),
            weights={name.value: held.stamp for name, held in self._held.items()},
        )

    def check(self, call: GenerateCall | LabelsCall) -> None:
        if self._failure:
            raise RolloutError(f"the engine is quarantined: {self._failure}")
        self._check_weights(call)
        self._check_settings(call)
        generate = isinstance(call, GenerateCall)
        prompts = [r.prompt_ids for r in call.requests] if generate else call.prompts
        for number, prompt in enumerate(prompts):
            room = _limit(call, number) if isinstance(call, GenerateCall) else 1
            if not prompt:
                raise RolloutError(f"prompt {number} is empty: expected at least one token")
            if len(prompt) + room > self.spec.max_length:
                raise RolloutError(
                    f"prompt {number} has {len(prompt)} tokens; with {room} to come that passes "
                    f"the model's {self.spec.max_length}. Lower rollout.max_new_tokens or "
                    "data.max_prompt_length."
                )
            if max(prompt) >= self._info.vocab_size:
                raise RolloutError(
                    f"prompt {number} holds the token {max(prompt)}; the model knows "
                    f"{self._info.vocab_size}"
                )

    def _check_settings(self, call: GenerateCall | LabelsCall) -> None:
        if isinstance(call, GenerateCall):
            if call.params.temperature > _HOTTEST:
                raise RolloutError(
                    f"the temperature is {call.params.temperature}; vLLM samples at {_HOTTEST} at "
                    "most. Lower rollout.temperature."
                )
        elif len(set(call.labels)) > _MOST_LABELS:
            raise RolloutError(
                f"{len(call.labels)} labels were asked for; vLLM weighs {_MOST_LABELS} at most"
            )
        elif max(call.labels) >= self._info.vocab_size:
            raise RolloutError(
                f"the label {max(call.labels)} is no token; the model knows {self._info.vocab_size}"
            )

    def _check_weights(self, call: GenerateCall | LabelsCall) -> None:
        held = self._held.get(call.weight_set)
        if held is None:
            names = ", ".join(name.value for name in self._held)
            raise RolloutError(
                f"no {call.weight_set.value} weights are held here; there are {names}"
            )
        if call.expect is not None and held.stamp != call.expect:
            raise StaleWeightsError(
                f"{call.weight_set.value} weights of {call.expect} were asked for; "
                f"{held.stamp} are held"
            )

    def generate(
        self, call: GenerateCall, emit: Callable[[CompletionRecord], None], until: Until
    ) -> None:
        self._answer(_Job(call, emit, until, Future()), len(call.requests))

    def label_scores(
        self, call: LabelsCall, emit: Callable[[LabelRecord], None], until: Until
    ) -> None:
        self._answer(_Job(call, emit, until, Future()), len(call.prompts))

    def _answer(self, job: _Job, count: int) -> None:
        if count:
            self._send(job)
            job.done.result()

    def update(self, call: WeightsCall) -> UpdateReport:
        manifest, source = call.manifest, call.source
        if not isinstance(source, FolderSource):
            raise WeightSyncError("an engine takes weights from a folder; the server joins groups")
        folder = self._checked_folder(source.folder)
        self._check_manifest(manifest)
        started = time.monotonic()
        verify_files(folder, manifest)
        verified = time.monotonic()
        until = Until.within(call.timeout_s)
        try:
            return self._ask(
                lambda: self._install(folder, manifest, verified - started, verified), until
            )
        except RolloutTimeout as error:
            held = self._held[manifest.weight_set].stamp
            raise WeightSyncError(
                f"{manifest.weight_set.value} {manifest.stamp} was not loaded: what runs did not "
                f"end within {call.timeout_s:.0f} s. {held} is served."
            ) from error

    def _checked_folder(self, name: str) -> Path:
        folder = Path(name).resolve()
        if not folder.is_relative_to(self._root):
            raise WeightSyncError(f"{folder} is not below {self._root}: refused")
        return folder

    def _check_manifest(self, manifest: Manifest) -> None:
        held = self._held.get(manifest.weight_set)
        if held is None:
            raise WeightSyncError(f"this engine does not hold {manifest.weight_set.value} weights")
        if held.run == manifest.run and manifest.version < held.stamp.version:
            raise WeightSyncError(
                f"{manifest.weight_set.value} {manifest.stamp} is older than {held.stamp}, which "
                "is served: refused"
            )
        probe = manifest.probe
        if probe is not None and (
            max(probe.token_ids) >= self._info.vocab_size
            or len(probe.token_ids) >= self.spec.max_length
        ):
            raise WeightSyncError(
                f"the probe of {manifest.weight_set.value} {manifest.stamp} is no prompt of this "
                f"model: {len(probe.token_ids)} tokens up to {max(probe.token_ids)}; at most "
                f"{self.spec.max_length - 1} below {self._info.vocab_size} are possible"
            )
        check_digest(manifest)
        check_complete(manifest, self._facts)

    def sleep(self) -> None:
        if not self.spec.enable_sleep_mode:
            raise RolloutError("this engine cannot sleep: vLLM's sleep mode needs a GPU")
        self._ask(self._sleep, Until())

    def wake(self) -> None:
        if self._asleep:
            self._ask(self._wake, Until())

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join(timeout=10)

    def _ask(self, act: Callable[[], Any], until: Until) -> Any:
        order = _Order(act, Future(), until)
        self._send(order)
        return order.done.result()

    def _send(self, item: _Job | _Order) -> None:
        self._inbox.put(item)
        # Looked at after the put: what comes later than the last emptying of the inbox sees it.
        if self._over:
            raise RolloutError(f"the engine has died: {self._failure}")

    # -- on the engine's thread ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            # Asking makes torch give this thread the process's number of OpenMP threads. It would
            # at its first own operation; vLLM's kernels fail where it changes between two of them.
            import_module("torch").get_num_threads()
            while self._take():
                self._give_up()
                self._admit()
                if self._running:
                    self._step()
                self._beat = time.monotonic()
            reason = "the engine was closed"
        except BaseException as error:
            reason = f"vLLM failed: {error!r}"
        self._failure = self._failure or reason
        self._over = True
        self._refuse_all(RolloutError(f"the engine has died: {self._failure}"))

    def _refuse_all(self, error: RolloutError) -> None:
        jobs = {id(job): job for job in self._running.values()}
        waiting: list[_Job | _Order] = [*jobs.values(), *self._waiting]
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._inbox.get_nowait()
                waiting += [item] if item is not None else []
        for item in waiting:
            if not item.done.done():
                item.done.set_exception(error)

    def _take(self) -> bool:
        """Move what was sent into the line; False once the engine is closed."""
        busy = bool(self._running or self._waiting)
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._inbox.get(timeout=_IDLE_S) if not busy else self._inbox.get_nowait()
                if item is None:
                    return False
                self._waiting.append(item)
                busy = True
        return True

    def _give_up(self) -> None:
        """End what is past its deadline or no longer wanted, in the engine and in the line."""
        for job in {id(job): job for job in self._running.values()}.values():
            if job.until.over:
                self._abort(job)
                _fail_if_over(job)
        for item in [item for item in self._waiting if item.until.over]:
            self._waiting.remove(item)
            _fail_if_over(item)

    def _abort(self, job: _Job) -> None:
        self._engine.abort_request([own for _, own in job.open.values()], internal=True)
        for name in job.open:
            self._running.pop(name, None)
        job.open.clear()

    def _admit(self) -> None:
        """Start what stands first in the line, until something must wait for the engine to be
        idle: an order, or a call of weights that are not loaded."""
        while self._waiting:
            item = self._waiting[0]
            order = isinstance(item, _Order)
            if self._running and (order or item.call.weight_set is not self._loaded):
                return
            self._waiting.popleft()
            try:
                if isinstance(item, _Order):
                    item.done.set_result(item.act())
                else:
                    self._start(item)
            except Exception as error:
                self._fail(item, error)

    def _fail(self, item: _Job | _Order, error: Exception) -> None:
        """End one call or order; the engine goes on."""
        if not isinstance(error, RolloutError):
            error = RolloutError(f"vLLM refused or failed: {error!r}")
        try:
            if isinstance(item, _Job):
                self._abort(item)
        finally:  # It is in no line any more: nobody else would tell who waits for it.
            if not item.done.done():
                item.done.set_exception(error)

    def _start(self, job: _Job) -> None:
        if self._failure:
            raise RolloutError(f"the engine is quarantined: {self._failure}")
        if self._asleep:
            raise RolloutError("the engine sleeps: wake it first")
        self._check_weights(job.call)
        self._swap_to(job.call.weight_set)
        self._calls += 1
        salt = f"{job.call.weight_set.value}:{self._held[job.call.weight_set].stamp.digest}"
        for number, (prompt, params) in enumerate(self._questions(job.call)):
            name = f"{self._calls}-{number}"
            given = {"prompt_token_ids": prompt, "cache_salt": salt}
            own = self._engine.add_request(name, given, params)
            # Older vLLMs return nothing and know the request by the name it was given.
            job.open[name] = (number, own or name)
            self._running[name] = job

    def _questions(self, call: GenerateCall | LabelsCall) -> list[tuple[list[int], Any]]:
        make = self._vllm.SamplingParams
        final_only = import_module("vllm.sampling_params").RequestOutputKind.FINAL_ONLY
        common = {"detokenize": False, "ignore_eos": True, "output_kind": final_only}
        if isinstance(call, LabelsCall):
            wanted = sorted(set(call.labels))
            labels = make(
                temperature=0.0,
                max_tokens=1,
                logprobs=len(wanted),
                logprob_token_ids=wanted,
                **common,
            )
            return [(prompt, labels) for prompt in call.prompts]
        p = call.params
        # vLLM refuses a stop token that the model cannot make.
        stops = {*self.spec.stop_ids, *p.stop_token_ids}
        stop = sorted(token for token in stops if token < self._info.vocab_size)
        return [
            (
                r.prompt_ids,
                make(
                    temperature=p.temperature,
                    top_p=p.top_p,
                    top_k=p.top_k,
                    seed=r.seed,
                    max_tokens=_limit(call, number),
                    stop_token_ids=stop,
                    logprobs=0,
                    **common,
                ),
            )
            for number, r in enumerate(call.requests)
        ]

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished:
                self._finish(output)

    def _finish(self, output: Any) -> None:
        job = self._running.pop(output.request_id, None)
        if job is None:
            return
        number, _ = job.open.pop(output.request_id)
        try:
            job.emit(self._record(job.call, number, output))
        except Exception as error:
            self._fail(job, error)
            return
        if not job.open:
            job.done.set_result(None)

    def _record(self, call: GenerateCall | LabelsCall, number: int, output: Any) -> Any:
        made = output.outputs[0]
        tokens = list(made.token_ids)
        if isinstance(call, LabelsCall):
            (found,) = made.logprobs
            scores = [found[label].logprob for label in call.labels]
            return LabelRecord(index=number, logprobs=scores, best=found[tokens[0]].logprob)
        if made.finish_reason not in ("stop", "length"):
            raise RolloutError(f"vLLM ended a request with {made.finish_reason!r}")
        stamp = self._held[call.weight_set].stamp
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

    # -- weights, on the engine's thread while nothing runs ---------------------------------------

    def _install(
        self, folder: Path, manifest: Manifest, verify_s: float, since: float
    ) -> UpdateReport:
        if self._asleep:
            raise WeightSyncError("the engine sleeps and takes in no weights: wake it first")
        self._check_manifest(manifest)  # again: a newer one may have been taken in meanwhile
        before = self._held[manifest.weight_set]
        wait_s = time.monotonic() - since
        new = _Held(folder, manifest.stamp, manifest.run, manifest.probe)
        # Loaded even where another set is in the engine: what cannot be loaded must not be held.
        try:
            load_s, probe_s, error = self._load(new)
        except Exception as failure:
            self._restore(self._held[self._loaded], failure)
            raise WeightSyncError(
                f"{manifest.weight_set.value} {manifest.stamp} was not taken in: {failure}. "
                f"{before.stamp} is served."
            ) from failure
        self._held[manifest.weight_set] = new
        self._loaded = manifest.weight_set
        return UpdateReport(
            stamp=manifest.stamp,
            wait_s=wait_s,
            verify_s=verify_s,
            load_s=load_s,
            probe_s=probe_s,
            probe_error=error,
        )

    def _restore(self, held: _Held, failure: Exception) -> None:
        try:
            self._load(held)
        except Exception as second:
            self._failure = (
                f"an update failed ({failure}) and the weights before it could not be put back "
                f"({second})"
            )
            raise WeightSyncError(self._failure) from failure

    def _swap_to(self, name: WeightSet) -> None:
        if name is self._loaded:
            return
        if self._held[name] != self._held[self._loaded]:
            try:
                self._load(self._held[name])
            except Exception as failure:
                self._restore(self._held[self._loaded], failure)
                raise
        self._loaded = name

    def _load(self, held: _Held) -> tuple[float, float, float | None]:
        """Weights into vLLM, an empty prefix cache, the probe; seconds and the probe's error."""
        started = time.monotonic()
        # A set may be swapped in long after its files were verified: vLLM would load what is left
        # of a folder without a word.
        check_names(held.folder, self._facts.keys())
        self._engine.collective_rpc("selfpref_load", args=(str(held.folder),))
        if self._engine.reset_prefix_cache() is False:
            raise WeightSyncError("vLLM did not empty its prefix cache")
        loaded = time.monotonic()
        error = self._probe(held.probe)
        return loaded - started, time.monotonic() - loaded, error

    def _probe(self, probe: Probe | None) -> float | None:
        """How far the engine's log-probs of the probe are from the trainer's, per token."""
        if probe is None:
            return None
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

    def _sleep(self) -> None:
        self._engine.sleep(level=1)
        self._asleep = True

    def _wake(self) -> None:
        self._engine.wake_up()
        self._asleep = False

    def _describe(self) -> Info:
        config = self._engine.model_config
        cache = self._engine.vllm_config.cache_config
        kv = self.spec.kv_cache_bytes or getattr(cache, "kv_cache_memory_bytes", None) or 0
        import torch

        return Info(
            engine="vllm",
            versions={"vllm": self._vllm.__version__, "torch": str(torch.__version__)},
            model=self.spec.model,
            dtype=self.spec.dtype,
            vocab_size=config.get_vocab_size(),
            max_length=self.spec.max_length,
            stop_ids=list(self.spec.stop_ids),
            tokenizer_sha256=self.spec.tokenizer_sha256,
            weight_sets=list(self.spec.weight_sets),
            memory={
                "weights": sum(_bytes(facts) for facts in self._facts.values()),
                "kv_cache": kv * self.spec.tensor_parallel_size,
            },
        )


def _bytes(facts: TensorFacts) -> int:
    shape, dtype = facts
    return math.prod(shape) * (4 if dtype == "float32" else 2)


def _limit(call: GenerateCall, number: int) -> int:
    own = call.requests[number].max_new_tokens
    most = call.params.max_new_tokens
    return most if own is None else min(own, most)


def _fail_if_over(item: _Job | _Order) -> None:
    try:
        item.until.check("the engine's answer")
    except RolloutError as error:
        item.done.set_exception(error)


def _build(spec: EngineSpec) -> tuple[Any, Any]:
    """vLLM's engine and module. Its settings come from the spec, not from the environment."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_SERVER_DEV_MODE"):
        os.environ.pop(name, None)
    if spec.device == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    settings: dict[str, Any] = {}
    if spec.device == "cpu" and spec.tensor_parallel_size == 1:
        # One process: on few cores a second one costs more than it overlaps.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        settings["distributed_executor_backend"] = "uni"
    try:
        vllm = import_module("vllm")
    except ImportError as error:
        raise RolloutError(
            f"vLLM cannot be imported here: {error}. Set rollout.vllm.python to the interpreter "
            "of an environment with vLLM (make rollout-env makes one without a GPU)."
        ) from error
    if spec.kv_cache_bytes is not None:
        settings["kv_cache_memory_bytes"] = spec.kv_cache_bytes
    arguments = vllm.EngineArgs(
        model=spec.model,
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
        return vllm.LLMEngine.from_engine_args(arguments), vllm
    except Exception as error:
        raise RolloutError(f"vLLM cannot load {spec.model}: {error}") from error
