"""Stage `env`: the card, its driver and the versions of libraries; nothing that says whose machine it is."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from typing import Any

from gpu_check.cuda import cuda_runtime
from gpu_check.job import Job

# Distributions; the names of NVIDIA's end in the CUDA version that they are for
LIBRARIES = re.compile(
    r"lora-drop-export|numpy|ml-dtypes|torch|triton|transformers|safetensors|onnx(runtime.*|script|-ir|-graphsurgeon)?|"
    r"polygraphy|tensorrt.*|cuda-(bindings|python|toolkit|pathfinder)|nvidia-(cuda-(runtime|nvrtc)|cudnn|cublas).*"
)


def library_versions() -> dict[str, str]:
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    names = {name: re.sub(r"[-_.]+", "-", name).lower() for name in found}
    return {name: found[name] for name in sorted(found) if LIBRARIES.fullmatch(names[name])}


def output_of(*command: str) -> str | None:
    """What a program prints, None where it is not here or fails."""
    program = shutil.which(command[0])
    if program is None:
        return None
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def seen_by_driver() -> list[dict[str, str]]:
    """Cards and the driver's version, as nvidia-smi has them; empty without it."""
    names = ("name", "driver_version", "memory.total")
    text = output_of("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    return [dict(zip(names, line.split(", "), strict=False)) for line in (text or "").splitlines()]


def card(cuda: Any) -> dict[str, Any]:
    """The first visible GPU."""

    def asked(function: str, *arguments: Any) -> Any:
        error, *values = getattr(cuda, function)(*arguments)
        if int(error) != 0:
            raise RuntimeError(f"{function}: {getattr(error, 'name', error)}")
        return values[0] if len(values) == 1 else values

    properties = asked("cudaGetDeviceProperties", 0)
    return {
        "name": properties.name.decode() if isinstance(properties.name, bytes) else properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multiProcessorCount,
        "memory_bytes": properties.totalGlobalMem,
        "l2_bytes": properties.l2CacheSize,
        "cuda_driver": asked("cudaDriverGetVersion"),
        "cuda_runtime": asked("cudaRuntimeGetVersion"),
    }


def run(job: Job) -> None:
    job.numbers["python"] = platform.python_version()
    job.numbers["libraries"] = library_versions()
    said = output_of("nvcc", "--version") or output_of("/usr/local/cuda/bin/nvcc", "--version") or ""
    nvcc = re.search(r"release ([\d.]+)", said)
    job.numbers["nvcc"] = nvcc[1] if nvcc else None
    if not job.stand_in:
        job.numbers["nvidia_smi"] = seen_by_driver()
    job.save()
    job.numbers["card"] = card(cuda_runtime(job))
    job.say(f"{job.numbers['card']['name']}, {job.numbers['card']['memory_bytes'] / 2**30:.0f} GiB")
