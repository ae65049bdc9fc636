"""Starting the processes of a run.

One process runs in place. For more on this machine the command starts itself again under torchrun;
where a launcher (torchrun, srun with the variables of torch.distributed) has already started the
ranks, it just goes on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from nemo_selfpref.config.schema import RunConfig
from nemo_selfpref.errors import ConfigError


def needs_launch(cfg: RunConfig) -> bool:
    """Whether this process must start the ranks of the run."""
    if "RANK" in os.environ:
        return False
    if cfg.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: start every rank with torchrun or srun; "
            "this command starts processes on one machine only"
        )
    return cfg.trainer.devices > 1


def launch(cfg: RunConfig, arguments: Sequence[str]) -> int:
    """Run `selfpref ARGUMENTS` on trainer.devices processes; returns the exit status."""
    threads = max(1, (os.cpu_count() or 1) // cfg.trainer.devices)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(cfg.trainer.devices),
        "-m",
        "nemo_selfpref.cli",
        *arguments,
    ]
    return subprocess.run(command, env=environment, check=False).returncode
