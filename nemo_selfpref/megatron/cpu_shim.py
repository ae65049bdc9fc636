"""What megatron-core hard-codes to CUDA, landed on the CPU. A no-op where CUDA is present.

megatron-core writes device="cuda" and calls torch.cuda by name in its schedules, gradient clipping
and random-state tracking. `PATCHES` lists every replacement with the place that needs it; a test
fails when megatron-core no longer does.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import Any

import megatron.core.tensor_parallel.random as megatron_random
import megatron.core.transformer.moe.moe_utils as moe_utils
import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class CudaToCpu(TorchFunctionMode):
    """Sends device="cuda", .cuda() and .to("cuda") to the CPU while the mode is active."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Gradient clipping and the mixed-precision optimizer compare type names.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **(kwargs or {}))


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _get_rng_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
    torch.default_generator.set_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _current_device() -> torch.device:
    return CPU


class _Stream:
    """The one order in which a CPU does things."""

    def wait_stream(self, stream: Any) -> None:
        """Everything before is done already."""

    def record_event(self) -> Any:
        return self

    def synchronize(self) -> None:
        """Likewise."""


def _current_stream(*_args: Any) -> _Stream:
    return _Stream()


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


_EXPERTS = "transformer/moe/token_dispatcher.py"

PATCHES: dict[str, tuple[Any, str]] = {
    "torch.cuda.current_device": (
        _current_device,
        "tensor_parallel/layers.py, p2p_communication.py",
    ),
    "torch.cuda.synchronize": (_nothing, "p2p_communication.py"),
    "torch.cuda.get_rng_state": (_get_rng_state, "tensor_parallel/random.py"),
    "torch.cuda.manual_seed": (_manual_seed, "tensor_parallel/random.py"),
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": (
        _get_rng_state,
        "tensor_parallel/random.py: CudaRNGStatesTracker",
    ),
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": (
        _set_rng_state,
        "tensor_parallel/random.py: CudaRNGStatesTracker",
    ),
    "torch.cuda.Stream": (_Stream, _EXPERTS),
    "torch.cuda.current_stream": (_current_stream, _EXPERTS),
    "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu": (
        _on_cpu,
        _EXPERTS + ": split sizes as numpy arrays, which it makes of CUDA tensors only",
    ),
}

_installed = False


def install() -> None:
    """Apply PATCHES once; does nothing where CUDA is available."""
    global _installed
    if not hasattr(moe_utils, "te_general_gemm"):
        # Its router reads the name, which it only imports where Transformer Engine is installed.
        moe_utils.te_general_gemm = None
    if _installed or torch.cuda.is_available():
        return
    for path, (replacement, _) in PATCHES.items():
        owner, name = _resolve(path)
        setattr(owner, name, replacement)
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    _installed = True


def _resolve(path: str) -> tuple[Any, str]:
    parts = path.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for part in parts[split:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise ImportError(path)


@contextlib.contextmanager
def device_scope() -> Iterator[None]:
    """Runs megatron-core code; on a CPU its CUDA tensors land on the CPU inside this block."""
    if torch.cuda.is_available():
        yield
        return
    with CudaToCpu():
        yield
