"""Rules about the source that no import or type checker sees."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nemo_selfpref
from nemo_selfpref.algorithms.base import algorithms

ROOT = Path(nemo_selfpref.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LAYERS = [
    {"errors", "types", "files", "redact"},
    {"monitor"},
    {"config"},
    {"data"},
    {"rollout"},
    {"pairing"},
    {"objectives"},
    {"algorithms"},
    {"megatron"},
    {"checkpoint"},
    {"models"},
    {"training"},
    {"evaluation"},
    {"demo"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

NAMELESS = ("megatron", "checkpoint", "monitor", "models", "training")
"""Parts that run any algorithm and may name none."""


def part_of(path: Path) -> str:
    """config/loader.py belongs to config, types.py to types, the package's own __init__ to ''."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_parts(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Part of nemo_selfpref and line of every import, local ones included."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "nemo_selfpref":
                yield rest.split(".")[0], node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_to_the_same_or_a_lower_layer(path: Path) -> None:
    own = part_of(path)
    imports = list(imported_parts(tree_of(path)))
    if not own:
        assert imports == []
        return
    upward = [
        f"line {line}: {own} imports {part}"
        for part, line in imports
        if part in LEVEL and LEVEL[part] > LEVEL[own]
    ]
    assert upward == []
    assert {part for part, _ in imports} <= {*LEVEL, "", "__version__"}


def test_every_part_has_a_layer() -> None:
    assert {part_of(path) for path in FILES} - {""} <= LEVEL.keys()


def test_an_upward_import_would_be_seen() -> None:
    tree = ast.parse("def f():\n    from nemo_selfpref.training import run\n    import os.path")
    assert list(imported_parts(tree)) == [("training", 2)]


def words_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Lower-case words of every identifier and string, `DPOObjective` and `dpo_loss` taken
    apart."""
    for node in ast.walk(tree):
        texts = [
            getattr(node, field, None) for field in ("id", "attr", "name", "arg", "module", "value")
        ]
        for text in texts:
            if isinstance(text, str):
                spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[\W_\d]", " ", text)
                yield from ((word.lower(), node.lineno) for word in spaced.split())


@pytest.mark.parametrize("part", NAMELESS)
def test_what_runs_every_algorithm_names_none(part: str) -> None:
    known = set(algorithms())
    named = [
        f"{path.relative_to(ROOT)}:{line}: {word}"
        for path in FILES
        if part_of(path) == part
        for word, line in words_of(tree_of(path))
        if word in known
    ]
    assert named == []


def test_a_name_would_be_seen() -> None:
    tree = ast.parse("x = DPOObjective\ndef ipo_loss(): pass\ny = 'for sft only'\nz = adopted")
    named = {(w, line) for w, line in words_of(tree) if w in {"dpo", "ipo", "sft"}}
    assert named == {("dpo", 1), ("ipo", 2), ("sft", 3)}


FORBIDDEN = {
    "pickle": r"\bpickle\b(?!d)",
    "torch.load": r"\btorch\.load\(",
    "eval": r"(?<![\w.])eval\(",
    "exec": r"(?<![\w.])exec\(",
    "shell": r"\bshell\s*=\s*True",
    "os.system": r"\bos\.(?:system|popen)\(",
    "weights_only": r"\bweights_only\s*=\s*False",
    "yaml": r"\byaml\.(?:unsafe_|full_)?load\(",
    "remote code": r"\btrust_remote_code\s*=\s*True",
}


def code_of(path: Path) -> str:
    """The source without comments and docstrings."""
    tree = tree_of(path)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not _is_text(s)] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_runs_what_it_reads(what: str) -> None:
    found = [
        str(path.relative_to(ROOT)) for path in FILES if re.search(FORBIDDEN[what], code_of(path))
    ]
    assert found == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_error_is_caught_unseen(path: Path) -> None:
    bare = [
        node.lineno
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert bare == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("import pickle", "pickle"),
        ("torch.load(path)", "torch.load"),
        ("eval('1')", "eval"),
        ("exec(code)", "exec"),
        ("run(c, shell=True)", "shell"),
        ("torch.load(p, weights_only=False)", "weights_only"),
        ("yaml.load(text)", "yaml"),
        ("from_pretrained(p, trust_remote_code=True)", "remote code"),
    ],
)
def test_the_patterns_find_what_they_look_for(line: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(f'"""{line}"""\nmodel.eval()\n')
    assert not re.search(FORBIDDEN[what], code_of(path))
    path.write_text(f"def f():\n    {line}\n")
    assert re.search(FORBIDDEN[what], code_of(path))
