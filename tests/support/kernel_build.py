"""The host build of the kernels: the very source of the GPU, on the CPU (plugins/kernels/host_block.h).

Enters: a folder of sources, the repository's or an edited copy. Leaves: a library for plugins/kernels/binding.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "plugins" / "kernels"

# -ffp-contract=off: the same float32 arithmetic on every CPU
OPTIONS = ("-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


def build_for_host(source: Path, library: Path, *options: str) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: g++ or $CXX")
    hosts = sorted(source.glob("*_host.cpp"))
    subprocess.run([compiler, *OPTIONS, *options, "-shared", "-fPIC", "-o", library, *hosts], check=True)
    return library
