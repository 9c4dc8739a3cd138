"""Calls of a built kernel library: the arrays of a case, the struct, memory between guards, the call.

Enter: a library and a case. Leave: the arrays before and after. Whether a case's are right is for kernel_reference.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

import ml_dtypes
import numpy as np

from plugins.kernels.binding import DTYPE_CODES, INPUTS, UPDATED, LoraDropAttention
from tests.support.kernel_cases import Case
from tests.support.kernel_reference import Arrays, quantize, score_scale

NUMPY_DTYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f8": np.dtype(ml_dtypes.float8_e4m3fn),
    "i8": np.dtype(np.int8),
}

GUARD_BYTES = 4096
GUARD = 0xA5


def make_arrays(case: Case) -> Arrays:
    """Inputs and caches. Whatever the kernel must not read is NaN (or 127, of int8)."""
    rng = np.random.default_rng(case.seed)
    batch, new = len(case.lengths), case.new_tokens
    dtype, cache_dtype = NUMPY_DTYPES[case.dtype], NUMPY_DTYPES[case.cache_dtype]
    garbage = 127 if case.cache_dtype == "i8" else np.nan

    def tokens(heads: int) -> np.ndarray:
        x = rng.normal(size=(batch, new, heads * case.head_dim)).astype(dtype)
        for row, count in enumerate(case.appended):
            x[row, count:] = np.nan
        return x

    arrays: Arrays = {
        "query": tokens(case.heads),
        "key": tokens(case.kv_heads),
        "value": tokens(case.kv_heads),
        "cos": None,
        "sin": None,
        "q_norm": None,
        "k_norm": None,
        "k_scale": None,
        "v_scale": None,
        "sinks": None,
        "length": np.array(case.lengths, np.int64),
        "count": None if case.counts is None else np.array(case.counts, np.int64),
        "output": np.full((batch, new, case.heads * case.head_dim), np.nan, dtype),
    }
    if case.rotated:
        half = case.rotated // 2
        position = np.array(case.lengths)[:, None] + case.holes + np.arange(new)
        angle = position[..., None] * 1000.0 ** -(np.arange(half) / half)
        for name, function in (("cos", np.cos), ("sin", np.sin)):
            arrays[name] = table = function(angle).astype(dtype)
            for row, count in enumerate(case.appended):
                table[row, count:] = np.nan
    if case.norm:
        arrays["q_norm"] = rng.uniform(0.5, 1.5, case.head_dim).astype(dtype)
        arrays["k_norm"] = rng.uniform(0.5, 1.5, case.head_dim).astype(dtype)
    if case.quantized:
        # Small enough that the largest new values saturate
        unit = 0.02 if case.cache_dtype == "i8" else 0.006
        arrays["k_scale"] = (unit * rng.uniform(0.7, 1.3, case.kv_heads)).astype(np.float32)
        arrays["v_scale"] = (unit * rng.uniform(0.7, 1.3, case.kv_heads)).astype(np.float32)
    if case.sinks:
        arrays["sinks"] = rng.normal(1.0, 2.0, case.heads).astype(np.float32)
    for name in ("key", "value"):
        cache = rng.normal(size=(batch, case.kv_heads, case.slots, case.head_dim)).astype(np.float32)
        cache = quantize(cache, arrays[f"{name[0]}_scale"], cache_dtype)
        for row, length in enumerate(case.lengths):
            cache[row, :, length:] = garbage
        arrays[f"{name}_cache"] = cache
    return arrays


def make_call(case: Case, address: Callable[[str], int | None]) -> LoraDropAttention:
    """The struct of a case; `address` gives the pointer of each array by name."""
    call = LoraDropAttention(
        batch=len(case.lengths),
        new_tokens=case.new_tokens,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        slots=case.slots,
        rotary_dim=case.rotated,
        interleaved=case.interleaved,
        window=case.window,
        dtype=DTYPE_CODES[case.dtype],
        kv_dtype=DTYPE_CODES[case.cache_dtype],
        scale=score_scale(case),
        softcap=case.softcap,
        norm_epsilon=1e-6,
    )
    for name in (*INPUTS, *UPDATED):
        setattr(call, name, address(name))
    return call


class Memory(Protocol):
    """An array between guards, somewhere."""

    address: int

    def read(self) -> tuple[np.ndarray, bool]:
        """The array now, and whether the guards are intact."""


class HostMemory:
    def __init__(self, array: np.ndarray) -> None:
        memory = np.full(array.nbytes + 2 * GUARD_BYTES + 256, GUARD, np.uint8)
        start = GUARD_BYTES + -(memory.ctypes.data + GUARD_BYTES) % 256
        self.array = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        self.array[...] = array
        self.address = self.array.ctypes.data
        self.guards = (memory[:start], memory[start + array.nbytes :])

    def read(self) -> tuple[np.ndarray, bool]:
        return self.array, all((guard == GUARD).all() for guard in self.guards)


def run_case(
    library: ctypes.CDLL, case: Case, memory: Callable[[np.ndarray], Memory], before: Arrays | None = None
) -> tuple[Arrays, Arrays]:
    """The arrays before and after a call."""
    before = before or make_arrays(case)
    sizes = make_call(case, lambda name: None)
    workspace_bytes = library.lora_drop_workspace_bytes(sizes, case.multiprocessors)
    workspace = np.full(workspace_bytes, 0xFF, np.uint8)
    held = {name: memory(array) for name, array in (before | {"workspace": workspace}).items() if array is not None}

    call = make_call(case, lambda name: held[name].address if name in held else None)
    assert library.lora_drop_attention_problem(call) is None
    assert library.lora_drop_attention(call, workspace_bytes, case.multiprocessors, None) == 0
    after: Arrays = {}
    for name, array in held.items():
        after[name], intact = array.read()
        assert intact, f"{name}: written outside"
        assert name in UPDATED or after[name].tobytes() == before[name].tobytes(), f"{name}: an input changed"
    return before, after


def check_rounding(library: ctypes.CDLL, dtype: str, memory: Callable[[np.ndarray], Memory]) -> None:
    """Values at, between and beside all numbers of a quantized cache, and past its ends: the exact bytes."""
    kind = NUMPY_DTYPES[dtype]
    numbers = np.arange(-128, 128, dtype=np.int8).view(kind).astype(np.float32)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(toward)) for toward in (-np.inf, np.inf)]
    ends = np.array([127.5, 128.5, 448, 463, 465, 480, 1e9, np.inf, 1e-9, 1e-40, -0.0], np.float32)
    values = np.concatenate([numbers, ties, *beside, ends, -ends])

    case = Case("rounding", lengths=(0,), new_tokens=-(-values.size // 64), heads=1, kv_heads=1, kv_dtype=dtype)
    arrays = make_arrays(case)
    arrays["value"] = np.resize(values, arrays["value"].shape)
    arrays["v_scale"] = np.ones(1, np.float32)
    _, after = run_case(library, case, memory, arrays)
    expected = quantize(arrays["value"][:, None], arrays["v_scale"], kind)
    assert after["value_cache"][:, :, : case.new_tokens].tobytes() == expected.tobytes()
