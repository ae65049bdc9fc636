"""Imports packages for `selfpref doctor`, in a process of its own: a broken one may end it.

    python -m nemo_selfpref.training.doctor_child MODULE...

Writes a line of JSON before and after each module, and one of what torch says of the devices.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any, TextIO


def main(modules: list[str]) -> None:
    # What packages print on their way goes elsewhere.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for module in modules:
        _say(out, {"begins": module})
        _say(out, {"ended": module, "error": _import(module)})
        if module == "torch" and "torch" in sys.modules:
            _say(out, {"devices": _devices()})


def _say(out: TextIO, value: dict[str, Any]) -> None:
    out.write(json.dumps(value) + "\n")


def _import(module: str) -> str | None:
    """Why it cannot be imported; None where it can."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return "missing"
        return f"{type(error).__name__}: {error}"
    except (Exception, SystemExit) as error:  # a library of another build raises anything
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"[:300]
    return None


def _devices() -> dict[str, Any]:
    import torch
    import torch.cuda.nccl

    found: dict[str, Any] = {"cuda_build": torch.version.cuda, "devices": [], "nccl": None}
    try:
        found["available"] = torch.cuda.is_available()
        if found["available"]:
            for number in range(torch.cuda.device_count()):
                known = torch.cuda.get_device_properties(number)
                capability = [known.major, known.minor]
                found["devices"].append([known.name, capability, known.total_memory])
            found["bf16"] = torch.cuda.is_bf16_supported()
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"[:300]
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
