"""The kernels on the device: what nvcc makes of them, and the cases of the tests on the host on a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plugins.kernels.binding import UPDATED, load_library
from tests.support.int4_gemm_cases import GEMM_CASES, GemmCase, run_gemm
from tests.support.kernel_build import KERNELS
from tests.support.kernel_calls import GUARD, GUARD_BYTES, check_rounding, make_arrays, make_call, run_case
from tests.support.kernel_cases import CASES, Case, named
from tests.support.kernel_reference import check

ARCHITECTURES = (80, 86, 89, 90, 120)


def build(library: Path, *options: str) -> str:
    """Compiles the kernels; returns what the compiler said."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: $NVCC, PATH or /usr/local/cuda/bin")
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "-shared",
        "-Xcompiler",
        "-fPIC,-Wall,-Wextra",
        *options,
        "-o",
        library,
        *sorted(KERNELS.glob("*.cu")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_compiles_for_every_architecture(tmp_path: Path) -> None:
    codes = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
    library = tmp_path / "liblora_drop_kernels.so"
    report = build(library, "-Xptxas", "-v", *codes)
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


def runtime_calls() -> Any:
    return pytest.importorskip("cuda.bindings.runtime", reason="no cuda-python")


def done(result: tuple[Any, ...]) -> Any:
    """What a call of the CUDA runtime returned; its error raised."""
    error, *values = result
    assert int(error) == 0, str(error)
    return values[0] if len(values) == 1 else values


class DeviceMemory:
    """An array between guards on the GPU."""

    def __init__(self, array: np.ndarray) -> None:
        self.cuda = runtime_calls()
        self.like = array
        image = np.full(array.nbytes + 2 * GUARD_BYTES, GUARD, np.uint8)
        image[GUARD_BYTES : GUARD_BYTES + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.pointer = done(self.cuda.cudaMalloc(image.nbytes))
        self.nbytes = image.nbytes
        self.address = int(self.pointer) + GUARD_BYTES
        self.copy(self.pointer, image.ctypes.data, image.nbytes)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        done(self.cuda.cudaMemcpy(to, source, nbytes, self.cuda.cudaMemcpyKind.cudaMemcpyDefault))

    def write(self, array: np.ndarray) -> None:
        self.copy(self.address, array.ctypes.data, array.nbytes)

    def read(self) -> tuple[np.ndarray, bool]:
        done(self.cuda.cudaDeviceSynchronize())
        image = np.empty(self.nbytes, np.uint8)
        self.copy(image.ctypes.data, self.pointer, self.nbytes)
        end = self.nbytes - GUARD_BYTES
        intact = (image[:GUARD_BYTES] == GUARD).all() and (image[end:] == GUARD).all()
        return image[GUARD_BYTES:end].view(self.like.dtype).reshape(self.like.shape).copy(), bool(intact)

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            self.cuda.cudaFree(self.pointer)


@pytest.fixture(scope="session")
def device_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    cuda = runtime_calls()
    error, count = cuda.cudaGetDeviceCount()
    if int(error) != 0 or count == 0:
        pytest.skip(f"no NVIDIA GPU or driver: {error!s}")
    library = tmp_path_factory.mktemp("kernel") / "liblora_drop_kernels.so"
    build(library, "-arch=native")
    return load_library(library)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference(device_library: ctypes.CDLL, case: Case) -> None:
    check(case, *run_case(device_library, case, DeviceMemory))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GEMM_CASES, ids=str)
def test_int4_gemm(device_library: ctypes.CDLL, case: GemmCase) -> None:
    run_gemm(device_library, case, DeviceMemory)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["f8", "i8"])
def test_rounding(device_library: ctypes.CDLL, dtype: str) -> None:
    check_rounding(device_library, dtype, DeviceMemory)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["splits", "counts_in_prefill", "everything"])
def test_captured_graph_follows_the_lengths(device_library: ctypes.CDLL, name: str) -> None:
    """Captured at one length, replayed at others: the launch shapes know the sizes alone."""
    cuda = runtime_calls()
    case = named(name)
    arrays = make_arrays(case)
    workspace_bytes = device_library.lora_drop_workspace_bytes(make_call(case, lambda _: None), case.multiprocessors)
    arrays["workspace"] = np.zeros(workspace_bytes, np.uint8)
    held = {key: DeviceMemory(array) for key, array in arrays.items() if array is not None}
    call = make_call(case, lambda key: held[key].address if key in held else None)

    held["length"].write(np.zeros_like(arrays["length"]))
    stream = done(cuda.cudaStreamCreate())
    done(cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal))
    assert device_library.lora_drop_attention(call, workspace_bytes, case.multiprocessors, int(stream)) == 0
    graph = done(cuda.cudaStreamEndCapture(stream))
    executable = done(cuda.cudaGraphInstantiate(graph, 0))

    held["length"].write(arrays["length"])
    done(cuda.cudaGraphLaunch(executable, stream))
    after = {key: held[key].read()[0] for key in UPDATED}
    check(case, arrays, after)
    done(cuda.cudaGraphExecDestroy(executable))
    done(cuda.cudaGraphDestroy(graph))
    done(cuda.cudaStreamDestroy(stream))
