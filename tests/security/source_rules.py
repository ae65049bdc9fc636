"""What no source of this project may hold, found in its syntax tree: aliases of a module, such as
`np` for numpy, are followed."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

UNPICKLERS = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"),
    *("jsonpickle", "pickletools"),
}
RUNNERS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"),
    *("os.system", "os.popen", "os.startfile", "pty.spawn", "subprocess.getoutput"),
    *("subprocess.getstatusoutput", "runpy.run_path", "code.interact", "asyncio.subprocess_shell"),
    *("asyncio.create_subprocess_shell", "imp.load_source"),
}
INSTANTIATORS = {
    *("hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_class"),
    *("hydra.utils.get_method", "hydra.utils.get_object", "hydra.main", "pydoc.locate"),
}
METHODS_THAT_READ_PICKLES = {
    *("load_from_checkpoint", "restore_from", "from_config_dict", "read_pickle", "unpack_archive"),
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
}
YAML_LOADERS = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}

Check = Callable[[ast.Call, str], bool]


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything in a Python source that breaks a rule."""
    tree = ast.parse(source)
    aliases = dict(_aliases(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from _imports(node)
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"
        elif isinstance(node, ast.Attribute | ast.Name) and _full(node, aliases) in INSTANTIATORS:
            yield node.lineno, "instantiates by name"
        elif isinstance(node, ast.Call):
            name = _full(node.func, aliases)
            yield from ((node.lineno, rule) for rule, check in RULES.items() if check(node, name))


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[int, str]]:
    modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    names = [alias.name for alias in node.names]
    for module in modules or names:
        if module.split(".")[0] in UNPICKLERS:
            yield node.lineno, "unpickles"
    for full in (f"{module}.{name}" for module in modules for name in names):
        if full in INSTANTIATORS:
            yield node.lineno, "instantiates by name"


def _aliases(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    yield alias.asname, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _full(node: ast.AST, aliases: dict[str, str]) -> str:
    """The dotted name of an expression, "" in front of what is none: `f().load` is `.load`."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_full(node.value, aliases)}.{node.attr}"
    return ""


def _said(call: ast.Call, keyword: str) -> object:
    """A keyword's constant; ... where it is not given or is no constant."""
    for found in call.keywords:
        if found.arg == keyword and isinstance(found.value, ast.Constant):
            return found.value.value
    return ...


def _has(call: ast.Call, keyword: str) -> bool:
    return any(found.arg == keyword for found in call.keywords)


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


RULES: dict[str, Check] = {
    "torch.load without weights_only=True": lambda c, n: (
        n == "torch.load" and _said(c, "weights_only") is not True
    ),
    "weights_only=False": lambda c, n: _said(c, "weights_only") is False,
    "unpickles": lambda c, n: _last(n) in METHODS_THAT_READ_PICKLES,
    "allow_pickle": lambda c, n: _has(c, "allow_pickle") and _said(c, "allow_pickle") is not False,
    "yaml without safe_": lambda c, n: n in {f"yaml.{loader}" for loader in YAML_LOADERS},
    "runs text": lambda c, n: n in RUNNERS or n.startswith(("os.exec", "os.spawn")),
    "shell": lambda c, n: _has(c, "shell") and _said(c, "shell") is not False,
    "mktemp": lambda c, n: n == "tempfile.mktemp",
    "extracts without filter": lambda c, n: (
        _last(n) in ("extractall", "extract") and _said(c, "filter") != "data"
    ),
    "remote code": lambda c, n: (
        _has(c, "trust_remote_code") and _said(c, "trust_remote_code") is not False
    ),
    "unverified TLS": lambda c, n: _said(c, "verify") is False and "http" in n,
}
