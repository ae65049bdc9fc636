"""A run's rollout servers: started or reached by its first rank, given the run's weights, asked by
all of its ranks together."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from nemo_selfpref import errors
from nemo_selfpref.config.schema import Placement, Precision, RunConfig, WeightTransport
from nemo_selfpref.errors import ConfigError, RolloutError, SelfPrefError
from nemo_selfpref.megatron.parallel import all_gather_json, world_group
from nemo_selfpref.megatron.policy import Policy
from nemo_selfpref.monitor.console import Console
from nemo_selfpref.monitor.heartbeat import phase
from nemo_selfpref.rollout.engine import FOREVER, Until
from nemo_selfpref.rollout.serving.auth import make_token, read_token
from nemo_selfpref.rollout.serving.fleet import Fleet, FleetSettings, RemoteMember
from nemo_selfpref.rollout.serving.local_client import BackendEngine
from nemo_selfpref.rollout.serving.plan import exposure_warning, front_spec_of, reachable
from nemo_selfpref.rollout.serving.wire import Info, Stamp, WeightsCall
from nemo_selfpref.training.handover import Send
from nemo_selfpref.training.places import WeightPlaces
from nemo_selfpref.training.publish import WeightPublisher, write_model_folder
from nemo_selfpref.training.rollouts import EngineRollouts
from nemo_selfpref.training.serve import front_process
from nemo_selfpref.training.session import Start, tokenizer_folder
from nemo_selfpref.training.store import completion_of
from nemo_selfpref.types import (
    Completion,
    GenerationRequest,
    LabelScores,
    SamplingParams,
    TokenIds,
    WeightSet,
)

_TURN_S = 10.0
"""Ranks that wait for the first one hear from it this often, so no collective runs into its own
deadline however long an answer takes."""


class RolloutService:
    """RolloutEngine over servers; every rank of the run makes every call, in the same order.

    Args:
        asked: the sets of weights that the algorithm samples from or judges with.
        folder: the run's, for the token, logs and the model that engines start from.
    """

    def __init__(
        self,
        cfg: RunConfig,
        policy: Policy,
        places: WeightPlaces,
        start: Start,
        folder: Path,
        console: Console,
        asked: frozenset[WeightSet],
    ) -> None:
        self.cfg, self.policy, self.places, self.start = cfg, policy, places, start
        self.folder, self.console = folder.resolve() / "rollout", console
        self.asked = asked
        self.held = asked | {WeightSet(s.value) for s in cfg.rollout.vllm.also_serve}
        self.main = policy.layout.is_main
        self.direct: BackendEngine | None = None
        """The servers as the first rank asks them by itself, from any thread."""
        self._fleet: Fleet | None = None
        self._expected: dict[WeightSet, Stamp] = {}
        self._ends = ExitStack()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollout-call")
        if self._sleeps and cfg.rollout.max_staleness:
            raise ConfigError(
                f"rollout.max_staleness={cfg.rollout.max_staleness} has engines sample while the "
                "trainer works; with rollout.placement=colocated they share its GPU, and sleep "
                "then. Use placement=disaggregated."
            )
        self._weights_dir = _weights_dir(cfg, self.folder)
        self._publisher = WeightPublisher(
            policy,
            places.weights,
            folder=self._weights_dir,
            run=secrets.token_hex(8),
            tolerance=cfg.rollout.vllm.probe_tolerance,
            transport=cfg.rollout.vllm.transport,
            host=_own_address(cfg.rollout.vllm.urls),
            timeout_s=cfg.rollout.vllm.sync_timeout_s,
            keep=cfg.rollout.max_staleness + 2,
        )

    # -- beginning and end --------------------------------------------------------------------

    def open(self) -> None:
        """Start the servers, or reach those that run. Collective.

        Raises:
            ConfigError, RolloutError: on every rank; what was started has ended again.
        """
        needs_folder = self._needs_model_folder()
        if needs_folder:
            write_model_folder(self.policy, self.start.tokenizer, self.folder / "model")
        if self.main:
            self.console.say("rollouts: starting engines ...")
        self.share(self._pool.submit(self._open) if self.main else None)

    def _needs_model_folder(self) -> bool:
        own = self.start.folder
        is_hugging_face = own is not None and (own / "config.json").is_file()
        return not self.cfg.rollout.vllm.urls and not is_hugging_face

    def _open(self) -> None:
        v = self.cfg.rollout.vllm
        self._weights_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            given = Path(v.token_file).expanduser() if v.token_file else None
            token_file = given or self.folder / "token"
            token = read_token(token_file) if v.urls else make_token(token_file)
            urls = list(v.urls) or [self._start_front(token_file)]
            members = [RemoteMember(f"server-{n}", url, token) for n, url in enumerate(urls)]
            settings = FleetSettings(
                health_every_s=v.health_every_s,
                suspect_after=v.suspect_after,
                max_restarts=0,
                min_engines=1,
                start_timeout_s=v.start_timeout_s,
            )
            fleet = Fleet(members, settings, self.console.say)
            self._ends.callback(fleet.close)
            fleet.start(Until.within(v.start_timeout_s))
            self._check(fleet.info())
            self._fleet = fleet
            self.direct = BackendEngine(fleet, self._wanted)
            self._show(urls, fleet.info())
            self.rest()
        except BaseException:
            self._ends.close()
            raise

    def _start_front(self, token_file: Path) -> str:
        own, v = self.start.folder, self.cfg.rollout.vllm
        tokenizer = self.cfg.model.tokenizer.path or tokenizer_folder(own)
        assert tokenizer is not None, "find_start has read a tokenizer"
        model = self.folder / "model" if self._needs_model_folder() else own
        assert model is not None
        spec = front_spec_of(
            self.cfg,
            model_folder=model.resolve(),
            tokenizer_folder=Path(tokenizer).resolve(),
            stop_ids=sorted(self.start.tokenizer.stop_ids),
            tokenizer_sha256=self.start.tokenizer.fingerprint(),
            max_length=self.start.arch.max_position_embeddings,
            weight_sets=sorted(name.value for name in self.held),
            work=self.folder,
            token_file=token_file.resolve(),
            weights_dir=self._weights_dir,
        )
        spec = spec.model_copy(update={"delete_weights": True})
        process = self._ends.enter_context(front_process(spec))
        port = process.wait_ready(Until.within(v.start_timeout_s + 30.0))
        if warning := exposure_warning(v.host):
            self.console.say(warning)
        return f"http://{reachable(v.host)}:{port}"

    def _check(self, info: Info) -> None:
        """Refuse servers that do not fit the run."""
        bf16 = self.cfg.trainer.precision is Precision.bf16
        wanted: dict[str, Any] = {
            "tokenizer_sha256": self.start.tokenizer.fingerprint(),
            "vocab_size": self.start.arch.vocab_size,
            "dtype": "bfloat16" if bf16 else "float32",
        }
        found = info.model_dump()
        wrong = [f"{k} is {found[k]}, the run's is {v}" for k, v in wanted.items() if found[k] != v]
        missing = sorted(name.value for name in self.held if name.value not in info.weight_sets)
        if missing:
            wrong.append(f"no engine holds {', '.join(missing)} weights")
        if wrong:
            raise RolloutError(
                f"the rollout servers do not fit this run: {'; '.join(wrong)}. Start them with the "
                "run's model and tokenizer: selfpref serve --weights "
                + ",".join(sorted(name.value for name in self.held))
            )

    def _show(self, urls: Sequence[str], info: Info) -> None:
        memory = ", ".join(f"{k} {v / 2**20:,.0f} MB" for k, v in sorted(info.memory.items()))
        self.console.say(
            f"rollouts: {info.engine} {info.versions.get(info.engine, '')} at {', '.join(urls)}, "
            f"placement {self.cfg.rollout.placement.name}, weight sets "
            f"{', '.join(info.weight_sets)}; memory of the engines: {memory}"
        )

    def close(self) -> None:
        """End what was started here."""
        self._ends.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if not self.main:
            return
        if self.cfg.rollout.vllm.urls and self._by_folder:
            # Those servers go on, and may have to bring an engine of theirs up to date.
            self._publisher.keep_newest()
            return
        self._publisher.close()
        shutil.rmtree(self._weights_dir, ignore_errors=True)

    # -- the weights --------------------------------------------------------------------------

    def hand_over(self) -> Callable[[], None]:
        """See RolloutAccess.hand_over."""
        calls: list[WeightsCall] = []
        if self._sleeps:
            torch.cuda.empty_cache()
        for name in sorted(self.held):
            if name is not WeightSet.FROZEN and name not in self.places.weights:
                continue  # an EMA begins with its stage
            self.places.ready(name)
            if not self._publisher.needed(name):
                continue
            if not self._by_folder:
                self._broadcast(name)
                continue
            self._publisher.publish(name, None)
            if self.main:
                calls.append(self._publisher.call(name))

        def give() -> None:
            assert self._fleet is not None
            self.wake()
            while calls:
                manifest = calls[0].manifest
                self._fleet.update(calls[0])
                self._expected[manifest.weight_set] = manifest.stamp
                calls.pop(0)

        return give

    def _broadcast(self, name: WeightSet) -> None:
        """Send weights while every rank waits: the engines are idle. Collective."""
        sends: list[Send] = []

        def find() -> None:
            assert self._fleet is not None
            self.wake()
            until = Until.within(self.cfg.rollout.vllm.sync_timeout_s)
            sends.extend(member.client.update for member in self._fleet.live(name, until))

        self.share(self._pool.submit(find) if self.main else None)
        stamp = self._publisher.publish(name, sends)
        if self._fleet is not None:
            self._fleet.took_in(name, stamp)
            self._expected[name] = stamp

    @property
    def _by_folder(self) -> bool:
        return self.cfg.rollout.vllm.transport is WeightTransport.folder

    def _wanted(self, name: WeightSet) -> Stamp:
        """The weights that answers must come from."""
        self._check_asked(name)
        if name not in self._expected:
            raise RolloutError(
                f"{self.cfg.algorithm.name} asks for {name.value} weights where the run holds none"
            )
        return self._expected[name]

    @property
    def _sleeps(self) -> bool:
        colocated = self.cfg.rollout.placement is Placement.colocated
        return colocated and self.policy.platform.cuda and not self.cfg.rollout.vllm.urls

    def wake(self) -> None:
        if self._sleeps and self._fleet is not None:
            self._fleet.wake()

    def rest(self) -> None:
        """Give the trainer the memory of the GPU that it shares with the engines."""
        if self._sleeps and self._fleet is not None:
            self._fleet.sleep()

    # -- questions ----------------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: Callable[[int, int], None] | None = None,
        until: Until = FOREVER,
    ) -> list[Completion]:
        """See RolloutEngine.generate."""

        def ask(engine: BackendEngine) -> list[dict[str, Any]]:
            return [
                asdict(c) for c in engine.generate(requests, params, weight_set, on_done, until)
            ]

        return [completion_of(row) for row in self._ask_first(weight_set, ask)]

    def label_scores(
        self,
        prompts: Sequence[TokenIds],
        labels: TokenIds,
        weight_set: WeightSet = WeightSet.POLICY,
        on_done: Callable[[int, int], None] | None = None,
        until: Until = FOREVER,
    ) -> list[LabelScores]:
        """See RolloutEngine.label_scores."""

        def ask(engine: BackendEngine) -> list[list[Any]]:
            found = engine.label_scores(prompts, labels, weight_set, on_done, until)
            return [[list(s.logprobs), s.best] for s in found]

        rows = self._ask_first(weight_set, ask)
        return [LabelScores(tuple(logprobs), best) for logprobs, best in rows]

    def _ask_first(self, weight_set: WeightSet, ask: Callable[[BackendEngine], Any]) -> Any:
        """What the first rank is answered, on every rank. Collective."""
        self._check_asked(weight_set)
        give = self.hand_over()

        def work() -> Any:
            assert self.direct is not None
            give()
            try:
                return ask(self.direct)
            finally:
                self.rest()

        return self.share(self._pool.submit(work) if self.main else None)

    def asking(self, rollouts: EngineRollouts, cancelled: Callable[[], bool]) -> EngineRollouts:
        """The same rollouts for a thread of the first rank, without the other ranks."""
        return EngineRollouts(
            rollouts.cfg,
            rollouts.tokenizer,
            self.direct or self,
            lambda _: None,
            self.start.arch.max_position_embeddings,
            cancelled=cancelled,
        )

    def _check_asked(self, weight_set: WeightSet) -> None:
        if weight_set not in self.asked:
            raise RolloutError(
                f"{self.cfg.algorithm.name} asks for {weight_set.value} weights but declares "
                f"{', '.join(sorted(n.value for n in self.asked))} (Algorithm.asked_weights)"
            )

    def share(self, future: Future[Any] | None) -> Any:
        """See RolloutAccess.share."""
        # Whatever is waited for has a deadline of its own; each question asked is a tick.
        rollout = self.cfg.rollout
        deadlines = (rollout.vllm.start_timeout_s, rollout.timeout_s)
        longest = max(deadlines) + rollout.vllm.sync_timeout_s
        with phase("waiting for the rollout engines", longest):
            return self._share(future)

    def _share(self, future: Future[Any] | None) -> Any:
        group, device = world_group(), self.policy.platform.device()
        while True:
            state: dict[str, Any] = {}
            if future is not None and wait([future], timeout=_TURN_S).done:
                error = future.exception()
                state = {"value": future.result()} if error is None else _told(error)
            state = all_gather_json(state, group, device)[0]
            if "value" in state:
                return state["value"]
            if "error" in state:
                if future is not None:
                    raise future.exception() or AssertionError
                raise _raised(state)


def _told(error: BaseException) -> dict[str, Any]:
    return {"error": type(error).__name__, "message": str(error)}


def _raised(state: dict[str, Any]) -> SelfPrefError:
    # What is not ours is no RolloutError on the first rank either: all ranks end the same way.
    kind = getattr(errors, state["error"], SelfPrefError)
    return kind(f"on the first rank: {state['error']}: {state['message']}")


def _own_address(urls: Sequence[str]) -> str:
    """This machine's address as the servers see it, for those that weights are broadcast to."""
    if not urls:
        return "127.0.0.1"
    server = urlsplit(urls[0])
    try:
        with socket.create_connection((server.hostname or "", server.port or 80), 10.0) as probe:
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"  # reaching the server fails soon, and says so


def _weights_dir(cfg: RunConfig, folder: Path) -> Path:
    """Where new weights are put: memory, where the machine has it as a folder."""
    own = f"selfpref-{os.getuid()}-{secrets.token_hex(4)}"
    given = cfg.rollout.vllm.weights_dir
    if given is not None:
        return Path(given).expanduser().resolve() / own
    shared = Path("/dev/shm")
    return shared / own if os.access(shared, os.W_OK) else folder / "weights"
