"""The kernels on the device: what nvcc makes of them, and the cases of the tests on the host on a GPU."""

from __future__ import annotations

import ctypes
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from plugins.kernels.binding import load_library
from tests.support.int4_gemm_cases import GEMM_CASES, GemmCase, run_gemm
from tests.support.kernel_build import build_for_device
from tests.support.kernel_calls import check_rounding, run_case
from tests.support.kernel_cases import CASES, Case, named
from tests.support.kernel_device import REPLAYED, DeviceMemory, check_replays
from tests.support.kernel_reference import check

ARCHITECTURES = (80, 90)  # without instructions for fp8 and programmatic launches, and with them


@pytest.mark.slow
def test_compiles_for_both_kinds_of_architecture(tmp_path: Path) -> None:
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
    library = tmp_path / "liblora_drop_kernels.so"
    report = build_for_device(library, "-Xptxas", "-v", *codes)
    assert not re.search(r"warning", report, re.IGNORECASE), report

    kernels = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
        r"Used (\d+) registers",
        report,
        re.DOTALL,
    )
    # Of attend 18 on FMAs and 18 on tensor cores, 9 of append, 3 of combine; 4 of int4 products
    assert len(kernels) == 52 * len(ARCHITECTURES)
    for name, architecture, stack, spilled, registers in kernels:
        print(f"sm_{architecture:3} {registers:>3} registers {stack:>3} bytes of stack {spilled:>3} spilled  {name}")
    # fp8 caches on cards without an instruction for fp8 spill some registers; nothing else does
    spilled = [k for k in kernels if (int(k[2]) or int(k[3])) and not ("fp8" in k[0] and int(k[1]) < 89)]
    assert spilled == [], "in local memory"
    symbols = ctypes.CDLL(str(library))
    for name in ("lora_drop_attention", "lora_drop_workspace_bytes", "lora_drop_int4_gemm"):
        assert hasattr(symbols, name)


@pytest.fixture(scope="session")
def cuda() -> Any:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="no cuda-python")
    error, count = runtime.cudaGetDeviceCount()
    if int(error) != 0 or count == 0:
        pytest.skip(f"no NVIDIA GPU or driver: {error!s}")
    return runtime


@pytest.fixture(scope="session")
def device_library(cuda: Any, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("kernel") / "liblora_drop_kernels.so"
    build_for_device(library, "-arch=native")
    return load_library(library)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference(cuda: Any, device_library: ctypes.CDLL, case: Case) -> None:
    check(case, *run_case(device_library, case, partial(DeviceMemory, cuda)))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GEMM_CASES, ids=str)
def test_int4_gemm(cuda: Any, device_library: ctypes.CDLL, case: GemmCase) -> None:
    run_gemm(device_library, case, partial(DeviceMemory, cuda))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f8", "i8"])
def test_rounding(cuda: Any, device_library: ctypes.CDLL, dtype: str) -> None:
    check_rounding(device_library, dtype, partial(DeviceMemory, cuda))


@pytest.mark.gpu
@pytest.mark.parametrize("name", REPLAYED)
def test_captured_graph_follows_the_lengths(cuda: Any, device_library: ctypes.CDLL, name: str) -> None:
    check_replays(cuda, device_library, named(name))
