"""Stage `build`: the attention kernel for this card, by nvcc."""

from __future__ import annotations

import re
from pathlib import Path

from gpu_check.job import Job, Skip

LIBRARY = "liblora_drop_kernels.so"


def library_of(job: Job) -> Path:
    """The built library; built now where the stage did not run. Raises Skip."""
    library = job.work / LIBRARY
    if job.states.get("build") in ("fail", "skip"):
        raise Skip(f"the stage build ended with {job.states['build']}")
    if not library.is_file():
        compile_kernels(job)
    return library


def compile_kernels(job: Job) -> str:
    """Into the job's folder; returns what the compiler said. Raises NoCompilerError, a skip."""
    from tests.support.kernel_build import KERNELS, build_for_device, build_for_host

    part = job.work / f"{LIBRARY}.part"
    if job.stand_in:
        build_for_host(KERNELS, part)
        report = ""
    else:
        report = build_for_device(part, "-arch=native", "-Xptxas", "-v")
    part.replace(job.work / LIBRARY)
    return report


def run(job: Job) -> None:
    from gpu_check.cuda import cuda_runtime

    cuda_runtime(job)  # -arch=native is the GPU's
    job.say("compiling")
    report = compile_kernels(job)
    kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers", report, re.DOTALL)
    job.numbers["bytes"] = (job.work / LIBRARY).stat().st_size
    if kernels:
        job.numbers["kernels"] = len(kernels)
        job.numbers["most_registers"] = max(int(registers) for _, _, registers in kernels)
        job.numbers["spilled_bytes"] = sum(int(spilled) for _, spilled, _ in kernels)
    job.numbers["warnings"] = len(re.findall(r"\bwarning\b", report, re.IGNORECASE))
