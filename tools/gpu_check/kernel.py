"""Stage `kernel`: the plugins' kernels against naive references in float64, and under NVIDIA's sanitizers.

python -m gpu_check.kernel SETTINGS CASE…     the named cases alone, which is what a sanitizer runs
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check.cuda import Gpu, kernels
from gpu_check.job import Job, Skip, first_line

HEAD_DIMS, BATCHES = (64, 80, 96, 128, 256), (1, 33, 4096)
ON_HOST = 4  # one in so many cases over stand-ins: tests/plugins runs them all on host threads, of which few are enough
SANITIZED = {
    "memcheck": ("splits", "counts_in_prefill", "mqa_71_of_4_tokens_in_tiles", "f8_of_f32", "everything", "head_dim_8"),
    "racecheck": ("one_token", "new_tokens_9", "splits", "counts_in_prefill", "everything"),
}
SANITIZER_S = 45.0  # of each tool
FOUND = 86  # exit status of a sanitizer that found something


def size_cases(stand_in: bool) -> list[Any]:
    """Every head size in every batch; on host threads the large batch with one of them, and an eighth as large."""
    from tests.support.kernel_cases import Case

    cases = []
    batches = (*BATCHES[:-1], BATCHES[-1] // 8) if stand_in else BATCHES
    for head_dim, batch in itertools.product(HEAD_DIMS, batches):
        few = batch == max(batches)
        if not (stand_in and few and head_dim != HEAD_DIMS[0]):
            lengths = tuple((37 * row) % (11 if few else 200) for row in range(batch))
            name = f"head_dim_{head_dim}_of_{batch}_rows"
            case = Case(name, lengths, heads=2, kv_heads=1, head_dim=head_dim, dtype="bf16", multiprocessors=132)
            cases.append(case if not few else Case(**(vars(case) | {"rotary_dim": 16, "heads": 1})))
    return cases


def failures(job: Job, what: str, checks: Sequence[tuple[str, Callable[[], None]]]) -> dict[str, Any]:
    """Run all checks; how many there were, and what those said that failed."""
    failed: dict[str, str] = {}
    for name, check in checks:
        try:
            check()
        except Exception as error:  # also an assertion: the next case is to run
            failed[name] = first_line(error)
    if failed:
        job.problems.append(f"{what}: {len(failed)} of {len(checks)} fail, {', '.join(list(failed)[:5])}")
    return {"cases": len(checks), "failed": failed}


def check_case(gpu: Gpu, library: Any, case: Any) -> None:
    from tests.support.kernel_calls import run_case
    from tests.support.kernel_device import DeviceMemory
    from tests.support.kernel_reference import check

    check(case, *run_case(library, case, partial(DeviceMemory, gpu.cuda)))


def past_2_31(gpu: Gpu, library: Any) -> str:
    from tests.support.kernel_device import FAR_BYTES, check_far

    if gpu.free_bytes < FAR_BYTES + (1 << 29):
        raise Skip(f"needs {FAR_BYTES / 2**30:.0f} GiB of device memory, {gpu.free_bytes / 2**30:.1f} are free")
    check_far(gpu.cuda, library)
    return "right"


def sanitized(job: Job, tool: str) -> str:
    """Named cases under a tool of compute-sanitizer, in a process of their own."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        raise Skip("compute-sanitizer is not installed")
    settings = job.work / "sanitized.settings"
    settings.write_text(json.dumps({"work": str(job.work), "stand_in": job.stand_in}), encoding="utf-8")
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-m", "gpu_check.kernel"]
    seconds = max(1.0, min(SANITIZER_S, job.seconds_left - 5))
    try:
        ran = subprocess.run(
            [*command, str(settings), *SANITIZED[tool]], capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise Skip(f"{tool} was not done after {seconds:.0f} s") from None
    print(ran.stdout[-4000:], ran.stderr[-4000:], sep="\n", file=sys.stderr)
    if ran.returncode == FOUND:
        lines = [line for line in ran.stdout.splitlines() if line.startswith("=========")]
        raise AssertionError(f"{tool} found something: {' '.join(lines[1:4])}")
    assert ran.returncode == 0, f"under {tool} the cases fail: {(ran.stderr.strip().splitlines() or ['?'])[-1]}"
    return "found nothing"


def run(job: Job) -> None:
    from tests.support.int4_gemm_cases import GEMM_CASES, run_gemm
    from tests.support.kernel_calls import check_rounding
    from tests.support.kernel_cases import CASES, named
    from tests.support.kernel_device import REPLAYED, DeviceMemory, check_replays

    gpu = Gpu(job)
    library = kernels(job, gpu)
    memory = partial(DeviceMemory, gpu.cuda)
    step = ON_HOST if job.stand_in else 1
    rounding = [(f"rounding_{dtype}", partial(check_rounding, library, dtype, memory)) for dtype in ("f8", "i8")]
    groups: dict[str, list[tuple[str, Callable[[], None]]]] = {
        "cases": [*((case.name, partial(check_case, gpu, library, case)) for case in CASES[::step]), *rounding],
        "replays": [(name, partial(check_replays, gpu.cuda, library, named(name))) for name in REPLAYED],
        "int4_products": [(str(case), partial(run_gemm, library, case, memory)) for case in GEMM_CASES[::step]],
        "sizes": [(case.name, partial(check_case, gpu, library, case)) for case in size_cases(job.stand_in)],
    }
    for what, checks in groups.items():
        found = job.numbers[what] = failures(job, what, checks)
        job.say(f"{what}: {found['cases'] - len(found['failed'])} of {found['cases']} are right")
    job.attempt("past_2_31_elements", lambda: past_2_31(gpu, library))
    for tool in SANITIZED:
        job.attempt(tool, partial(sanitized, job, tool))


def main(settings: str, *names: str) -> None:
    from tests.support.kernel_cases import named

    given = json.loads(Path(settings).read_text(encoding="utf-8"))
    job = Job(Path(given["work"]), Path(os.devnull), given["stand_in"], {}, 0.0)
    gpu = Gpu(job)
    library = kernels(job, gpu)
    for name in names:
        check_case(gpu, library, named(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
