"""The attention kernel on the CPU: the very source of the GPU, its threads as fibers (plugins/kernels/host_block.h)."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from plugins.kernels.binding import LoraDropAttention, load_library
from tests.support.kernel_build import KERNELS, build_for_host
from tests.support.kernel_calls import HostMemory, check_rounding, make_arrays, make_call, run_case
from tests.support.kernel_cases import CASES, Case, named
from tests.support.kernel_reference import Arrays, check


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load_library(build_for_host(KERNELS, tmp_path_factory.mktemp("kernel") / "host.so"))


def run(library: ctypes.CDLL, case: Case, order: int = 0) -> tuple[Arrays, Arrays]:
    library.lora_drop_host_order(order)
    return run_case(library, case, HostMemory)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference(host_library: ctypes.CDLL, case: Case) -> None:
    check(case, *run(host_library, case))


@pytest.mark.parametrize("dtype", ["f8", "i8"])
def test_rounding(host_library: ctypes.CDLL, dtype: str) -> None:
    check_rounding(host_library, dtype, HostMemory)


@pytest.mark.parametrize(
    "name", ["one_token", "new_tokens_9", "counts_in_prefill", "splits", "splits_in_prefill", "everything"]
)
def test_order_of_threads_does_not_matter(host_library: ctypes.CDLL, name: str) -> None:
    case = named(name)
    _, expected = run(host_library, case)
    for order in (-1, 1, 2, 3):
        _, got = run(host_library, case, order)
        for array in ("output", "key_cache", "value_cache"):
            assert got[array].tobytes() == expected[array].tobytes(), f"order {order}: {array}"


def test_stored_values_do_not_depend_on_the_path(host_library: ctypes.CDLL) -> None:
    """The 17th token makes it a prefill; the 16 before it get the same bytes and the same attention."""
    prefill = Case("", lengths=(70,), new_tokens=17, dtype="bf16", kv_dtype="f8", norm=True, heads=4, kv_heads=4)
    arrays, after = run(host_library, prefill)
    decode = replace(prefill, new_tokens=16, spare_slots=prefill.spare_slots + 1)
    first = {name: None if array is None else array.copy() for name, array in arrays.items()}
    for name in ("query", "key", "value", "cos", "sin", "output"):
        first[name] = np.ascontiguousarray(arrays[name][:, :16])
    call = make_call(decode, lambda name: None if first.get(name) is None else first[name].ctypes.data)
    size = host_library.lora_drop_workspace_bytes(call, 1)
    assert size == 0
    assert host_library.lora_drop_attention(call, size, 1, None) == 0
    new = slice(70, 86)
    for name in ("key_cache", "value_cache"):
        assert first[name][:, :, new].tobytes() == after[name][:, :, new].tobytes()
    np.testing.assert_allclose(
        first["output"].astype(np.float32), after["output"][:, :16].astype(np.float32), rtol=4e-3, atol=1e-5
    )


# A defect, as an edit of the source, and the case that notices it
DEFECTS = {
    "slot_off_by_one": ("row.length + token) * d", "row.length + token + 1) * d", "one_token"),
    "stale_length": ("plan.fused ? row.length :", "plan.fused ? row.length - 1 :", "one_token"),
    "capacity_for_length": ("plan.fused ? row.length :", "plan.fused ? call.slots :", "capacity"),
    "causal_off_by_one": ("slot <= last &&", "slot <= last + 1 &&", "new_tokens_4"),
    "window_off_by_one": ("slot > last - window", "slot >= last - window", "window_in_prefill"),
    "every_split_appends": ("plan.fused && split == plan.splits - 1 ? row.count", "plan.fused ? row.count", "splits"),
    "no_split_appends": ("plan.fused && split == plan.splits - 1 ? row.count", "false ? row.count", "one_token"),
    "unwritten_splits_joined": ("= written ?", "= true ?", "splits"),
    "query_of_another_head": ("load_queries(row, b, g,", "load_queries(row, b, 0,", "mha"),
    "norm_without_its_mean": ("factor * weight[i]", "weight[i]", "norm_in_prefill"),
    "value_scaled_as_a_key": ("value[i] /= v_scale", "value[i] /= k_scale", "f8_of_f32"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_noticed(tmp_path: Path, defect: str) -> None:
    edit, to, noticed_by = DEFECTS[defect]
    library = mutant(tmp_path, edit, to)
    with pytest.raises(AssertionError):
        check(named(noticed_by), *run(library, named(noticed_by)))


# What a thread waits for, and how often the source says so
WAITS = {"sync_block();": 11, "sync_warp();": 2, "copy_wait<1>();": 2, "copy_commit();": 3}
# No slot, no token: both sides of this barrier write zeros
HARMLESS_WAIT = ("sync_block();", 8)


@pytest.mark.parametrize(
    ("wait", "occurrence"),
    [(w, i) for w, n in WAITS.items() for i in range(n) if (w, i) != HARMLESS_WAIT],
)
def test_forgotten_wait_is_noticed(tmp_path: Path, wait: str, occurrence: int) -> None:
    library = mutant(tmp_path, wait, "", occurrence)
    noticed = 0
    for case in map(named, ("one_token", "new_tokens_9", "splits")):
        for order in (0, -1):
            try:
                check(case, *run(library, case, order))
            except AssertionError:
                noticed += 1
    assert noticed


def test_every_wait_is_forgotten_once() -> None:
    source = (KERNELS / "skip_write_kv_attention.cuh").read_text()
    assert {wait: source.count(wait) for wait in WAITS} == WAITS


def mutant(directory: Path, edit: str, to: str, occurrence: int = 0) -> ctypes.CDLL:
    source = directory / "source"
    shutil.copytree(KERNELS, source)
    body = source / "skip_write_kv_attention.cuh"
    parts = body.read_text().split(edit)
    assert len(parts) > occurrence + 1, "the edit no longer fits the source"
    body.write_text(edit.join(parts[: occurrence + 1]) + to + edit.join(parts[occurrence + 1 :]))
    # Half of the build time is in number types that no mutant is tried with
    plan = source / "plan.h"
    kept = [line for line in plan.read_text().splitlines() if not re.search("case .*_(F16|BF16|I8): return", line)]
    plan.write_text("\n".join(kept))
    return load_library(build_for_host(source, directory / "mutant.so", "-O0", "-w"))


SANITIZED = """
import sys
from pathlib import Path
from plugins.kernels.binding import load_library
from tests.support.kernel_calls import HostMemory, run_case
from tests.support.kernel_cases import named
from tests.support.kernel_reference import check
library = load_library(Path(sys.argv[1]))
for name in sys.argv[2:]:
    check(named(name), *run_case(library, named(name), HostMemory))
