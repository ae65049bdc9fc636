"""The text of a job script. Whatever a person gave stands in it quoted, as data."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_selfpref.errors import ConfigError

_WARNING_S = 300
"""How long before its end a job is told to stop: the time of a step and a save."""


@dataclass(frozen=True)
class EngineNodes:
    """The second component of a heterogeneous job."""

    nodes: int
    gpus_per_node: int


@dataclass(frozen=True)
class JobScript:
    name: str
    config_name: str
    overrides: Sequence[str]
    nodes: int
    gpus_per_node: int
    """0 runs one rank a node, without a GPU."""
    cpus_per_task: int | None
    options: Mapping[str, str]
    """More options of sbatch for every component, such as the partition."""
    engines: EngineNodes | None
    log: Path
    working_dir: Path
    environment: Mapping[str, str | None]
    """Knobs of slurm/run.sh; None leaves one as it is where the job starts."""


def job_script(job: JobScript) -> str:
    """A script for sbatch.

    Raises:
        ConfigError: the log's path cannot be written into an #SBATCH line.
    """
    if any(c in str(job.log) for c in "\n\"'\\") or "%" in str(job.log.parent):
        raise ConfigError(
            f"{job.log}: quotes, '%' and line breaks cannot stand in a job's log path"
        )
    lines = ["#!/usr/bin/env bash", *_component(job, job.nodes, job.gpus_per_node, True)]
    lines += [
        f"#SBATCH --job-name={job.name}",
        f"#SBATCH --signal=USR1@{_WARNING_S}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f'#SBATCH --output="{job.log}"',
    ]
    if job.engines is not None:
        lines.append("#SBATCH hetjob")
        lines += _component(job, job.engines.nodes, job.engines.gpus_per_node, False)
    lines += ["set -euo pipefail", f"cd {shlex.quote(str(job.working_dir))}"]
    given = {name: value for name, value in job.environment.items() if value is not None}
    lines += [f"export {name}={shlex.quote(value)}" for name, value in given.items()]
    words = [job.config_name, *job.overrides]
    lines += ['exec bash "$SELFPREF_HOME/slurm/run.sh" \\']
    lines += [f"  {shlex.quote(word)} \\" for word in words[:-1]] + [f"  {shlex.quote(words[-1])}"]
    return "\n".join(lines) + "\n"


def _component(job: JobScript, nodes: int, gpus: int, ranks: bool) -> list[str]:
    options = {"nodes": str(nodes), "ntasks-per-node": str(max(gpus, 1) if ranks else 1)}
    if gpus:
        options["gpus-per-node"] = str(gpus)
    if ranks and job.cpus_per_task is not None:
        options["cpus-per-task"] = str(job.cpus_per_task)
    options["mem"] = "0"
    lines = [f"#SBATCH --{name}={value}" for name, value in {**options, **job.options}.items()]
    return [*lines, "#SBATCH --exclusive"]
