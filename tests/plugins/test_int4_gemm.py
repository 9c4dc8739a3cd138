"""Products with int4 weights: the very source of the GPU, on the CPU (plugins/kernels/host_block.h)."""

from __future__ import annotations

import ctypes
import shutil

import pytest

from plugins.kernels.binding import LoraDropInt4Gemm, bind_int4_gemm, load_library
from tests.support.int4_gemm_cases import GEMM_CASES, GemmCase, run_gemm
from tests.support.kernel_build import KERNELS, build_for_host, build_with_defects, check_layout
from tests.support.kernel_calls import HostMemory


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load_library(build_for_host(KERNELS, tmp_path_factory.mktemp("kernel") / "host.so"))


@pytest.mark.parametrize("order", [0, -1, 1])
@pytest.mark.parametrize("case", GEMM_CASES, ids=str)
def test_reference(library: ctypes.CDLL, case: GemmCase, order: int) -> None:
    library.lora_drop_host_order(order)
    run_gemm(library, case, HostMemory)


# A defect, as an edit of the source, and the case that notices it
DEFECTS = {
    "nibbles_of_the_other_half": ("first >> 16 |", "(DEFECT ? first << 16 : first >> 16) |", GEMM_CASES[0]),
    "zero_point_of_the_neighbour": ("block % 2 ? two >> 4", "block % 2 ? two >> (DEFECT ? 0 : 4)", GEMM_CASES[8]),
    "scale_of_the_first_block": ("scales)[block]", "scales)[DEFECT ? 0 : block]", GEMM_CASES[1]),
    "one_scale_for_32": ("(at + 16 * part)", "(at + (DEFECT ? 0 : 16) * part)", GEMM_CASES[10]),
    "one_warp_forgotten": ("w < kWarps; ++w) total", "w < kWarps - DEFECT; ++w) total", GEMM_CASES[1]),
    "rows_past_the_end": ("|| row >= call.rows) continue", "|| (row >= call.rows && !DEFECT)) continue", GEMM_CASES[5]),
    "tiles_of_x_exchanged": ("tiles + turn * kTokenTileBytes", "tiles + (turn ^ DEFECT) * kTokenTileBytes",
                             GEMM_CASES[6]),
    "pieces_of_x_in_another_order": ("(piece % 4 * 4 + piece / 4) * 16",
                                     "(DEFECT ? piece : piece % 4 * 4 + piece / 4) * 16", GEMM_CASES[6]),
    "no_wait_for_x": ("copy_wait<1>();", "if (!DEFECT) copy_wait<1>();", GEMM_CASES[6]),
    "no_barrier_before_x": ("copy_wait<1>();\n        sync_block();",
                            "copy_wait<1>();\n        if (!DEFECT) sync_block();", GEMM_CASES[6]),
    "no_barrier_after_x": ("        sync_block();\n    }", "        if (!DEFECT) sync_block();\n    }", GEMM_CASES[6]),
    "no_barrier_before_the_join": ("    sync_block();\n    const int output",
                                   "    if (!DEFECT) sync_block();\n    const int output", GEMM_CASES[1]),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """This kernel alone, with defects that are chosen by number."""
    source = tmp_path_factory.mktemp("broken") / "source"
    shutil.copytree(KERNELS, source)
    (source / "skip_write_kv_attention_host.cpp").unlink()
    edits = [(edit, to) for edit, to, _ in DEFECTS.values()]
    library = build_with_defects(source, [source / "int4_gemm.cuh"], edits)
    bind_int4_gemm(library)
    return library


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_noticed(broken: ctypes.CDLL, defect: str) -> None:
    """And the same build without it is right."""
    number, case, noticed = list(DEFECTS).index(defect), DEFECTS[defect][2], 0
    for order in (0, -1, 1):
        broken.lora_drop_host_order(order)
        broken.lora_drop_host_defect(-1)
        run_gemm(broken, case, HostMemory)
        broken.lora_drop_host_defect(number)
        try:
            run_gemm(broken, case, HostMemory)
        except AssertionError:
            noticed += 1
    assert noticed


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rows": 0}, "must be positive"),
        ({"block": 48}, "block must be"),
        ({"inputs": 96}, "multiple of block"),
        ({"inputs": 144, "block": 16}, "of 32"),
        ({"zero_points": 16}, "even number of blocks"),
        ({"rows": 1 << 30}, "rows must be at most"),
        ({"dtype": 0}, "F16 or BF16"),
        ({"scales": None}, "pointer is null"),
    ],
)
def test_problem(library: ctypes.CDLL, changes: dict[str, object], problem: str) -> None:
    call = LoraDropInt4Gemm(1, 192, 16, 64, 1, 16, 16, 16, None, 16)
    assert library.lora_drop_int4_gemm_problem(call) is None
    for name, value in changes.items():
        setattr(call, name, value)
    assert problem in library.lora_drop_int4_gemm_problem(call).decode()


def test_structure_has_the_layout_of_the_header() -> None:
    check_layout("int4_gemm.h", LoraDropInt4Gemm)
