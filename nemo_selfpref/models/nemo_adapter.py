"""The one place that imports NeMo: the model base class, the experiment manager and the logger.

Only what nemo-toolkit 2.7 and 3.0 share is used.
"""

from __future__ import annotations

import logging as std_logging
import warnings

warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|nemo|lightning)\..*")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|nemo)\..*")

# NeMo's telemetry finds no exporter, sends nothing, and says so at length.
std_logging.getLogger("nv_one_logger").setLevel(std_logging.ERROR)

from nemo.core import ModelPT  # noqa: E402
from nemo.utils import exp_manager as _exp_manager  # noqa: E402
from nemo.utils import logging  # noqa: E402
from nemo.utils.exp_manager import exp_manager  # noqa: E402

# `git diff` of whatever folder the user stands in would be copied into the logs of every stage,
# and a repository may name programs for git to run on a diff. The commit stays on record.
_exp_manager.get_git_diff = lambda: ""

__all__ = ["ModelPT", "exp_manager", "logging", "quiet"]


def quiet() -> None:
    """Keep NeMo's and Lightning's chatter out of the terminal; their log files keep it."""
    logging.setLevel(logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "megatron"):
        std_logging.getLogger(name).setLevel(std_logging.WARNING)
