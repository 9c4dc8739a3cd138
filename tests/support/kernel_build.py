"""Builds of kernels: for the CPU, the very sources of the GPU (plugins/kernels/host_block.h), and for GPUs.

Enters: a folder of sources, the repository's or an edited copy. Leaves: a library for plugins/kernels/binding.py, or
one with the kernel that chooses tokens (engines/trt/choose.cu).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

from lora_drop_runtime.engines.trt.kernels import SOURCE, Choice

KERNELS = Path(__file__).parents[2] / "plugins" / "kernels"

# -ffp-contract=off: the same float32 arithmetic on every CPU
OPTIONS = ("-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
DEVICE_OPTIONS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-Wall,-Wextra")


class NoCompilerError(unittest.SkipTest):
    """The compiler is not on this machine; the text says where it was looked for. It skips a test that lets it pass."""


def _build(hosts: list[Path], library: Path, *options: str) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise NoCompilerError("no C++ compiler: g++ or $CXX")
    subprocess.run([compiler, *OPTIONS, *options, "-shared", "-fPIC", "-o", library, *hosts], check=True)
    return library


def build_for_host(source: Path, library: Path, *options: str) -> Path:
    return _build(sorted(source.glob("*_host.cpp")), library, *options)


@functools.cache
def chooser_on_host() -> ctypes.CDLL:
    """With `choose_tokens(Choice*, order)`; built once."""
    with tempfile.TemporaryDirectory() as folder:
        host, library = Path(__file__).with_name("choose_host.cpp"), Path(folder, "choose.so")
        found = ctypes.CDLL(str(_build([host], library, f"-I{KERNELS}", f"-I{SOURCE.parent}")))
    found.choose_struct_bytes.restype = ctypes.c_ulong
    assert found.choose_struct_bytes() == ctypes.sizeof(Choice)
    return found


def build_for_device(library: Path, *options: str) -> str:
    """By nvcc; returns what it said. Raises RuntimeError with its words where it fails."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise NoCompilerError("no nvcc: $NVCC, PATH or /usr/local/cuda/bin")
    command = [nvcc, *DEVICE_OPTIONS, *options, "-o", library, *sorted(KERNELS.glob("*.cu"))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout + done.stderr
