"""The attention kernel on the CPU: the very source of the GPU, its threads as fibers (plugins/kernels/host_block.h)."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from plugins.kernels.binding import LoraDropAttention, bind_attention, load_library
from tests.support.kernel_build import (
    KERNELS,
    build_for_host,
    build_with_defects,
    check_layout,
    copied_sources,
)
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
    workspace = HostMemory(np.zeros(size, np.uint8))
    call.workspace = workspace.address
    assert host_library.lora_drop_attention(call, size, 1, None) == 0
    new = slice(70, 86)
    for name in ("key_cache", "value_cache"):
        assert first[name][:, :, new].tobytes() == after[name][:, :, new].tobytes()
    # Other parts of a row, and so other maxima, to which the weights of tensor cores are rounded
    np.testing.assert_allclose(
        first["output"].astype(np.float32), after["output"][:, :16].astype(np.float32), rtol=8e-3, atol=4e-3
    )


# A defect, as an edit of the source, and the case that notices it
DEFECTS = {
    "slot_off_by_one": ("row.length + token) * d", "row.length + token + DEFECT) * d", "one_token"),
    "stale_length": ("plan.fused ? row.length :", "plan.fused ? row.length - DEFECT :", "one_token"),
    "capacity_for_length": ("plan.fused ? row.length", "plan.fused ? DEFECT ? call.slots : row.length", "capacity"),
    "window_off_by_one": ("visible = slot <= last && slot >", "visible = slot <= last && slot + DEFECT >",
                          "window_in_prefill"),
    "causal_off_by_one": ("visible = slot <= last", "visible = slot <= last + DEFECT", "new_tokens_4"),
    "every_part_appends": ("if (u < item.key_tiles) {", "if (u < item.key_tiles && (!DEFECT || u + 1 < until)) {",
                           "splits"),
    "no_part_appends": ("n = plan.fused ? item.row.count : 0", "n = plan.fused && !DEFECT ? item.row.count : 0",
                        "one_token"),
    "a_part_too_few": ("i < pieces; i += parts", "i < pieces - DEFECT; i += parts", "splits"),
    "query_of_another_head": ("g = within / units_of_head", "g = DEFECT ? 0 : within / units_of_head", "mha"),
    "norm_without_its_mean": ("factor * weight[i]", "(DEFECT ? 1.0f : factor) * weight[i]", "norm_in_prefill"),
    "sink_of_another_head": ("call.sinks[g * plan.group +", "call.sinks[(DEFECT ? 0 : g * plan.group) +", "sinks"),
    "value_scaled_as_a_key": ("value[i] /= v_scale", "value[i] /= DEFECT ? k_scale : v_scale", "f8_of_f32"),
    "tensor_window_off_by_one": ("i < n && slot <= last && slot >", "i < n && slot <= last && slot + DEFECT >",
                                 "tensor_window"),
    "tensor_causal_off_by_one": ("i < n && slot <= last", "i < n && slot <= last + DEFECT", "tensor_head_dim_80"),
    "tensor_no_correction": ("outputs[j][2 * half] *= correction;",
                             "outputs[j][2 * half] *= DEFECT ? 1.0f : correction;", "tensor_group_of_8"),
    "tensor_halves_exchanged": ("multiply_add<T>(scores[j + 1], q, k + 2)",
                                "multiply_add<T>(scores[j + 1], q, DEFECT ? k : k + 2)", "tensor_head_dim_80"),
    "tensor_rows_past_the_end_not_zero": ("(n + 15) / 16 * 16", "(DEFECT ? n : (n + 15) / 16 * 16)",
                                          "tensor_head_dim_80"),
    "tensor_padding_of_the_head_not_zero": ("call.head_dim % 16 != 0", "call.head_dim % 16 != 0 && !DEFECT",
                                            "tensor_head_dim_72"),
}  # fmt: skip
WAITS = re.compile(r"(sync_block|sync_warp|copy_wait<1>|copy_commit)\(\);")


@dataclass(frozen=True)
class Broken:
    """The kernels with defects that are chosen by number: those of DEFECTS, one more, and a forgotten wait each."""

    library: ctypes.CDLL
    reads_too_far: int
    waits: dict[int, str]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Broken:
    source = copied_sources(tmp_path_factory.mktemp("broken"), "F16", "F32/F8_E4M3", "F32")
    bodies = sorted(set(source.glob("*.cuh")) - {source / "int4_gemm.cuh"})  # its own test has those
    edits = [(edit, to) for edit, to, _ in DEFECTS.values()]
    edits.append(("end = max(plan.fused ?", "end = 32 * DEFECT + max(plan.fused ?"))
    waits: dict[int, str] = {}

    def forgettable(wait: re.Match[str]) -> str:
        line = wait.string[wait.string.rfind("\n", 0, wait.start()) + 1 :].split("\n", 1)[0].strip()
        number = len(edits) + len(waits)
        waits[number] = f"{body.name}: {line}"
        return f"if (lora_drop_defect != {number}) {wait[0]}"

    for body in bodies:
        body.write_text(WAITS.sub(forgettable, body.read_text()))
    library = build_with_defects(source, bodies, edits)
    bind_attention(library)
    return Broken(library, len(DEFECTS), waits)


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_noticed(broken: Broken, defect: str) -> None:
    """And the same build without it is right."""
    case = named(DEFECTS[defect][2])
    broken.library.lora_drop_host_defect(-1)
    check(case, *run(broken.library, case))
    broken.library.lora_drop_host_defect(list(DEFECTS).index(defect))
    with pytest.raises(AssertionError):
        check(case, *run(broken.library, case))


# Each wait is forgotten in a process of its own: it may follow what is not there
FORGETFUL = """
import ctypes, os, sys
from plugins.kernels.binding import bind_attention
from tests.support.kernel_calls import HostMemory, run_case
from tests.support.kernel_cases import named
from tests.support.kernel_reference import check
library = ctypes.CDLL(sys.argv[1])
bind_attention(library)
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    if os.fork() == 0:
        sys.stderr = open(os.devnull, "w")
        os.dup2(sys.stderr.fileno(), 2)
        library.lora_drop_host_defect(number)
        for name in sys.argv[4:]:
            for order in (0, -1, 1, 2, 3):
                library.lora_drop_host_order(order)
                check(named(name), *run_case(library, named(name), HostMemory))
        os._exit(0)
    if os.wait()[1] == 0:
        print(number)
