"""The machine that a benchmark runs on.

Enters: numbers of threads and processes. Leaves: what the machine is, how fast it reads memory, how much memory a
process holds, and how busy others keep the cores. What a system does not tell is None. Knows no bundle.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PROC = Path("/proc")
BUFFER_BYTES = 2**30
BANDWIDTH_ROUNDS = 5
VERSIONS_OF = (
    "lora-drop-export",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "openvino",
    "openvino-genai",
    "tensorrt",
    "tensorrt-rtx",
    "transformers",
    "torch",
    "llama-cpp-python",
    "optimum-onnx",
)


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second that `threads` threads read from memory, and how that was measured."""

    bytes_per_second: float
    threads: int
    buffer_bytes: int
    kernel: str
    all_kernels: dict[str, float]

    def describe(self) -> str:
        return (
            f"{self.bytes_per_second / 1e9:.1f} GB/s, the best of {BANDWIDTH_ROUNDS} rounds of "
            f"{', '.join(self.all_kernels)} ({self.kernel} won) by numpy in {self.threads} thread(s) over "
            f"{self.buffer_bytes / 2**20:,.0f} MiB"
        )


def available_bytes() -> int | None:
    """Memory that could be had without swapping."""
    try:
        lines = (PROC / "meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def read_bandwidth(threads: int, buffer_bytes: int | None = None) -> Bandwidth:
    """Measure it: reductions over a buffer far larger than the caches, a part for each thread; the fastest counts.

    Args:
        threads: numpy lets go of the interpreter while it reduces, so they read at the same time.
        buffer_bytes: 1 GiB when None, less where a quarter of the free memory is less.
    """
    if buffer_bytes is None:
        free = available_bytes()
        buffer_bytes = BUFFER_BYTES if free is None else max(2**26, min(BUFFER_BYTES, free // 4))
    buffer = np.ones(buffer_bytes // 8, np.int64)  # ones: pages of zeros would all be the same one
    parts = np.array_split(buffer, threads)
    kernels: dict[str, Callable[[npt.NDArray[np.int64]], Any]] = {
        "max(float32)": lambda part: part.view(np.float32).max(),
        "or(int64)": np.bitwise_or.reduce,
        "sum(int64)": np.add.reduce,
    }
    if threads >= (os.cpu_count() or 1):  # it takes all cores, whatever the number of parts
        kernels["dot(float32)"] = lambda part: np.dot(part.view(np.float32), part.view(np.float32))
    best: dict[str, float] = {}
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(BANDWIDTH_ROUNDS):
            for name, kernel in kernels.items():
                begin = time.perf_counter()
                list(pool.map(kernel, parts))
                rate = buffer.nbytes / (time.perf_counter() - begin)
                best[name] = max(rate, best.get(name, 0.0))
    fastest = max(best, key=best.__getitem__)
    return Bandwidth(best[fastest], threads, buffer.nbytes, fastest, best)


def pss_bytes(pid: int | str = "self") -> dict[str, int] | None:
    """A process's proportional set size: `total`, `anonymous`, `file` (mapped weights); None without /proc."""
    names = {"Pss": "total", "Pss_Anon": "anonymous", "Pss_File": "file"}
    try:
        text = (PROC / str(pid) / "smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = (line.partition(":") for line in text.splitlines())
    found = {names[key]: int(value.split()[0]) * 1024 for key, _, value in fields if key in names}
    return found if "total" in found else None


@dataclass(frozen=True)
class CpuTime:
    """Seconds since some fixed moment: wall, of all cores together while busy, of our own processes."""

    wall: float
    busy: float
    own: float


def cpu_time(children: Iterable[int] = ()) -> CpuTime | None:
    """A reading for `foreign_cores`; `children` are living processes of ours. None without /proc."""
    try:
        ticks = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq, steal = map(
            int, (PROC / "stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]
        )
        own = sum(os.times()[:4])
        for pid in children:
            fields = (PROC / str(pid) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            own += (int(fields[11]) + int(fields[12])) / ticks
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return CpuTime(time.monotonic(), (user + nice + system + irq + softirq + steal) / ticks, own)


def foreign_cores(begin: CpuTime | None, end: CpuTime | None) -> float | None:
    """How many cores others kept busy between two readings, on average; time a hypervisor took away included."""
    if begin is None or end is None or end.wall <= begin.wall or end.busy <= begin.busy:
        return None
    return max(0.0, (end.busy - begin.busy - (end.own - begin.own)) / (end.wall - begin.wall))


def physical_cores() -> int:
    """Cores that this process may use, a quota apart; the logical ones where the system does not say."""
    cores: set[tuple[str, str]] = set()
    try:
        socket = ""
        for line in (PROC / "cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = map(str.strip, line.partition(":"))
            if key == "physical id":
                socket = value
            elif key == "core id":
                cores.add((socket, value))
    except OSError:
        pass
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(len(cores), usable) if cores else usable


def _processor(lines: Iterable[str]) -> str:
    """Its name; on ARM, where Linux has none, whose cores it has and which."""
    fields = [tuple(map(str.strip, line.partition(":")[::2])) for line in lines]
    said = {key: [value for name, value in fields if name == key] for key, _ in fields}
    cores = dict.fromkeys(zip(said.get("CPU implementer", []), said.get("CPU part", []), strict=False))
    if "model name" in said or not cores:
        return said.get("model name", [platform.processor() or platform.machine()])[0]
    return ", ".join(f"implementer {maker} part {part}" for maker, part in cores)


def machine_facts() -> dict[str, Any]:
    """What a reader needs to know to judge the numbers: processor, cores, memory, versions; not whose machine it is."""
    model = platform.processor() or platform.machine()
    memory = None
    try:
        model = _processor((PROC / "cpuinfo").read_text(encoding="utf-8").splitlines())
        memory = next(
            int(line.split()[1]) * 1024
            for line in (PROC / "meminfo").read_text(encoding="utf-8").splitlines()
            if "MemTotal" in line
        )
    except (OSError, StopIteration):
        pass
    versions = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "logical_cores": os.cpu_count(),
        "physical_cores": physical_cores(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }
