"""Which packages are there, in which versions, and whether they can be imported.

Only the standard library is imported here: `selfpref doctor` has to work where nothing else does.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import nemo_selfpref

_IMPORT_S = 180.0
"""How long all imports together may take; cold network disks are slow."""
_OWN = "nemo-selfpref"
ROOT = Path(nemo_selfpref.__file__).resolve().parents[1]


class Status(StrEnum):
    OK = "ok"
    MISSING = "missing"
    BROKEN = "broken"
    UNSAFE = "unsafe"


@dataclass(frozen=True)
class Finding:
    """One line of the report. note: what it costs, or why; remedy: what puts it right; required:
    whether a run fails, or must not be trusted, with anything but ok."""

    group: str
    what: str
    status: Status
    found: str = ""
    note: str = ""
    remedy: str = ""
    required: bool = True

    @property
    def bad(self) -> bool:
        return self.required and self.status is not Status.OK


@dataclass(frozen=True)
class Unsafe:
    """Versions below `fixed_in` have a known fault. contained: why it cannot be reached here."""

    fixed_in: str
    why: str
    contained: str = ""


UNSAFE: Mapping[str, Unsafe] = {
    "torch": Unsafe("2.6.0", "torch.load runs code even with weights_only=True (CVE-2025-32434)"),
    "transformers": Unsafe("4.48.0", "loading model files runs code (CVE-2024-11392, -11393)"),
    "jinja2": Unsafe("3.1.6", "a chat template can leave the sandbox (CVE-2025-27516)"),
    "pyarrow": Unsafe("14.0.1", "reading a Parquet file runs code (CVE-2023-47248)"),
    "sentencepiece": Unsafe("0.2.1", "a prepared .model file corrupts memory (CVE-2026-1260)"),
    "nemo-toolkit": Unsafe("2.3.2", "loading a .nemo file runs code (CVE-2025-23304)"),
    "megatron-core": Unsafe(
        "0.17.1",
        "its checkpoint reader unpickles",
        "never called here: checkpoints are safetensors and JSON",
    ),
    "h11": Unsafe("0.16.0", "requests can be smuggled past a proxy (CVE-2025-43859)"),
    "starlette": Unsafe("0.49.1", "one Range header takes a server's time (CVE-2025-62727)"),
    "vllm": Unsafe("0.14.1", "code of a request or a model folder is run (CVE-2026-22778, -22807)"),
}

_MODULES = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "nemo-toolkit": "nemo.core",
    "lightning": "lightning.pytorch",
    "hydra-core": "hydra",
}
"""Modules that are not called as their package is; torch comes first, others find its libraries."""
_ALSO_CHECKED = ("lightning", "h11", "starlette")
"""Needed by what we need."""
OPTIONAL = {
    "transformer-engine": (
        "transformer_engine.pytorch",
        "no FP8, and torch's layers instead of its fused ones",
        "on a machine with an NVIDIA GPU: pip install 'nemo-selfpref[gpu]'",
    ),
    "apex": (
        "fused_weight_gradient_mlp_cuda",
        "weight gradients are added to the float32 buffer in a step of their own",
        "build NVIDIA apex with its C++ and CUDA extensions",
    ),
    "triton": (
        "triton",
        "the log-prob head computes with torch: more memory and time on a GPU",
        "install torch's CUDA build, which brings it",
    ),
    "tensorboard": ("tensorboard", "no TensorBoard logs", "pip install tensorboard"),
}
"""Module to import, what its absence costs, how to get it."""


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pins() -> dict[str, str]:
    """Packages that are needed on this machine, and the versions that setup.py allows."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(_OWN) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    needed = [Requirement(line) for line in lines]
    here = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return {r.name.lower().replace("_", "-"): str(r.specifier) for r in here}


def import_all(modules: Sequence[str]) -> tuple[dict[str, str | None], dict[str, Any]]:
    """Why each module cannot be imported (None where it can), and torch's devices.

    One process imports them all; where it dies, another goes on after the one it died of.
    """
    errors: dict[str, str | None] = {}
    devices: dict[str, Any] = {}
    left = list(modules)
    while left:
        begun: str | None = None
        lines, ended = _child(left)
        for line in lines:
            devices = line.get("devices", devices)
            begun = line.get("begins", begun)
            if "ended" in line:
                errors[line["ended"]], begun = line["error"], None
        if begun is not None:
            errors[begun] = f"the import {ended}"
        rest = [module for module in left if module not in errors]
        if len(rest) == len(left):  # it did not even begin
            return {**errors, **dict.fromkeys(rest, f"python itself {ended}")}, devices
        left = rest
    return errors, devices