"""


def test_every_forgotten_wait_is_noticed(broken: Broken) -> None:
    names = ("one_token", "new_tokens_9", "splits", "ragged", "tensor_group_of_8", "tensor_group_of_20")
    first, last = min(broken.waits), max(broken.waits)
    command = [sys.executable, "-c", FORGETFUL, broken.library._name, str(first), str(last + 1), *names]
    output = subprocess.run(command, check=True, cwd=KERNELS.parents[1], capture_output=True, text=True).stdout
    assert len(broken.waits) > 10
    assert [broken.waits[int(number)] for number in output.split()] == []


SANITIZED = """
import ctypes, sys
from plugins.kernels.binding import bind_attention
from tests.support.kernel_calls import HostMemory, run_case
from tests.support.kernel_cases import named
from tests.support.kernel_reference import check
library = ctypes.CDLL(sys.argv[1])
bind_attention(library)
for name in sys.argv[2:]:
    check(named(name), *run_case(library, named(name), HostMemory))
"""


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """In a process of its own. The address sanitizer is for shared memory: arrays have their guards."""
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    source = copied_sources(tmp_path, "F16", "BF16/F8_E4M3", "F32")  # what the cases need
    library = build_for_host(source, tmp_path / "host.so", "-O0", "-w", *sanitizers)
    runtime = subprocess.check_output([os.environ.get("CXX", "g++"), "-print-file-name=libasan.so"], text=True).strip()
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    names = ["splits", "counts_in_prefill", "mqa_71_of_4_tokens_in_tiles", "f8_of_bf16_of_one_token", "everything",
             "head_dim_8"]  # fmt: skip
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
import ctypes, sys
from plugins.kernels.binding import bind_attention
from tests.support.kernel_calls import run_case
from tests.support.kernel_cases import Case
from tests.support.kernel_reference import check
from tests.plugins.test_kernel_host import FENCED_SLOTS, Fenced
library = ctypes.CDLL(sys.argv[1])
bind_attention(library)
library.lora_drop_host_defect(int(sys.argv[2]))
for new_tokens in (1, 4, 17):
    for multiprocessors in (1, 64):
        case = Case("fenced", lengths=(FENCED_SLOTS - new_tokens,), new_tokens=new_tokens, kv_heads=1, spare_slots=256,
                    multiprocessors=multiprocessors)
        check(case, *run_case(library, case, Fenced))
"""


