from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from shim_needs import NEEDED_FOR

from nemo_selfpref.megatron.cpu_shim import PATCHES, CudaToCpu, _resolve, device_scope

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is off with CUDA")

WANTS_CUDA = "CUDA|NVIDIA"
"""torch built without CUDA and torch built with it say different things about a missing GPU."""


@pytest.mark.parametrize("path", PATCHES)
def test_every_patch_has_a_place_to_go(path: str) -> None:
    owner, name = _resolve(path)
    assert callable(getattr(owner, name))


def test_a_path_that_leads_nowhere() -> None:
    with pytest.raises(ImportError, match=r"no_such_package\.f"):
        _resolve("no_such_package.f")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    script = Path(__file__).with_name("shim_needs.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_with_every_patch_all_of_it_runs(outcomes: dict[str, Any]) -> None:
    norm, error = outcomes["step"]
    assert error is None and norm > 0.1  # so that clipping to 0.1 had work to do
    assert outcomes["stages"] == [pytest.approx(norm, rel=1e-5), None]
    assert outcomes["experts"][1] is None
    # A named stream continues, whatever is drawn outside it: two draws of seed 7.
    generator = torch.Generator().manual_seed(7)
    stream = [torch.rand((), generator=generator).item() for _ in range(2)]
    assert outcomes["streams"] == [stream, None]


@pytest.mark.parametrize("path", NEEDED_FOR)
def test_without_a_patch_what_needs_it_breaks(outcomes: dict[str, Any], path: str) -> None:
    assert path in PATCHES
    result, error = outcomes[path]
    if error is None:
        # Seeds that land nowhere raise nothing; the stream is just not the one asked for.
        assert path.endswith(("manual_seed", "_set_cuda_rng_state"))
        assert result != outcomes["streams"][0]
    else:
        assert re.search(rf"{WANTS_CUDA}|split_sizes", error), error


def test_without_the_scope_a_step_breaks(outcomes: dict[str, Any]) -> None:
    assert re.search(WANTS_CUDA, outcomes["scope"][1])


def test_nothing_is_patched_where_cuda_is_present() -> None:
    script = """
import torch
torch.cuda.is_available = lambda: True
from nemo_selfpref.megatron import cpu_shim
before = {path: getattr(*cpu_shim._resolve(path)) for path in cpu_shim.PATCHES}
cpu_shim.install()
assert all(getattr(*cpu_shim._resolve(path)) is before[path] for path in before)
with cpu_shim.device_scope():
    try:
        torch.zeros(1, device="cuda")
    except (AssertionError, RuntimeError) as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(WANTS_CUDA, done.stdout)  # torch was asked for the GPU itself


def test_tensors_meant_for_cuda_land_on_the_cpu() -> None:
    with device_scope():
        made = torch.ones(2, device="cuda", pin_memory=True)
        moved = [made.to("cuda"), made.to(torch.device("cuda", 0)), made.cuda()]
        copied = made.to("cuda", torch.float64)
        typed = made.to(device="cuda", dtype=torch.bfloat16)
    assert all(t.device.type == "cpu" and t.tolist() == [1, 1] for t in [made, *moved])
    assert copied.dtype == torch.float64 and typed.dtype == torch.bfloat16


def test_inside_the_scope_a_tensor_calls_itself_a_cuda_tensor() -> None:
    with CudaToCpu():
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_the_scope_ends() -> None:
    with device_scope():
        pass
    with pytest.raises((AssertionError, RuntimeError), match=WANTS_CUDA):
        torch.zeros(1, device="cuda")


def test_every_patch_has_a_need() -> None:
    assert set(NEEDED_FOR) == set(PATCHES)