"""


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """In a process of its own. The address sanitizer is for shared memory: arrays have their guards."""
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    library = build_for_host(KERNELS, tmp_path / "host.so", "-O0", "-w", *sanitizers)
    runtime = subprocess.check_output([os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"], text=True).strip()
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    names = ["splits", "counts_in_prefill", "mqa_71_of_4_tokens_in_tiles", "f8_of_f32", "everything", "head_dim_8"]
    command = [sys.executable, "-c", SANITIZED, library, *names]
    subprocess.run(command, check=True, env=environment, cwd=KERNELS.parents[1])


class Fenced:
    """Memory on pages of its own; of a cache, the pages past the first FENCED_SLOTS can be neither read nor written."""

    def __init__(self, array: np.ndarray) -> None:
        self.pages = mmap.mmap(-1, max(array.nbytes, 1))
        self.array = np.frombuffer(self.pages, array.dtype, array.size).reshape(array.shape)
        self.array[...] = array
        self.address = self.array.ctypes.data
        self.fenced = self.array[:, :, FENCED_SLOTS:] if array.ndim == 4 else self.array[:0]
        self.protect(0)

    def protect(self, rights: int) -> None:
        if self.fenced.nbytes:
            libc = ctypes.CDLL(None)
            size = ctypes.c_size_t(self.fenced.nbytes)
            assert libc.mprotect(ctypes.c_void_p(self.fenced.ctypes.data), size, rights) == 0

    def read(self) -> tuple[np.ndarray, bool]:
        self.protect(mmap.PROT_READ)
        return self.array, True


FENCED_SLOTS = 64  # of 64 float32: four pages
FENCE = """
import sys
from pathlib import Path
from plugins.kernels.binding import load_library
from tests.support.kernel_calls import run_case
from tests.support.kernel_cases import Case
from tests.support.kernel_reference import check
from tests.plugins.test_kernel_host import FENCED_SLOTS, Fenced
library = load_library(Path(sys.argv[1]))
for new_tokens in (1, 4, 17):
    for multiprocessors in (1, 64):
        case = Case("fenced", lengths=(FENCED_SLOTS - new_tokens,), new_tokens=new_tokens, kv_heads=1, spare_slots=256,
                    multiprocessors=multiprocessors)
        check(case, *run_case(library, case, Fenced))
