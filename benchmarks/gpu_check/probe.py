"""What this machine lacks of all that some check needs: JSON {name: reason} on the last line.

A process of its own, since importing a broken package may leave the importing one unusable.
"""

from __future__ import annotations

import importlib
import importlib.util
import json

_MODULES = {
    "torch": "torch",
    "triton": "triton",
    "megatron": "megatron.core",
    "omegaconf": "omegaconf",
    "transformers": "transformers",
    "pytest": "pytest",
    "rich": "rich",
    "liger": "liger_kernel",
}


def _absent(module: str) -> str | None:
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError) as error:
        return str(error)
    return None if found else f"no module named {module}"


def _no_cuda() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def _no_te() -> str | None:
    # Its libraries are found through torch's, so torch is imported first. It raises whatever its
    # loader met: a missing library, a version that does not agree, an assertion.
    import torch  # noqa: F401

    importlib.import_module("transformer_engine.pytorch")
    return None


def lacks() -> dict[str, str]:
    found = {name: _absent(module) for name, module in _MODULES.items()}
    for name, test in {"cuda": _no_cuda, "te": _no_te}.items():
        try:
            found[name] = test()
        except Exception as error:
            lines = str(error).splitlines() or [""]
            found[name] = f"{type(error).__name__}: {lines[0]}"[:200]
    return {name: why for name, why in found.items() if why is not None}


if __name__ == "__main__":
    result = lacks()
    print(json.dumps(result))
