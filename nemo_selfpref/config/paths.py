"""Where the configuration files lie: beside the package when installed, at the top of the
repository when run from a checkout."""

from __future__ import annotations

from pathlib import Path

import nemo_selfpref


def conf_dir() -> Path:
    """Folder of the YAML files and prompt templates."""
    package = Path(nemo_selfpref.__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def prompts_dir() -> Path:
    return conf_dir() / "prompts"
