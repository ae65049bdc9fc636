"""What a job script asks before it starts ranks: `python -m nemo_selfpref.training.job_facts
--config-name NAME -- key=value ...` composes the configuration and prints the run's folder, and on
a second line the sets of weights that its method asks engines for, with commas between."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_selfpref.algorithms.base import ALIASES, algorithms
from nemo_selfpref.config.loader import load_config, to_typed
from nemo_selfpref.errors import ConfigError, SelfPrefError
from nemo_selfpref.redact import redact
from nemo_selfpref.training.train import pick_algorithm


@dataclass(frozen=True)
class JobFacts:
    """What a job script has to know of its run."""

    folder: Path
    """The run's folder, absolute."""
    weights: tuple[str, ...]
    """Sets of weights that engines have to hold, by name."""


def job_facts(name: str, overrides: Sequence[str], config_dir: Path | None) -> JobFacts:
    """The facts of a configuration; data and engines are not looked at.

    Raises:
        ConfigError: as for training, and where the folder's name holds a line break.
    """
    schemas = {name: cls.config_class for name, cls in algorithms().items()}
    if name in ALIASES and not (config_dir and (config_dir / f"{name}.yaml").exists()):
        name = ALIASES[name][0]
    typed = to_typed(load_config(name, overrides, schemas, config_dir))
    folder = (Path(typed.exp_manager.exp_dir) / typed.exp_manager.name).absolute()
    if "\n" in str(folder):
        raise ConfigError(f"exp_manager.exp_dir: {str(folder)!r} holds a line break; take it out")
    asked = pick_algorithm(typed).asked_weights()
    held = {name.value for name in asked} | {name.value for name in typed.rollout.vllm.also_serve}
    return JobFacts(folder, tuple(sorted(held)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="job_facts", description=__doc__)
    parser.add_argument("--config-name", required=True)
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    try:
        facts = job_facts(args.config_name, args.overrides, args.config_dir)
    except SelfPrefError as error:
        sys.stderr.write(f"selfpref: {redact(str(error))}\n")
        return error.exit_status
    sys.stdout.write(f"{facts.folder}\n{','.join(facts.weights)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
