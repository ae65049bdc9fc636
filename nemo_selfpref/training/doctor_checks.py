"""What `selfpref doctor` looks at beside packages and devices: disks, limits, network, launcher.

Only the standard library is imported here: it has to work where nothing else does.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nemo_selfpref.files import fsync_path, publish_folder, write_bytes
from nemo_selfpref.training.doctor_packages import Finding, Status

_GIB = 1 << 30
_DISK_GIB, _SHARED_GIB = 1.0, 1.0
"""Less than this free is too little for any checkpoint, and for NCCL beside new weights."""
_FILES = 4096
"""Open files: a rank has its connections, shards and data open together."""
_PORTS = 1000
_LOOPBACK = ("127.", "::1")


@dataclass(frozen=True)
class Wants:
    """What a configuration needs; the defaults are those of a run on one CPU.

    `paths`: files and folders by the name of their setting.
    """

    configured: bool = False
    exp_dir: Path = Path("runs")
    devices: int = 1
    nodes: int = 1
    gpu: bool = False
    bf16: bool = False
    fp8: str | None = None
    vllm: bool = False
    vllm_python: str = ".venv-rollout/bin/python"
    vllm_port: int = 0
    packages: frozenset[str] = frozenset()
    paths: Mapping[str, str] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        return self.devices * self.nodes > 1


def python_version() -> Finding:
    """pip refuses older ones than setup.py allows, so there is nothing to judge."""
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", "python", Status.OK, f"{found}, {sys.executable}")


# -- disks -------------------------------------------------------------------------------------


def disks(wants: Wants) -> Iterator[Finding]:
    """Free space of exp_dir, a file written there as checkpoints are, and /dev/shm."""
    place = _existing(wants.exp_dir)
    yield _free("exp_dir", place, _DISK_GIB, "checkpoints do not fit", "free some space", True)
    yield _written(place)
    shared = Path("/dev/shm")
    cost = "NCCL and weights on their way to vLLM need it"
    remedy = "mount a larger /dev/shm; in a container, --shm-size=16g or --ipc=host"
    needed = (wants.gpu and wants.several) or wants.vllm
    if shared.is_dir():
        yield _free("/dev/shm", shared, _SHARED_GIB, cost, remedy, needed)
    else:
        yield Finding("disks", "/dev/shm", Status.MISSING, "", cost, remedy, needed)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _free(name: str, place: Path, least: float, cost: str, remedy: str, needed: bool) -> Finding:
    usage = shutil.disk_usage(place)
    found = f"{place}: {usage.free / _GIB:,.1f} of {usage.total / _GIB:,.1f} GiB free"
    if usage.free >= least * _GIB:
        return Finding("disks", name, Status.OK, found, required=needed)
    note = f"less than {least:g} GiB: {cost}"
    return Finding("disks", name, Status.BROKEN, found, note, remedy, needed)


def _written(place: Path) -> Finding:
    """Write, fsync and rename a file and a folder, and read back what was written."""
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as made:
            folder = Path(made)
            write_bytes(folder / "new" / "file", b"written")
            publish_folder(folder / "new", folder / "named")
            same = (folder / "named" / "file").read_bytes() == b"written"
            fsync_path(folder)
    except OSError as error:
        remedy = "give exp_manager.exp_dir a folder that you may write to"
        note = f"{error.strerror or error}: no checkpoint can be written"
        return Finding("disks", "write, fsync, rename", Status.BROKEN, str(place), note, remedy)
    if same:
        return Finding("disks", "write, fsync, rename", Status.OK, str(place))
    note, remedy = "it read back something else", "use another file system"
    return Finding("disks", "write, fsync, rename", Status.BROKEN, str(place), note, remedy)


def paths(wants: Wants) -> Iterator[Finding]:
    """Files and folders that the configuration names."""
    for name, path in wants.paths.items():
        if Path(path).expanduser().exists():
            yield Finding("configuration", name, Status.OK, path)
        else:
            remedy = f"put it there, or change {name}"
            yield Finding("configuration", name, Status.MISSING, path, "no such file", remedy)


# -- limits ------------------------------------------------------------------------------------


def limits(wants: Wants) -> Iterator[Finding]:
    """Open files, shared memory, locked memory and threads."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)} of {_limit(hard)}"
    if soft == resource.RLIM_INFINITY or soft >= _FILES:
        yield Finding("limits", "open files", Status.OK, found, required=False)
    else:
        note, remedy = "many ranks or engines may run out of them", "ulimit -n 65536"
        yield Finding("limits", "open files", Status.BROKEN, found, note, remedy, False)
    yield _shared_memory()
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    free = locked == resource.RLIM_INFINITY or not Path("/sys/class/infiniband").is_dir()
    status, note = (
        (Status.OK, "") if free else (Status.BROKEN, "InfiniBand registers memory: NCCL fails")
    )
    remedy = "" if free else "ulimit -l unlimited; in a container, --ulimit memlock=-1"
    needed = wants.gpu and wants.nodes > 1
    yield Finding("limits", "locked memory", status, _limit(locked), note, remedy, needed)
    yield _threads(wants)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def _shared_memory() -> Finding:
    path = Path("/proc/sys/kernel/shmmax")
    try:
        largest = int(path.read_text())
    except (OSError, ValueError) as error:
        return Finding("limits", "shmmax", Status.MISSING, "", str(error), required=False)
    if largest >= _SHARED_GIB * _GIB:
        return Finding("limits", "shmmax", Status.OK, f"{largest / _GIB:,.1f} GiB", required=False)
    note, remedy = "segments that ranks share may not fit", "sysctl -w kernel.shmmax=17179869184"
    return Finding("limits", "shmmax", Status.BROKEN, f"{largest:,}", note, remedy, False)


