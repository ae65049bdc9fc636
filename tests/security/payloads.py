"""What an attacker would send: each payload leaves a trace if anything runs it.

Every helper raises by itself, so that it also works under `python -O`.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.path), 0o777, True)


@dataclass(frozen=True)
class Canary:
    """A path that only a payload that ran makes, and a folder that only such a one deletes."""

    made: Path
    victim: Path
    module: str
    """Importing this module makes the path."""

    @classmethod
    def lay(cls, folder: Path) -> Canary:
        canary = cls(folder / "canary", folder / "victim", f"bomb_{os.urandom(6).hex()}")
        canary.victim.mkdir(parents=True)
        code = f"import os\nos.makedirs({str(canary.made)!r}, exist_ok=True)\ndef f(): pass\n"
        (folder / f"{canary.module}.py").write_text(code)
        canary.file.write_bytes(canary.pickle())
        np.save(folder / "bomb.npy", np.array([_Bomb(canary.made)], dtype=object))
        return canary

    @property
    def file(self) -> Path:
        """A pickle on disk."""
        return self.made.with_name("bomb.pkl")

    @property
    def sang(self) -> bool:
        return self.made.exists() or not self.victim.exists()

    def check_silent(self) -> None:
        if self.sang:
            raise AssertionError(f"something ran the payload of {self.made}")

    def pickle(self) -> bytes:
        """Bytes that make the path when they are unpickled."""
        return pickle.dumps(_Bomb(self.made))

    def torch_file(self) -> bytes:
        """The same in the archive that torch.save writes."""
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(_Bomb(self.made), protocol=2))
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
        return whole.getvalue()

    def targets(self) -> dict[str, dict[str, Any]]:
        """What hydra.utils.instantiate would make of a dictionary, by name."""
        path, call = str(self.made), f"__import__('os').mkdir({str(self.made)!r})"
        opened = {"_target_": "builtins.open", "_args_": [str(self.file), "rb"]}
        array = str(self.made.with_name("bomb.npy"))
        return {
            "os.system": {"command": f"mkdir {path}"},
            "posix.system": {"command": f"mkdir {path}"},
            "subprocess.Popen": {"args": ["mkdir", path]},
            "pty.spawn": {"argv": ["mkdir", path]},
            "builtins.eval": {"_args_": [call]},
            "builtins.exec": {"_args_": [call]},
            "hydra.utils.get_method": {"path": f"{self.module}.f"},
            "importlib.import_module": {"name": self.module},
            "pickle.load": {"_args_": [opened]},
            "numpy.load": {"file": array, "allow_pickle": True},
            "torch.load": {"f": str(self.file), "weights_only": False},
            "shutil.rmtree": {"path": str(self.victim)},
        }


GADGETS = (
    *("os.system", "posix.system", "subprocess.Popen", "pty.spawn", "builtins.eval"),
    *("builtins.exec", "hydra.utils.get_method", "importlib.import_module", "pickle.load"),
    *("numpy.load", "torch.load", "shutil.rmtree"),
)


def gadget(canary: Canary, name: str) -> dict[str, Any]:
    return {"_target_": name, **canary.targets()[name]}


KINDS: dict[str, Callable[[Canary], bytes]] = {
    "pickle": Canary.pickle,
    "torch.save": Canary.torch_file,
}
"""What is put in the place of a file."""

KEY = "teacher-canary-9f8e7d6c5b4a"
TOKEN = "rollout-canary-0a1b2c3d4e5f"
ENVIRONMENT = {
    "TEACHER_API_KEY": KEY,
    "HF_TOKEN": "hf_hubCanary0123456789",
    "WANDB_API_KEY": "wandb-canary-5566778899",
    "AWS_SECRET_ACCESS_KEY": "aws/canary+0123456789",
}
"""Secrets as a user has them in the environment; only the first is needed."""