"""


@pytest.mark.parametrize(("end", "returncode"), [("row.length", 0), ("row.length + 32", -signal.SIGSEGV)])
def test_no_slot_past_the_length_is_touched(tmp_path: Path, end: str, returncode: int) -> None:
    """Nor read in vain: a page fault would end the process, as it does with a defect."""
    mutant(tmp_path, "plan.fused ? row.length :", f"plan.fused ? {end} :")
    command = [sys.executable, "-c", FENCE, tmp_path / "mutant.so"]
    done = subprocess.run(command, cwd=KERNELS.parents[1], capture_output=True, text=True)
    assert done.returncode == returncode, done.stderr


@pytest.mark.parametrize("new_tokens", [1, 4, 40])
def test_lengths_out_of_range_are_clamped(host_library: ctypes.CDLL, new_tokens: int) -> None:
    """As an engine builder's buffers may hold them: the same bytes as with the nearest ones in range, and no others."""
    case = Case("", lengths=(37, 9, 130, 5), counts=(1, 1, 1, 1), new_tokens=new_tokens, spare_slots=50)
    far = 2**40
    arrays = make_arrays(case)
    wild, tame = (
        arrays | {"length": np.array(lengths, np.int64), "count": np.array(counts, np.int64)}
        for lengths, counts in (
            ((-far, far, case.slots - 1, 5), (far, 3, 7, -1)),
            ((0, case.slots, case.slots - 1, 5), (new_tokens, 0, 1, 0)),
        )
    )
    results = []
    for given in (wild, tame):
        copies = {name: None if array is None else array.copy() for name, array in given.items()}
        results.append(run_case(host_library, case, HostMemory, copies)[1])
    for name in ("output", "key_cache", "value_cache"):
        assert results[0][name].tobytes() == results[1][name].tobytes(), name


def test_nan_stays_visible(host_library: ctypes.CDLL) -> None:
    """No weight is the mark of a token that sees nothing; a sum that is not a number must not pass for it."""
    for case in map(named, ("one_token", "splits")):
        arrays = make_arrays(case)
        arrays["query"][0, 0, : case.head_dim] = np.nan
        _, after = run_case(host_library, case, HostMemory, arrays)
        assert np.isnan(after["output"][0, 0, : case.head_dim]).all()
        assert np.isfinite(after["output"][0, 0, case.head_dim :]).all()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"batch": 0}, "must be positive"),
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"head_dim": 60}, "head_dim"),
        ({"head_dim": 264}, "head_dim"),
        ({"rotary_dim": 66}, "rotary_dim"),
        ({"rotary_dim": 31}, "rotary_dim"),
        ({"dtype": 3}, "dtype"),
        ({"kv_dtype": 1}, "kv_dtype"),
        ({"kv_dtype": 3}, "k_scale"),
        ({"window": -1}, "window"),
        ({"softcap": -1.0}, "softcap"),
        ({"softcap": float("nan")}, "softcap"),
        ({"key": None}, "required pointer"),
        ({"cos": None}, "cos and sin"),
        ({"q_norm": 16}, "both or neither"),
        ({"v_scale": 16}, "quantized"),
        ({"new_tokens": 1 << 24}, "too large"),
    ],
)
def test_problem(host_library: ctypes.CDLL, changes: dict[str, object], problem: str) -> None:
    optional = ("q_norm", "k_norm", "k_scale", "v_scale")
    call = make_call(named("one_token"), lambda name: None if name in optional else 16)
    assert host_library.lora_drop_attention_problem(call) is None
    for name, value in changes.items():
        setattr(call, name, value)
    assert problem in host_library.lora_drop_attention_problem(call).decode()


def test_workspace_too_small(host_library: ctypes.CDLL) -> None:
    call = make_call(named("splits"), lambda name: None)
    size = host_library.lora_drop_workspace_bytes(call, 500)
    assert size > 0
    assert host_library.lora_drop_attention(call, size - 1, 500, None) == 1


def test_workspace_depends_on_sizes_alone(host_library: ctypes.CDLL) -> None:
    """Also on a machine with any number of multiprocessors it stays in proportion to the query."""
    call = make_call(named("gqa_of_llama_3_8b"), lambda name: None)
    call.slots = 1 << 20
    sizes = [host_library.lora_drop_workspace_bytes(call, n) for n in (1, 132, 10_000)]
    assert sizes == [0, 32 * (3 * 132 // 8) * (128 + 2) * 4, 32 * 256 * (128 + 2) * 4]


def test_structure_has_the_layout_of_the_header(tmp_path: Path) -> None:
    fields = [name for name, _ in LoraDropAttention._fields_]
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stdio.h>\n"
        f'#include "{KERNELS / "skip_write_kv_attention.h"}"\n'
        "int main(void) {\n"
        + "".join(f'printf("%zu ", offsetof(LoraDropAttention, {name}));\n' for name in fields)
        + 'printf("%zu", sizeof(LoraDropAttention)); }\n'
    )
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: gcc")
    subprocess.run([compiler, "-std=c11", "-Wall", "-Werror", "-o", tmp_path / "layout", source], check=True)
    layout = [int(n) for n in subprocess.check_output([tmp_path / "layout"]).split()]
    expected = [getattr(LoraDropAttention, name).offset for name in fields]
    assert layout == [*expected, ctypes.sizeof(LoraDropAttention)]
