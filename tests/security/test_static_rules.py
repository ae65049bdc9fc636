"""Rules of security about the source itself. tests/test_layering.py has those of structure."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from source_rules import faults

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("nemo_selfpref", "benchmarks", "examples", "tests")
PYTHON = [
    *sorted(path for place in PLACES for path in (ROOT / place).rglob("*.py")),
    ROOT / "setup.py",
]
SHELL = sorted((ROOT / "slurm").glob("*.sh"))
DANGEROUS_ON_PURPOSE = {
    "tests/security/payloads.py": {"unpickles"},
    "tests/security/test_gadgets.py": {"instantiates by name"},
    "tests/security/test_yaml.py": {"yaml without safe_"},
    "tests/security/test_untrusted_files.py": {
        *("unpickles", "torch.load without weights_only=True", "weights_only=False"),
    },
    "tests/security/test_model_folders.py": {"remote code"},
    "tests/rollout/serving/test_auth.py": {"unpickles"},
}
"""Tests that show what the product is kept from."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_no_source_breaks_a_rule(path: Path) -> None:
    allowed = DANGEROUS_ON_PURPOSE.get(name_of(path), set())
    found = list(faults(path.read_text(encoding="utf-8")))
    assert [(line, rule) for line, rule in found if rule not in allowed] == []
    assert {rule for _, rule in found} >= allowed, "an exception that is no longer needed"


def test_the_exceptions_are_tests() -> None:
    assert {*DANGEROUS_ON_PURPOSE} <= {name_of(path) for path in PYTHON}
    assert all(name.startswith("tests/") for name in DANGEROUS_ON_PURPOSE)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("import pickle", "unpickles"),
        ("import cloudpickle as c", "unpickles"),
        ("from pickle import loads", "unpickles"),
        ("from joblib import load", "unpickles"),
        ("import torch\ntorch.load(p)", "torch.load without weights_only=True"),
        ("import torch as t\nt.load(p)", "torch.load without weights_only=True"),
        ("from torch import load as l\nl(p)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(p, weights_only=w)", "torch.load without weights_only=True"),
        ("read(p, weights_only=False)", "weights_only=False"),
        ("Model.restore_from(p)", "unpickles"),
        ("dist.all_gather_object(a, b)", "unpickles"),
        ("np.load(p, allow_pickle=True)", "allow_pickle"),
        ("import yaml\nyaml.load(t, yaml.SafeLoader)", "yaml without safe_"),
        ("import yaml as y\ny.unsafe_load(t)", "yaml without safe_"),
        ("from yaml import full_load\nfull_load(t)", "yaml without safe_"),
        ("eval(x)", "runs text"),
        ("exec(x)", "runs text"),
        ("compile(x, y, z)", "runs text"),
        ("import os\nos.system(x)", "runs text"),
        ("from os import popen as p\np(x)", "runs text"),
        ("import os\nos.execvp(a, b)", "runs text"),
        ("subprocess.run(c, shell=True)", "shell"),
        ("subprocess.run(c, shell=given)", "shell"),
        ("import tempfile\ntempfile.mktemp()", "mktemp"),
        ("archive.extractall(p)", "extracts without filter"),
        ("archive.extractall(p, filter='fully_trusted')", "extracts without filter"),
        ("shutil.unpack_archive(p)", "unpickles"),
        ("AutoModel.from_pretrained(p, trust_remote_code=True)", "remote code"),
        ("AutoModel.from_pretrained(p, trust_remote_code=t)", "remote code"),
        ("import httpx\nhttpx.Client(verify=False)", "unverified TLS"),
        ("from hydra.utils import instantiate\ninstantiate(c)", "instantiates by name"),
        ("import hydra.utils\nhydra.utils.get_method(c)", "instantiates by name"),
        ("import hydra\nmake = hydra.utils.call", "instantiates by name"),
        ("try:\n    f()\nexcept:\n    pass", "bare except"),
    ],
)
def test_a_fault_is_found(line: str, rule: str) -> None:
    assert rule in {found for _, found in faults(line)}


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch.load(p, weights_only=True)",
        "import yaml\nyaml.safe_load(t)",
        "model.eval()",
        "import re\nre.compile(x)",
        "archive.extractall(p, filter='data')",
        "AutoModel.from_pretrained(p, trust_remote_code=False)",
        "subprocess.run(c, shell=False)",
        "json.load(f)",
    ],
)
def test_its_harmless_neighbour_is_not(line: str) -> None:
    assert list(faults(line)) == []


def test_models_are_loaded_from_this_machine_and_without_their_code() -> None:
    calls = [
        (name_of(path), node)
        for path in PYTHON
        if name_of(path).startswith("nemo_selfpref/")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    assert len(calls) >= 2
    for name, call in calls:
        given = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert given.get("local_files_only") == "True", name
        assert given.get("trust_remote_code") == "False", name


@pytest.mark.parametrize("path", SHELL, ids=name_of)
def test_shell_scripts_are_strict_and_quote_what_they_are_given(path: Path) -> None:
    text = re.sub(r"(?m)^\s*#.*$", "", path.read_text(encoding="utf-8"))
    assert "set -euo pipefail" in text
    assert not re.search(r"(?<![\w-])eval\b|`|\bbash -c\b|\bsh -c\b|curl|wget", text)
    # Arguments only as "$@"; variables only inside quotes, or in an assignment.
    assert not re.search(r"\$\*|(?<!\")\$@|\$@(?!\")", text)
    outside = re.sub(r'"[^"]*"', "", text)
    unquoted = [
        line for line in outside.splitlines() if "$" in line and not re.match(r"\s*\w+=", line)
    ]
    assert unquoted == []


def test_no_source_reads_an_archive() -> None:
    """Nothing is ever unpacked, so there is no path to escape from."""
    named = {
        name_of(path): word
        for path in PYTHON
        if not name_of(path).startswith("tests/")
        for word in ("tarfile", "zipfile", "unpack_archive", "extractall")
        if re.search(rf"\b{word}\b", path.read_text(encoding="utf-8"))
    }
    assert named == {}
