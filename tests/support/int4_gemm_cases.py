"""Products with int4 weights that are tested: sizes, arrays, a reference in float64, the comparison with it.

The names are those of int4_gemm.h; nothing here knows the kernel's algorithm.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from plugins.kernels.binding import DTYPE_CODES, LoraDropInt4Gemm
from tests.support.kernel_calls import NUMPY_DTYPES, Memory
from tests.support.kernel_reference import TOLERANCES


@dataclass(frozen=True)
class GemmCase:
    rows: int
    inputs: int
    outputs: int
    block: int = 128
    dtype: str = "f16"
    zero_points: bool = False

    def __str__(self) -> str:
        return (
            f"{self.rows}x{self.inputs}x{self.outputs}_of_{self.block}_{self.dtype}{'_zero_points' * self.zero_points}"
        )


GEMM_CASES = [
    GemmCase(1, 128, 16),
    GemmCase(1, 1024, 40, dtype="bf16"),
    GemmCase(3, 96, 17, block=32, dtype="bf16"),
    GemmCase(7, 192, 33, block=64),
    GemmCase(8, 640, 48),
    GemmCase(9, 128, 16),
    GemmCase(64, 384, 128, dtype="bf16"),
    GemmCase(70, 160, 150, block=32),
    GemmCase(2, 384, 35, block=64, dtype="bf16", zero_points=True),
    GemmCase(66, 192, 40, block=32, zero_points=True),
    GemmCase(5, 96, 33, block=16, zero_points=True),
    GemmCase(11, 352, 130, block=16, dtype="bf16"),
]

Arrays = dict[str, np.ndarray]


def gemm_arrays(case: GemmCase) -> tuple[Arrays, np.ndarray]:
    """The arrays of a call, and its weights as numbers in float64, [N, K]."""
    rng = np.random.default_rng(case.rows + case.inputs)
    dtype = NUMPY_DTYPES[case.dtype]
    grid = case.outputs, case.inputs // case.block
    nibbles = rng.integers(0, 16, (case.outputs, case.inputs)).astype(np.uint8)
    scales = rng.uniform(0.002, 0.03, grid).astype(dtype)
    points = rng.integers(0, 16, grid).astype(np.uint8) if case.zero_points else np.full(grid, 8, np.uint8)
    scale, point = (np.repeat(each.astype(np.float64), case.block, axis=1) for each in (scales, points))
    weights = ((nibbles - point) * scale).astype(dtype)
    arrays = {
        "x": rng.normal(size=(case.rows, case.inputs)).astype(dtype),
        "weights": nibbles[:, ::2] | nibbles[:, 1::2] << 4,
        "scales": scales,
        **({"zero_points": points[:, ::2] | points[:, 1::2] << 4} if case.zero_points else {}),
        "y": np.full((case.rows, case.outputs), np.nan, dtype),
    }
    return arrays, weights.astype(np.float64)


def run_gemm(library: ctypes.CDLL, case: GemmCase, memory: Callable[[np.ndarray], Memory]) -> None:
    """Asserts that a call gives the reference's numbers, and writes nothing else."""
    arrays, weights = gemm_arrays(case)
    held = {name: memory(array) for name, array in arrays.items()}
    call = LoraDropInt4Gemm(case.rows, case.inputs, case.outputs, case.block, DTYPE_CODES[case.dtype])
    for name, array in held.items():
        setattr(call, name, array.address)
    assert library.lora_drop_int4_gemm_problem(call) is None
    assert library.lora_drop_int4_gemm(call, None) == 0
    for name, array in held.items():
        after, intact = array.read()
        assert intact, f"{name}: written outside"
        assert name == "y" or after.tobytes() == arrays[name].tobytes(), f"{name}: an input changed"
    check_gemm(case, arrays, weights, held["y"].read()[0])


def check_gemm(case: GemmCase, arrays: Arrays, weights: np.ndarray, y: np.ndarray) -> None:
    x = arrays["x"].astype(np.float64)
    expected = x @ weights.T
    absolute, relative, _ = TOLERANCES[case.dtype]
    # Sums of float32: each of K terms may be off by 2^-24 of the terms so far
    sums = case.inputs * 2.0**-24 * (np.abs(x) @ np.abs(weights).T)
    error = np.abs(y.astype(np.float64) - expected)
    assert (error <= absolute + relative * np.abs(expected) + sums).all(), error.max()
