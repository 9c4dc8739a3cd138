"""Builds of kernels: for the CPU, the very sources of the GPU (plugins/kernels/host_block.h), and for GPUs.

Enters: a folder of sources, the repository's or an edited copy. Leaves: a library for plugins/kernels/binding.py, or
one with the kernel that chooses tokens (engines/trt/choose.cu). Builds for the CPU that a test run needs several times
are made once: they lie beside its traces (tests/conftest.py), by the hash of their sources and options.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Iterable
from pathlib import Path

from lora_drop_runtime.engines.trt.kernels import SOURCE, Choice

if sys.platform != "win32":
    import fcntl

KERNELS = Path(__file__).parents[2] / "plugins" / "kernels"

# -ffp-contract=off: the same float32 arithmetic on every CPU. -Og: the build takes longer than all cases; clang then
# unrolls no loop, and warns of it
OPTIONS = (
    *("-std=c++17", "-Og", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-pass-failed"),
)
DEVICE_OPTIONS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-Wall,-Wextra")


class NoCompilerError(unittest.SkipTest):
    """The compiler is not on this machine; the text says where it was looked for. It skips a test that lets it pass."""


def _build(hosts: list[Path], library: Path, *options: str) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise NoCompilerError("no C++ compiler: g++ or $CXX")
    subprocess.run([compiler, *OPTIONS, *options, "-shared", "-fPIC", "-o", library, *hosts], check=True)
    return library


def _built_once(hosts: list[Path], folders: list[Path], library: Path, *options: str) -> Path:
    """As `_build`, of which the processes of one test run share the result; `folders` hold all that is included."""
    shared = os.environ.get("LORA_DROP_TEST_TRACES")
    if not shared:  # gpu_check on its own
        return _build(hosts, library, *options)
    digest = hashlib.sha256(repr((os.environ.get("CXX"), OPTIONS, options, hosts)).encode())
    for file in sorted(file for folder in folders for file in folder.iterdir() if file.is_file()):
        digest.update(file.read_bytes())
    kept = Path(shared, f"{digest.hexdigest()}.so")
    with open(kept.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        if sys.platform != "win32":  # there the tests run in one process
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            part = kept.with_suffix(".part")
            _build(hosts, part, *options)
            part.rename(kept)
    shutil.copyfile(kept, library)
    return library


def build_for_host(source: Path, library: Path, *options: str) -> Path:
    hosts = sorted(source.glob("*_host.cpp"))
    if source == KERNELS:
        return _built_once(hosts, [source], library, *options)
    return _build(hosts, library, *options)


def host_kernels() -> Path:
    """The repository's own kernels, which the workers of a test run share: the build takes a minute."""
    library = Path(os.environ["LORA_DROP_TEST_TRACES"], "kernels_on_host.so")  # tests/conftest.py
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        build_for_host(KERNELS, part)
        part.rename(library)
    return library


@functools.cache
def chooser_on_host() -> ctypes.CDLL:
    """With `choose_tokens(Choice*, order)`."""
    with tempfile.TemporaryDirectory() as folder:
        host, library = Path(__file__).with_name("choose_host.cpp"), Path(folder, "choose.so")
        included = [KERNELS, SOURCE.parent]
        _built_once([host], [*included, host.parent], library, *(f"-I{folder}" for folder in included))
        found = ctypes.CDLL(str(library))
    found.choose_struct_bytes.restype = ctypes.c_ulong
    assert found.choose_struct_bytes() == ctypes.sizeof(Choice)
    return found


TYPES = {"F32": "float", "F16": "Half", "BF16": "BFloat16", "F8_E4M3": "Float8", "I8": "int8_t"}
WITH_TYPES = re.compile(r"auto with_types\(const LoraDropAttention& call, F f\) \{\n.*?\n\}\n", re.DOTALL)


def copied_sources(directory: Path, *kept: str) -> Path:
    """The sources of attention without most number types, which take the time of a build.

    Kept are those that are named: as BF16, or with the caches' as BF16/I8.
    """
    source = directory / "source"
    shutil.copytree(KERNELS, source)
    (source / "int4_gemm_host.cpp").unlink()  # its own tests build it
    lines = []
    for dtype, _, cache in (name.partition("/") for name in kept):
        both = dtype, cache or dtype
        chosen = " && ".join(
            f"call.{kind}dtype == LORA_DROP_{name}" for kind, name in zip(("", "kv_"), both, strict=True)
        )
        lines.append(f"if ({chosen}) return f({', '.join(f'Type<{TYPES[name]}>{{}}' for name in both)});\n")
    body = "".join([*lines[:-1], lines[-1].partition(") ")[2]])  # the last one is that of all others
    launch = source / "launch.cuh"
    text, places = WITH_TYPES.subn(
        f"auto with_types(const LoraDropAttention& call, F f) {{\n{body}\n}}\n", launch.read_text()
    )
    assert places == 1
    launch.write_text(text)
    return source


def build_with_defects(source: Path, bodies: Iterable[Path], edits: Iterable[tuple[str, str]]) -> ctypes.CDLL:
    """One build of all defects: `lora_drop_host_defect` chooses one of them by its number, and none with -1.

    An edit is of the first place in the one of the bodies that has its text; DEFECT stands for whether it is chosen.
    """
    bodies = list(bodies)
    for number, (edit, to) in enumerate(edits):
        (body,) = (path for path in bodies if edit in path.read_text())
        body.write_text(body.read_text().replace(edit, to.replace("DEFECT", f"(lora_drop_defect == {number})"), 1))
    block = source / "block.h"
    block.write_text(block.read_text().replace("namespace", "static int lora_drop_defect = -1;\nnamespace", 1))
    (host,) = source.glob("*_host.cpp")
    host.write_text(host.read_text() + 'extern "C" void lora_drop_host_defect(int i) { lora_drop_defect = i; }\n')
    return ctypes.CDLL(str(build_for_host(source, source / "defects.so", "-w")))


def build_for_device(library: Path, *options: str, source: Path = KERNELS) -> str:
    """By nvcc; returns what it said. Raises RuntimeError with its words where it fails."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise NoCompilerError("no nvcc: $NVCC, PATH or /usr/local/cuda/bin")
    command = [nvcc, *DEVICE_OPTIONS, *options, "-o", library, *sorted(source.glob("*.cu"))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout + done.stderr


def check_layout(header: str, structure: type[ctypes.Structure]) -> None:
    """Members and size lie where the struct of a header that has its name has them: a C compiler says so, or fails.

    Without the headers of a C library, which a machine with gcc may lack.
    """
    compiler = shutil.which("gcc")
    if compiler is None:
        raise NoCompilerError("no C compiler: gcc")
    name = structure.__name__
    places = {f"offsetof({name}, {member})": getattr(structure, member).offset for member, *_ in structure._fields_}
    places[f"sizeof({name})"] = ctypes.sizeof(structure)
    lines = [f'#include "{KERNELS / header}"', *(f'_Static_assert({at} == {n}, "{at}");' for at, n in places.items())]
    subprocess.run(
        [compiler, "-std=c11", "-ffreestanding", "-Wall", "-Werror", "-fsyntax-only", "-xc", "-"],
        input="\n".join(lines) + "\n",
        text=True,
        check=True,
    )
