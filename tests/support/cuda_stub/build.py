"""Builds the CUDA libraries that the provider links, with g++ and the headers of the nvidia-cuda-runtime wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent
CUDART = "libcudart.so.13"
# Library → its source and what the source is told; as the CUDA 13 builds of onnxruntime-gpu name them
LIBRARIES = {
    CUDART: ("cudart.cpp",),
    "libcublas.so.13": ("products.cpp", "-DSTUB_CUBLAS"),
    "libcublasLt.so.13": ("products.cpp", "-DSTUB_CUBLASLT"),
    "libcurand.so.10": ("products.cpp", "-DSTUB_CURAND"),
    "libcuda.so.1": ("products.cpp", "-DSTUB_DRIVER"),
}
OPTIONS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


def build_stub(out: Path, include: Path) -> Path:
    """The libraries in a new folder, `out`; `include` has CUDA's headers."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: g++ or $CXX")
    out.mkdir()
    for name, (source, *defines) in LIBRARIES.items():
        # -isystem: what NVIDIA's headers warn of is not ours
        command = [compiler, *OPTIONS, *defines, "-isystem", include, SOURCES / source]
        subprocess.run([*command, f"-Wl,-soname,{name}", "-o", out / name], check=True)
    return out
