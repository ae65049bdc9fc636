"""What a plan knows of devices: data sheets, and what is assumed beside them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nemo_selfpref.config.schema import Precision

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device, or one process' share of a machine without any."""

    name: str
    memory: int
    """Bytes there are."""
    peak_flops: float
    """Dense bf16 floating-point operations a second of the data sheet."""
    peak_flops_fp32: float
    memory_bandwidth: float
    """Bytes a second between the device and its own memory."""
    node_bandwidth: float
    """Bytes a second and direction that a device sends to others of its node."""
    network_bandwidth: float
    """Bytes a second that a device sends to other nodes."""
    reserved: int
    """Bytes taken by the CUDA context, NCCL's buffers and fragments: assumed, not measured."""

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"

    def peak(self, precision: Precision) -> float:
        return self.peak_flops if precision is Precision.bf16 else self.peak_flops_fp32


DEVICES = ("h100", "h200", "a100", "cpu")
_GPUS = {
    "h100": (79.1, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": (139.8, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    "a100": (79.2, 312e12, 19.5e12, 2.0e12, 300e9, 25e9),
}
"""GiB that torch finds on the SXM modules, operations and bytes a second. The network is one
400 Gbit/s adapter a GPU (200 Gbit/s beside an A100)."""
_RESERVED = 2 * GIB
_CPU_FLOPS = 5e10
"""Of one core or so; --peak-tflops gives another."""


def device_of(name: str, processes: int, peak_tflops: float | None = None) -> Device:
    """The device of that name; `processes` share the memory of a machine without GPUs.

    Args:
        peak_tflops: takes the place of the data sheet's operations a second, in 1e12.
    """
    measured = None if peak_tflops is None else peak_tflops * 1e12
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes
        flops = measured or _CPU_FLOPS
        return Device(name, memory, flops, flops, 2e10, 5e9, 1e9, 0)
    gibibytes, flops, flops32, own, node, network = _GPUS[name]
    memory = int(gibibytes * GIB)
    return Device(
        name, memory, measured or flops, measured or flops32, own, node, network, _RESERVED
    )
