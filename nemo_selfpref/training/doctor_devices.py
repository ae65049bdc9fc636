"""What `selfpref doctor` says of the trainer's devices and of vLLM's own interpreter.

Only the standard library is imported here: it has to work where nothing else does.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_selfpref.training.doctor_checks import Wants
from nemo_selfpref.training.doctor_packages import Finding, Status, judged

_GIB = 1 << 30
_VLLM_S = 180.0
_ASK_VLLM = """
import importlib.metadata as m, json, sys
names = m.packages_distributions().get("vllm", [])
found = {"vllm": m.version(names[0]) if names else None, "error": None}
try:
    import nemo_selfpref.rollout.serving.engine_process
    if sys.argv[1] == "import":
        from vllm import LLM
except (Exception, SystemExit) as error:
    found["error"] = f"{type(error).__name__}: {error}"[:300]
print("\\n" + json.dumps(found))
"""


# -- devices -----------------------------------------------------------------------------------


def devices(found: Mapping[str, Any], wants: Wants) -> Iterator[Finding]:
    """CUDA, bf16, FP8 and NCCL, from what torch said (doctor_child.py)."""
    if not found or "error" in found:
        note = str(found.get("error", "torch could not be asked"))
        remedy = "mend torch, or the driver, first"
        yield Finding("devices", "torch", Status.BROKEN, "", note, remedy, wants.gpu)
        return
    known = found["devices"]
    yield _cuda(found, wants)
    if not known:
        return
    status = Status.OK if found.get("bf16") else Status.MISSING
    remedy = "" if found.get("bf16") else "set trainer.precision=fp32"
    yield Finding("devices", "bf16", status, remedy=remedy, required=wants.bf16)
    yield _fp8([tuple(capability) for _, capability, _ in known], wants)
    required = wants.several
    yield Finding("devices", "NCCL", Status.OK, str(found.get("nccl")), required=required)


def _cuda(found: Mapping[str, Any], wants: Wants) -> Finding:
    known, build = found["devices"], found.get("cuda_build")
    needed = wants.gpu or wants.fp8 is not None
    if not known:
        why = "torch is built without CUDA" if build is None else f"torch's CUDA is {build}"
        note = f"{why}; everything runs on the CPU, slowly"
        remedy = (
            "install torch's CUDA build" if build is None else "nvidia-smi, CUDA_VISIBLE_DEVICES"
        )
        return Finding("devices", "CUDA", Status.MISSING, "no device", note, remedy, needed)
    what = f"{len(known)} x {known[0][0]}, {known[0][2] / _GIB:.0f} GiB, CUDA {build}"
    if len(known) < wants.devices:
        note = f"trainer.devices={wants.devices} wants as many"
        remedy = "lower trainer.devices, or show more with CUDA_VISIBLE_DEVICES"
        return Finding("devices", "CUDA", Status.BROKEN, what, note, remedy)
    return Finding("devices", "CUDA", Status.OK, what, required=needed)


def _fp8(capabilities: list[tuple[int, ...]], wants: Wants) -> Finding:
    needed = (9, 0) if wants.fp8 == "blockwise" else (8, 9)
    least = min(capabilities)
    found = "CUDA capability " + ".".join(map(str, least))
    if least >= needed:
        return Finding("devices", "FP8", Status.OK, found, required=wants.fp8 is not None)
    note = f"needs {needed[0]}.{needed[1]}; bf16 is used instead where FP8 is not asked for"
    remedy = "set model.fp8_recipe=null"
    return Finding("devices", "FP8", Status.MISSING, found, note, remedy, wants.fp8 is not None)


# -- vLLM's environment ------------------------------------------------------------------------


def vllm(wants: Wants) -> Finding:
    """vLLM as its own interpreter has it; it is imported there where a run needs it."""
    python = shutil.which(Path(wants.vllm_python).expanduser())
    cost = "rollout=vllm cannot start servers; the embedded engine samples"
    remedy = "make rollout-env, or set rollout.vllm.python to an interpreter that has vLLM"
    if python is None:
        what = wants.vllm_python
        return Finding("vLLM", "interpreter", Status.MISSING, what, cost, remedy, wants.vllm)
    found, error = _ask_vllm(python, wants.vllm)
    if found is None and error is None:
        note = f"{python} has no vLLM; {cost}"
        return Finding("vLLM", "vllm", Status.MISSING, "", note, remedy, wants.vllm)
    if error is not None or found is None:
        note = f"{python}: {error}"
        return Finding("vLLM", "vllm", Status.BROKEN, found or "", note, remedy, wants.vllm)
    try:
        return replace(judged("vllm", found, "", wants.vllm), group="vLLM")
    except ImportError as absent:
        return Finding("vLLM", "vllm", Status.BROKEN, found, str(absent), remedy, wants.vllm)


def _ask_vllm(python: str, load: bool) -> tuple[str | None, str | None]:
    """(version, why it cannot be used)."""
    command = [python, "-c", _ASK_VLLM, "import" if load else "look"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_VLLM_S)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        return found["vllm"], found["error"]
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    except (IndexError, ValueError, KeyError):
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        return None, lines[-1][:300]