def _child(modules: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    command = [sys.executable, "-m", "nemo_selfpref.training.doctor_child", *modules]
    environment = {**os.environ, "PYTHONPATH": _search_path()}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_IMPORT_S
        )
        out, ended = done.stdout, f"ended python with status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        out = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        ended = f"did not end within {_IMPORT_S:.0f} s"
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], ended


def _search_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def packages(
    wanted: frozenset[str] = frozenset(),
) -> tuple[list[Finding], dict[str, Any]]:
    """A line for each package, and torch's devices.

    Args:
        wanted: packages of OPTIONAL that the configuration cannot do without.
    """
    try:
        pinned = pins()
    except ImportError as error:
        lost = Finding("packages", "packaging", Status.MISSING, "", str(error), _reinstall(""))
        return [lost], {}
    names = [*pinned, *(name for name in _ALSO_CHECKED if name not in pinned)]
    names.sort(key=lambda name: name != "torch")
    modules = {name: _MODULES.get(name, name) for name in names}
    optional = {name: facts[0] for name, facts in OPTIONAL.items()}
    errors, devices = import_all([*modules.values(), *optional.values()])
    lines = [] if pinned else [_not_installed()]
    lines += [_line(n, pinned.get(n, ""), errors[modules[n]]) for n in names]
    lines += [_optional(name, errors[optional[name]], name in wanted) for name in OPTIONAL]
    return [*lines, *tested_versions(ROOT / "requirements" / "cpu.txt", names)], devices


def _not_installed() -> Finding:
    note = "the versions that setup.py allows are not known"
    return Finding("packages", _OWN, Status.MISSING, "", note, "pip install -e . in its folder")


def _line(name: str, allowed: str, error: str | None) -> Finding:
    found = version_of(name)
    remedy = _reinstall(f"{name}{allowed}")
    if found is None or error == "missing":
        return Finding("packages", name, Status.MISSING, found or "", "nothing runs", remedy)
    if error is not None:
        return Finding("packages", name, Status.BROKEN, found, error, remedy)
    return judged(name, found, allowed)


def judged(name: str, found: str, allowed: str, required: bool = True) -> Finding:
    """The verdict on a version of a package that can be imported."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    known = UNSAFE.get(name)
    note = ""
    if known is not None and Version(found) < Version(known.fixed_in):
        if not known.contained:
            remedy = _reinstall(f"{name}>={known.fixed_in}")
            return Finding("packages", name, Status.UNSAFE, found, known.why, remedy, required)
        note = f"{known.why}: {known.contained}"
    if allowed and not SpecifierSet(allowed).contains(found, prereleases=True):
        wrong, remedy = f"setup.py allows {allowed}", _reinstall(f"{name}{allowed}")
        return Finding("packages", name, Status.BROKEN, found, wrong, remedy, required)
    return Finding("packages", name, Status.OK, found, note, "", required)


def _optional(name: str, error: str | None, required: bool) -> Finding:
    _, cost, remedy = OPTIONAL[name]
    found = version_of(name) or ""
    if error == "missing":
        return Finding("packages", name, Status.MISSING, found, cost, remedy, required)
    if error is not None:
        note = f"{error}; {cost}"
        return Finding("packages", name, Status.BROKEN, found, note, remedy, required)
    return Finding("packages", name, Status.OK, found, required=required)


def _reinstall(what: str) -> str:
    return f"pip install '{what}'" if what else "pip install packaging"


def tested_versions(path: Path, names: Sequence[str]) -> Iterator[Finding]:
    """Where these packages differ from the versions that were tested together: worth knowing, no
    fault. Only a checkout has the list."""
    if not path.is_file():
        return
    tested = dict(
        line.strip().lower().split("==", 1)
        for line in path.read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    pairs = [(n, tested[n], version_of(n)) for n in names if n in tested]
    differ = [f"{name} {have} (tested {want})" for name, want, have in pairs if have != want]
    yield Finding(
        "packages",
        f"requirements/{path.name}",
        Status.OK,
        f"{len(pairs) - len(differ)} of {len(pairs)} as tested",
        ", ".join(differ),
        required=False,
    )