def _threads(wants: Wants) -> Finding:
    name, cores = "OMP_NUM_THREADS", os.cpu_count() or 1
    given, fit = os.environ.get("OMP_NUM_THREADS"), max(1, cores // wants.devices)
    found = f"{given or 'not set'}; {cores} cores, {wants.devices} ranks on this machine"
    if given is None and "RANK" not in os.environ:
        # selfpref train starts its ranks with a share of the cores each.
        return Finding("limits", name, Status.OK, found, required=False)
    if given is not None and given.isdecimal() and 1 <= int(given) <= fit:
        return Finding("limits", name, Status.OK, found, required=False)
    note = "ranks with more threads than cores wait for each other"
    return Finding("limits", name, Status.BROKEN, found, note, f"export {name}={fit}", False)


# -- network and launcher ----------------------------------------------------------------------


def network(wants: Wants) -> Iterator[Finding]:
    """The host's own name, and ports to listen on."""
    yield _hostname(wants)
    yield _port(wants.vllm_port, wants)
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    try:
        low, high = map(int, path.read_text().split())
    except (OSError, ValueError) as error:
        yield Finding("network", "free ports", Status.MISSING, "", str(error), required=False)
        return
    count, found = high - low + 1, f"{low} to {high}"
    if count >= _PORTS:
        yield Finding("network", "free ports", Status.OK, found, required=False)
        return
    note = f"only {count}: ranks and servers open many connections"
    remedy = "sysctl -w net.ipv4.ip_local_port_range='32768 60999'"
    yield Finding("network", "free ports", Status.BROKEN, found, note, remedy, False)


def _hostname(wants: Wants) -> Finding:
    name, needed = socket.gethostname(), wants.nodes > 1
    remedy = "put the name into /etc/hosts or DNS, with the address that other nodes reach"
    try:
        addresses = sorted({str(a[4][0]) for a in socket.getaddrinfo(name, None)})
    except OSError as error:
        note = f"{error.strerror or error}: other nodes cannot be told where this one is"
        return Finding("network", "hostname", Status.BROKEN, name, note, remedy, needed)
    found = f"{name} is {', '.join(addresses)}"
    if needed and all(address.startswith(_LOOPBACK) for address in addresses):
        note = "a loopback address: other nodes cannot reach it"
        return Finding("network", "hostname", Status.BROKEN, found, note, remedy)
    return Finding("network", "hostname", Status.OK, found, required=needed)


def _port(port: int, wants: Wants) -> Finding:
    needed, what = wants.vllm or wants.several, f"port {port}" if port else "any free port"
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except OSError as error:
        remedy = "set rollout.vllm.port=0, or end what listens there"
        note = f"{error.strerror or error}: servers and ranks cannot listen"
        return Finding("network", "listening", Status.BROKEN, what, note, remedy, needed)
    return Finding("network", "listening", Status.OK, what, required=needed)


def launcher(wants: Wants) -> Iterator[Finding]:
    """Whether SLURM's allocation, and the ranks that were started, are what the settings say."""
    at_hand: list[tuple[str, int | None]] = [
        ("SLURM_JOB_NUM_NODES", wants.nodes if wants.configured else None),
        ("SLURM_GPUS_ON_NODE", wants.devices if wants.gpu else None),
        ("WORLD_SIZE", wants.devices * wants.nodes if wants.configured else None),
    ]
    if "SLURM_JOB_ID" not in os.environ:
        yield Finding("launcher", "SLURM", Status.OK, "not in a job", required=False)
    for name, wanted in at_hand:
        if (given := os.environ.get(name)) is None:
            continue
        same = wanted is None or _enough(name, given, wanted)
        status, note = (Status.OK, "") if same else (Status.BROKEN, f"the settings want {wanted}")
        remedy = "" if same else "set trainer.num_nodes and trainer.devices to what was allocated"
        yield Finding("launcher", name, status, given, note, remedy)
    if wants.nodes > 1 and "RANK" not in os.environ:
        note = f"trainer.num_nodes={wants.nodes}; this command was started by no launcher"
        remedy = "start it like the run, with torchrun or srun, to have every node looked at"
        yield Finding("launcher", "ranks", Status.OK, "one process", note, remedy, False)


def _enough(name: str, given: str, wanted: int) -> bool:
    if not given.isdecimal():
        return False
    # An allocation may be larger than what is used of it; ranks that exist must all be used.
    return int(given) == wanted if name == "WORLD_SIZE" else int(given) >= wanted


CHECKS: tuple[Callable[[Wants], Iterator[Finding]], ...] = (paths, disks, limits, network, launcher)
