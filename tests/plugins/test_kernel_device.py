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
from tests.support.kernel_build import build_for_device, copied_sources
from tests.support.kernel_calls import check_rounding, run_case
from tests.support.kernel_cases import CASES, Case, named
from tests.support.kernel_device import REPLAYED, DeviceMemory, check_replays
from tests.support.kernel_reference import check


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kept", "int4", "kernels"),
    # Those of float16 and bfloat16 are the same code with other names of instructions: one of them for each kind of
    # cache, and what needs nothing of a new card for an old one. Of attend 4 on FMAs and 6 on tensor cores, 2 of
    # append, 2 of combine: that of float32 is asked whether it waits. Then 4, 3, 2 and 2, and 4 of int4 products
    [
        (90, ("BF16/F8_E4M3", "BF16"), False, 14),
        (80, ("F16/I8", "F32"), True, 15),
    ],
    ids=["with instructions for fp8 and programmatic launches", "without them"],
)
def test_compiles(architecture: int, kept: tuple[str, ...], int4: bool, kernels: int, tmp_path: Path) -> None:
    library, source = tmp_path / "liblora_drop_kernels.so", copied_sources(tmp_path, *kept)
    if not int4:
        (source / "int4_gemm.cu").unlink()
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    report = build_for_device(library, "-Xptxas", "-v", code, source=source)
    assert not re.search(r"warning", report, re.IGNORECASE), report

    found = re.findall(
        r"Compiling entry function '(\w+)' for .*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
        r"Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert len(found) == kernels
    for name, stack, spilled, registers in found:
        print(f"{registers:>3} registers {stack:>3} bytes of stack {spilled:>3} spilled  {name}")
    assert [one for one in found if int(one[1]) or int(one[2])] == [], "in local memory"
    symbols = ctypes.CDLL(str(library))
    for name in ("lora_drop_attention", "lora_drop_workspace_bytes"):
        assert hasattr(symbols, name)
    assert hasattr(symbols, "lora_drop_int4_gemm") == int4


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