@pytest.mark.parametrize(("reads_too_far", "returncode"), [(False, 0), (True, -signal.SIGSEGV)])
def test_no_slot_past_the_length_is_touched(broken: Broken, reads_too_far: bool, returncode: int) -> None:
    """Nor read in vain: a page fault would end the process, as it does with a defect."""
    defect = broken.reads_too_far if reads_too_far else -1
    command = [sys.executable, "-c", FENCE, broken.library._name, str(defect)]
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
        ({"batch": 1 << 15, "slots": 1 << 30}, "too large"),
    ],
)
def test_problem(host_library: ctypes.CDLL, changes: dict[str, object], problem: str) -> None:
    optional = ("q_norm", "k_norm", "k_scale", "v_scale", "sinks")
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


def test_workspace_is_of_the_blocks_and_not_of_the_problem(host_library: ctypes.CDLL) -> None:
    """Two parts of a tile for each of at most 3 blocks a multiprocessor, and a mark of 16 bytes."""
    call = make_call(named("gqa_of_llama_3_8b"), lambda name: None)
    call.slots = 1 << 20
    for batch in (1, 64):
        call.batch = batch
        sizes = {n: host_library.lora_drop_workspace_bytes(call, n) for n in (1, 132, 10_000)}
        each = 16 + 2 * 4 * (128 + 2) * 4
        assert sizes == {1: 3 * each, 132: 396 * each, 10_000: 2048 * each}


SHARES = {
    "one_row": (2000,),
    "batch_8": (256,) * 8,
    "batch_33": (256,) * 33,
    "batch_64": (256,) * 64,
    "ragged": (3000, *(10,) * 15),
    "ragged_in_prefill": (900, 0, 30),
}


@pytest.mark.parametrize("name", SHARES)
def test_blocks_share_the_work_evenly(host_library: ctypes.CDLL, name: str) -> None:
    """One wave of blocks, whatever the batch and the lengths; none reads more than its share and a tile of keys.

    16 multiprocessors of 3 blocks: whole rows, or as many parts for each row, would leave some of them idle for half of
    the time (33 and 64 rows) or for most of it (ragged lengths).
    """
    lengths = SHARES[name]
    case = Case(name, lengths=lengths, heads=1, kv_heads=1, head_dim=32, multiprocessors=16,
                new_tokens=40 if "prefill" in name else 1)  # fmt: skip
    run(host_library, case)
    shares = np.zeros(10_000, np.int64)
    blocks = host_library.lora_drop_host_shares(shares.ctypes.data_as(ctypes.c_void_p), shares.size)
    tile_bytes = 2 * 64 * 32 * 4  # keys and values
    assert blocks <= 3 * 16
    assert shares.max() <= np.ceil(shares.sum() / (3 * 16) / tile_bytes + 1) * tile_bytes


def test_a_card_that_takes_fewer_blocks_needs_no_more_workspace(host_library: ctypes.CDLL) -> None:
    """What a multiprocessor takes is asked when a call is launched; the workspace was given before."""
    case = replace(named("splits"), multiprocessors=4)
    arrays, _ = run(host_library, case)
    try:
        for resident in (0, 1, 2, 9):
            host_library.lora_drop_host_resident(resident)
            _, after = run_case(host_library, case, HostMemory, arrays)
            check(case, arrays, after)
            shares = np.zeros(10_000, np.int64)
            blocks = host_library.lora_drop_host_shares(shares.ctypes.data_as(ctypes.c_void_p), shares.size)
            assert blocks == min(max(resident, 1), 3) * case.multiprocessors
    finally:
        host_library.lora_drop_host_resident(9)


def test_structure_has_the_layout_of_the_header() -> None:
    check_layout("skip_write_kv_attention.h", LoraDropAttention)
