"""A SLURM of this machine alone: munged, slurmctld and some slurmd, each one a node with GPUs that
are plain files. Needs no privileges; everything is in one folder and ends with the block."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

NODES, GPUS = 3, 2
_SBIN = "/usr/sbin:/usr/local/sbin:/sbin"
_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
_DOWN = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT"


def missing() -> list[str]:
    """Programs of SLURM and munge that are not here."""
    return [name for name in _NEEDED if _which(name) is None]


def eventually(
    reached: Callable[[], Any], within_s: float, what: Callable[[], str] = lambda: ""
) -> Any:
    """What `reached` returns once that is true; polled."""
    end = time.monotonic() + within_s
    while not (found := reached()):
        assert time.monotonic() < end, f"not reached within {within_s:g} s: {what()}"
        time.sleep(0.2)
    return found


class Cluster:
    """Jobs of a running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "PATH": f"{os.environ['PATH']}:{_SBIN}",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """What a command printed; it has to end well."""
        done = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, of the first component where it has several."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, job: str) -> str:
        return self.facts(job)["JobState"]

    def until(
        self, job: str, *states: str, within_s: float = 240.0, log: Path | None = None
    ) -> str:
        """Wait for one of some states, by default for the end of the job; the state."""
        wanted = states or tuple(_DOWN.split())

        def told() -> str:
            text = log.read_text(errors="replace")[-3000:] if log and log.exists() else ""
            return f"job {job} is {self.facts(job)}\n{text}"

        return eventually(lambda: (now := self.state(job)) in wanted and now, within_s, told)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster that ends with the block, and what still runs on it."""
    made = Cluster(folder)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    folder.chmod(0o755)  # munged wants to be reached by whoever may
    _configure(folder)
    with contextlib.ExitStack() as daemons:
        _start(daemons, made, "munged", *_munged(folder))
        eventually((folder / "munge.socket").exists, 30)
        _start(daemons, made, "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for n in range(1, NODES + 1):
            arguments = ("-D", "-N", f"n{n}", "-f", str(folder / "slurm.conf"))
            _start(daemons, made, "slurmd", *arguments, log=f"slurmd-n{n}.out")
        eventually(lambda: _idle(made), 60, lambda: _logs(folder))
        try:
            yield made
        finally:
            _empty(made)


def _munged(folder: Path) -> Sequence[str]:
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
    paths = [f"--{name}={folder / f'munge.{end}'}" for name, end in files.items()]
    return ["--foreground", "--force", *paths, f"--seed-file={folder / 'munge.seed'}"]


def _configure(folder: Path) -> None:
    host, ports = socket.gethostname().split(".")[0], _free_ports(NODES + 1)
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports[0]}",
        "AuthType=auth/munge",
        # A job that is queued again waits until credentials of its first start are void.
        f"AuthInfo=socket={folder / 'munge.socket'},cred_expire=10",
        *(f"{who}={getpass.getuser()}" for who in ("SlurmUser", "SlurmdUser")),
        f"StateSaveLocation={folder / 'state'}",
        f"SlurmdSpoolDir={folder / 'spool-%n'}",
        *(f"{d}PidFile={folder / d.lower()}-%n.pid" for d in ("Slurmctld", "Slurmd")),
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SwitchType=switch/none",
        "MpiDefault=none",
        "ReturnToService=2",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "GresTypes=gpu",
        "SlurmdParameters=config_overrides",
        "KillWait=5",
        "SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0",
    ]
    shape = f"CPUs=8 Sockets=8 CoresPerSocket=1 ThreadsPerCore=1 RealMemory=1000 Gres=gpu:{GPUS}"
    for n in range(1, NODES + 1):
        (folder / f"spool-n{n}").mkdir()
        where = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n]}"
        lines.append(f"NodeName=n{n} {where} {shape}")
    lines.append(f"PartitionName=all Nodes=n[1-{NODES}] Default=YES MaxTime=60 State=UP")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    for n in range(GPUS):
        (folder / f"gpu{n}").touch()
    devices = f"{folder}/gpu[0-{GPUS - 1}]"
    (folder / "gres.conf").write_text(f"NodeName=n[1-{NODES}] Name=gpu File={devices}\n")
    (folder / "state").mkdir()


def _start(
    daemons: contextlib.ExitStack, made: Cluster, name: str, *arguments: str, log: str = ""
) -> None:
    program = _which(name)
    assert program is not None
    with open(made.folder / (log or f"{name}.out"), "wb") as output:
        process = subprocess.Popen(
            [program, *arguments], stdout=output, stderr=output, env=made.environment
        )
    daemons.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _idle(made: Cluster) -> bool:
    with contextlib.suppress(AssertionError):
        states = made.run("sinfo", "--noheader", "--Node", "--format=%T").split()
        return states == ["idle"] * NODES
    return False


def _empty(made: Cluster) -> None:
    """Cancel what is left, and wait until its processes have ended."""
    jobs = made.run("squeue", "--noheader", "--format=%A").split()
    if jobs:
        made.run("scancel", *jobs)
    eventually(lambda: not made.run("squeue", "--noheader").strip(), 60)


def _logs(folder: Path) -> str:
    files = sorted(folder.glob("*.out"))
    return "\n".join(f"{p.name}: {p.read_text(errors='replace')[-800:]}" for p in files)


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{_SBIN}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_:
        probes = [open_.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
