"""Membership in a process group of torch's that is not torch's global one: a trainer and a server
may each be in another already. Every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from nemo_selfpref.errors import WeightSyncError
from nemo_selfpref.rollout.engine import Until
from nemo_selfpref.rollout.serving.wire import GroupSource

dist: Any = torch.distributed  # its type stubs lack half of what is used here
_POLL_S = 0.05
_MARGIN_S = 1.0
"""How much longer torch itself waits than we do: our error comes first, and says which tensor."""
_RETRY_S = 0.2
_LONGEST_S = 24 * 3600.0

Result = TypeVar("Result")


def serve_store(host: str, world_size: int, timeout_s: float) -> tuple[Any, int]:
    """The store at which a group meets, on a free port of one address; the store and its port.

    Raises:
        WeightSyncError: the address is not of this machine.
    """
    try:
        # Bound here: torch itself would listen on every address of the machine.
        listener = socket.create_server((host, 0))
    except OSError as error:
        raise WeightSyncError(
            f"the weights' sender cannot listen on {host}: {error}. Expected an address of this "
            "machine."
        ) from error
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host,
        port,
        world_size,
        True,
        timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


class Peer:
    """One rank's membership in a group."""

    def __init__(self, store: Any, group: Any, source: GroupSource) -> None:
        self._store = store
        self._group: Any = group
        self.where = f"{source.host}:{source.port}"
        self.device = _device_of(source.backend)

    @classmethod
    def join(cls, source: GroupSource, until: Until) -> Peer:
        """As receiver source.rank.

        Raises:
            WeightSyncError: nobody listens there, or the others did not join in time.
        """
        _device_of(source.backend)
        where = f"the weights' group at {source.host}:{source.port}"
        own = _reach(source, where, until)

        def act() -> Any:
            return dist.TCPStore(
                source.host,
                source.port,
                source.world_size,
                False,
                _limit(until),
                wait_for_workers=False,
            )

        return cls._meet(_within(until, where, act), source, source.rank, own, until)

    @classmethod
    def lead(cls, store: Any, source: GroupSource, until: Until) -> Peer:
        """As rank 0, on the store it serves."""
        return cls._meet(store, source, 0, source.host, until)

    @classmethod
    def _meet(cls, store: Any, source: GroupSource, rank: int, own: str, until: Until) -> Peer:
        where = f"the weights' group at {source.host}:{source.port}"

        def act() -> Peer:
            store.set(f"joined/{rank}", "")
            # Where torch waits for the others, it cannot be told to give up.
            others = [f"joined/{other}" for other in range(source.world_size)]
            while not store.check(others):
                until.check(where)
                time.sleep(_POLL_S)
            return cls(store, _group(store, source, rank, own, _limit(until)), source)

        return _within(until, where, act)

    def broadcast(self, flat: Tensor, what: str, until: Until) -> None:
        """Rank 0's bytes into `flat`, or from it. NCCL may hang without an error, hence a thread
        and a deadline."""

        def act() -> None:
            options = dist.BroadcastOptions()
            options.rootRank, options.rootTensor = 0, 0
            self._group.broadcast([flat], options).wait(_limit(until))
            if flat.device.type == "cuda":
                torch.cuda.synchronize(flat.device)

        if flat.numel():
            _within(until, what, act)

    def say(self, key: str, value: str = "") -> None:
        """Tell the sender; it may be gone."""
        with contextlib.suppress(RuntimeError):
            self._store.set(key, value)

    def leave(self) -> None:
        """Once, at the end; what still runs in the group is abandoned."""
        groups: list[Any] = [self._group]
        self._group = None

        def drop() -> None:
            with contextlib.suppress(RuntimeError):
                groups[0].abort()
            groups.clear()

        # Gloo's group waits in its destructor for what runs in it, until its own time is over.
        thread = threading.Thread(target=drop, daemon=True)
        thread.start()
        thread.join(2 * _MARGIN_S)


def _device_of(backend: str) -> torch.device:
    if backend == "gloo":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise WeightSyncError(
            "weights by nccl need a GPU on both sides and none is visible here: set "
            "rollout.vllm.transport=gloo or folder"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _group(store: Any, source: GroupSource, rank: int, own: str, limit: timedelta) -> Any:
    if source.backend == "nccl":
        return dist.ProcessGroupNCCL(store, rank, source.world_size, limit)
    options = dist.ProcessGroupGloo._Options()
    # The address that reaches the peer: torch would take what the machine's name resolves to.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own)]
    options._timeout = limit
    return dist.ProcessGroupGloo(store, rank, source.world_size, options)


def _reach(source: GroupSource, where: str, until: Until) -> str:
    """Wait until somebody listens there; this machine's own address on the way.

    Raises:
        WeightSyncError: nobody does in time.
    """
    while True:
        try:
            wait_s = max(0.01, min(_left(until), 5.0))
            with socket.create_connection((source.host, source.port), timeout=wait_s) as probe:
                return probe.getsockname()[0]
        except OSError as error:
            if until.over:
                raise WeightSyncError(f"{where}: {error}") from error
        time.sleep(_RETRY_S)


def _limit(until: Until) -> timedelta:
    """What torch is told."""
    return timedelta(seconds=_left(until) + _MARGIN_S)


def _left(until: Until) -> float:
    return _LONGEST_S if until.remaining is None else until.remaining


def _within(until: Until, what: str, act: Callable[[], Result]) -> Result:
    """Do something on a thread and wait for it; one that never ends is left behind."""
    done: Future[Result] = Future()

    def run() -> None:
        try:
            done.set_result(act())
        except BaseException as error:
            done.set_exception(error)

    began = time.monotonic()
    threading.Thread(target=run, daemon=True).start()
    while not done.done():
        if until.over and not wait([done], timeout=_POLL_S).done:
            late = f"not there by the deadline, after {time.monotonic() - began:.1f} s"
            raise WeightSyncError(f"{what}: " + ("cancelled" if until.cancelled() else late))
        wait([done], timeout=min(_POLL_S, _left(until)))
    try:
        return done.result()
    except (RuntimeError, OSError, ValueError) as error:
        if isinstance(error, WeightSyncError):
            raise
        raise WeightSyncError(f"{what}: {str(error).splitlines()[0]}") from error
