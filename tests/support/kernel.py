"""The attention kernel in tests: a naive reference in float64, and the cases of all test files.

Nothing here knows the kernel's algorithm: the reference follows the comment of skip_write_kv_attention.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from plugins.kernels.binding import DTYPE_CODES, INPUTS, UPDATED, LoraDropAttention

KERNELS = Path(__file__).parents[2] / "plugins" / "kernels"

NUMPY_DTYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f8": np.dtype(ml_dtypes.float8_e4m3fn),
    "i8": np.dtype(np.int8),
}


@dataclass(frozen=True)
class Case:
    """One call. `lengths` and `counts` per row; a count of None is a null pointer."""

    name: str
    lengths: tuple[int, ...] = (37, 0, 130)
    counts: tuple[int, ...] | None = None
    new_tokens: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    spare_slots: int = 7  # past the longest row
    rotary_dim: int | None = None  # None: head_dim
    interleaved: bool = False
    window: int = 0
    softcap: float = 0.0
    norm: bool = False
    dtype: str = "f32"
    kv_dtype: str | None = None  # None: dtype
    holes: int = 0  # positions run this far ahead of slots
    multiprocessors: int = 4
    seed: int = 0

    @property
    def cache_dtype(self) -> str:
        return self.kv_dtype or self.dtype

    @property
    def quantized(self) -> bool:
        return self.cache_dtype in ("f8", "i8")

    @property
    def appended(self) -> tuple[int, ...]:
        return self.counts if self.counts is not None else (self.new_tokens,) * len(self.lengths)

    @property
    def slots(self) -> int:
        return max(n + c for n, c in zip(self.lengths, self.appended, strict=True)) + self.spare_slots

    @property
    def rotated(self) -> int:
        return self.head_dim if self.rotary_dim is None else self.rotary_dim


CASES = [
    Case("one_token"),
    Case("count_is_null_and_all_rows_are_empty", lengths=(0, 0)),
    *(Case(f"head_dim_{d}", head_dim=d, new_tokens=2) for d in (8, 16, 32, 80, 96, 128, 256)),
    *(Case(f"new_tokens_{s}", new_tokens=s, lengths=(70, 0)) for s in (2, 4, 9, 16, 17, 40)),
    Case("mha", heads=3, kv_heads=3),
    Case("gqa_of_llama_3_8b", heads=32, kv_heads=8, head_dim=128, dtype="bf16", lengths=(90,)),
    Case("gqa_of_135m", heads=9, kv_heads=3, dtype="bf16"),
    Case("mqa_32", heads=32, kv_heads=1, head_dim=128, new_tokens=2, lengths=(100, 3)),
    Case("mqa_71", heads=71, kv_heads=1, lengths=(100,), dtype="bf16"),
    Case("mqa_71_of_4_tokens_in_tiles", heads=71, kv_heads=1, new_tokens=4, counts=(4, 2), lengths=(130, 5)),
    Case("gqa_16_of_9_tokens_of_256", heads=16, kv_heads=1, head_dim=256, new_tokens=9, lengths=(40,)),
    Case("counts", new_tokens=4, counts=(4, 0, 2), lengths=(37, 21, 0)),
    Case("counts_in_prefill", new_tokens=40, counts=(40, 0, 17, 1), lengths=(5, 9, 0, 70), dtype="f16"),
    Case("no_count_at_all", new_tokens=2, counts=(0, 0), lengths=(12, 0)),
    Case("holes", new_tokens=3, holes=23),
    Case("capacity", lengths=(40, 3), spare_slots=3000),
    Case("capacity_and_splits", lengths=(40, 700, 3), spare_slots=2000, multiprocessors=1000, dtype="f16"),
    Case("splits", lengths=(513, 0, 64), multiprocessors=500, new_tokens=2, counts=(2, 0, 2)),
    Case("splits_in_prefill", lengths=(300, 0), new_tokens=20, counts=(20, 0), multiprocessors=500),
    Case("split_slots_of_every_length", lengths=(1, 63, 64, 65, 127, 128, 129, 191), multiprocessors=64, kv_heads=1),
    Case("window", window=50, lengths=(37, 0, 130, 300)),
    Case("window_shorter_than_the_new_tokens", window=3, new_tokens=9, lengths=(37, 0, 2)),
    Case("window_in_prefill", window=20, new_tokens=40, lengths=(37, 0), counts=(40, 33)),
    Case("window_and_splits", window=200, lengths=(900, 10), new_tokens=4, multiprocessors=300),
    Case("softcap", softcap=3.0, new_tokens=2),
    Case("norm", norm=True, new_tokens=3, dtype="bf16"),
    Case("norm_in_prefill", norm=True, new_tokens=18, head_dim=96),
    Case("norm_without_rope", norm=True, rotary_dim=0),
    Case("no_rope", rotary_dim=0, new_tokens=2),
    Case("interleaved", interleaved=True, new_tokens=2),
    Case("partial_rotary", rotary_dim=16, new_tokens=2, dtype="f16"),
    Case("partial_rotary_interleaved", rotary_dim=20, interleaved=True, head_dim=80, new_tokens=17),
    Case("f16", dtype="f16", head_dim=128, new_tokens=4),
    Case("bf16", dtype="bf16", head_dim=256, heads=8, kv_heads=1, new_tokens=2),
    Case("f8_of_f32", kv_dtype="f8", new_tokens=3),
    Case("f8_of_bf16", dtype="bf16", kv_dtype="f8", head_dim=128, new_tokens=2, multiprocessors=64),
    Case("f8_of_f16_in_prefill", dtype="f16", kv_dtype="f8", new_tokens=33, lengths=(4,)),
    Case("i8_of_f32_in_prefill", kv_dtype="i8", new_tokens=33, lengths=(4, 70), counts=(33, 5)),
    Case("i8_of_f16", dtype="f16", kv_dtype="i8", head_dim=96, new_tokens=2),
    Case("i8_of_bf16", dtype="bf16", kv_dtype="i8", heads=9, kv_heads=3),
    Case("everything", dtype="bf16", kv_dtype="f8", heads=12, kv_heads=2, head_dim=128, rotary_dim=64, norm=True,
         softcap=20.0, window=150, new_tokens=5, counts=(5, 0, 3, 1), lengths=(400, 9, 0, 149), holes=11,
         multiprocessors=200),
]  # fmt: skip


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


# Of the output, by dtype: (absolute, relative, least cosine).
TOLERANCES = {
    # float32 sums of a few hundred terms, scores of a few units through exp2
    "f32": (2e-6, 2e-5, 1 - 1e-10),
    # the output is rounded once, by at most 2⁻¹¹ of itself
    "f16": (2e-5, 6e-4, 1 - 1e-6),
    # the same with 2⁻⁹
    "bf16": (2e-5, 4e-3, 1 - 1e-5),
}

Arrays = dict[str, np.ndarray | None]


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
    for name in ("key", "value"):
        cache = rng.normal(size=(batch, case.kv_heads, case.slots, case.head_dim)).astype(np.float32)
        cache = quantize(cache, arrays[f"{name[0]}_scale"], cache_dtype)
        for row, length in enumerate(case.lengths):
            cache[row, :, length:] = garbage
        arrays[f"{name}_cache"] = cache
    return arrays


def quantize(x: np.ndarray, scale: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """x: [B, G, …, D]. To nearest, ties to even; saturating with a scale [G]."""
    if scale is None:
        return x.astype(dtype)
    x = x / scale.astype(x.dtype).reshape(1, -1, *(1,) * (x.ndim - 2))
    if dtype == np.int8:
        return np.rint(np.clip(x, -128, 127)).astype(dtype)
    return np.clip(x, -448, 448).astype(dtype)


def appended(case: Case, arrays: Arrays) -> dict[str, np.ndarray]:
    """Both caches after the call."""
    batch, d = len(case.lengths), case.head_dim
    caches = {}
    for name in ("key", "value"):
        new = arrays[name].astype(np.float64).reshape(batch, case.new_tokens, -1, d)
        cache = arrays[f"{name}_cache"].copy()
        for b, (length, count) in enumerate(zip(case.lengths, case.appended, strict=True)):
            for s in range(count):
                heads = new[b, s]
                if name == "key":
                    heads = np.stack([prepared(case, arrays, head, "k_norm", b, s) for head in heads])
                cache[b, :, length + s] = quantize(heads[None], arrays[f"{name[0]}_scale"], cache.dtype)[0]
        caches[f"{name}_cache"] = cache
    return caches


def attention(case: Case, arrays: Arrays, caches: Arrays) -> np.ndarray:
    """Output in float64 from caches that hold the new tokens, one token and one head at a time."""
    batch, group = len(case.lengths), case.heads // case.kv_heads
    query = arrays["query"].astype(np.float64).reshape(batch, case.new_tokens, case.heads, case.head_dim)
    output = np.zeros_like(query)
    for b, (length, count) in enumerate(zip(case.lengths, case.appended, strict=True)):
        for s in range(count):
            first = max(0, length + s - case.window + 1) if case.window else 0
            for n in range(case.heads):
                g = n // group
                keys = caches["key_cache"][b, g, first : length + s + 1].astype(np.float64)
                values = caches["value_cache"][b, g, first : length + s + 1].astype(np.float64)
                if case.quantized:
                    keys, values = keys * float(arrays["k_scale"][g]), values * float(arrays["v_scale"][g])
                score = keys @ prepared(case, arrays, query[b, s, n], "q_norm", b, s) * score_scale(case)
                if case.softcap:
                    score = case.softcap * np.tanh(score / case.softcap)
                weight = np.exp(score - score.max())
                output[b, s, n] = weight @ values / weight.sum()
    return output.reshape(batch, case.new_tokens, -1)


def score_scale(case: Case) -> float:
    return float(np.float32(case.head_dim**-0.5))


def prepared(case: Case, arrays: Arrays, head: np.ndarray, norm: str, b: int, s: int) -> np.ndarray:
    """Norm and RoPE of one head, float64 [D]."""
    x = head.copy()
    if case.norm:
        x = x / np.sqrt(np.mean(x**2) + float(np.float32(1e-6))) * arrays[norm].astype(np.float64)
    half = case.rotated // 2
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if case.interleaved else (i, i + half)
        cos, sin = float(arrays["cos"][b, s, i]), float(arrays["sin"][b, s, i])
        x[first], x[second] = x[first] * cos - x[second] * sin, x[second] * cos + x[first] * sin
    return x


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


GUARD_BYTES = 4096
GUARD = 0xA5


class Memory(Protocol):
    """An array between guards, somewhere."""

    address: int

    def __init__(self, array: np.ndarray) -> None: ...
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
    library: ctypes.CDLL, case: Case, memory: type[Memory], before: Arrays | None = None
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


def check(case: Case, before: Arrays, after: Arrays) -> None:
    """Asserts that a call did what the reference does to `before`, and nothing else."""
    for name, expected in appended(case, before).items():
        cache, old = after[name], before[name]
        for row, (length, count) in enumerate(zip(case.lengths, case.appended, strict=True)):
            new = slice(length, length + count)
            untouched = np.ones(case.slots, bool)
            untouched[new] = False
            changed = cache[row][:, untouched].tobytes() != old[row][:, untouched].tobytes()
            assert not changed, f"{name}: another slot than the new ones changed"
            if name == "value_cache" and not case.quantized:
                assert cache[row, :, new].tobytes() == expected[row, :, new].tobytes()
            else:
                check_stored(case, cache[row, :, new], expected[row, :, new])

    # From what the kernel stored: a key rounded the other way near a tie is settled above
    output = attention(case, before, after)
    absolute, relative, least_cosine = TOLERANCES[case.dtype]
    got = after["output"].astype(np.float64)
    assert np.isfinite(got).all(), "not finite"
    for row, count in enumerate(case.appended):
        assert not got[row, count:].any(), "an output past the count is not zero"
    np.testing.assert_allclose(got, output, rtol=relative, atol=absolute)
    norms = np.linalg.norm(got) * np.linalg.norm(output)
    assert norms == 0 or np.vdot(got, output) / norms > least_cosine


def check_stored(case: Case, got: np.ndarray, expected: np.ndarray) -> None:
    """Equal, but for neighbours: float32 arithmetic may round another way than float64 near a tie."""
    if case.cache_dtype == "f32":
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)
        return
    if case.cache_dtype == "i8":
        steps = np.abs(got.astype(int) - expected.astype(int))
    else:
        steps = np.abs(ordinal(got) - ordinal(expected))
    assert steps.size == 0 or (steps.max() <= 1 and np.mean(steps > 0) < 0.01), "not the nearest value"


def check_rounding(library: ctypes.CDLL, dtype: str, memory: type[Memory]) -> None:
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


def ordinal(x: np.ndarray) -> np.ndarray:
    """Floats of up to 16 bits, counted: neighbours differ by one."""
    bits = x.view(f"i{x.dtype.itemsize}").astype(np.int64)
    sign = 1 << (8 * x.dtype.itemsize - 1)
    return np.where(bits < 0, -(bits + sign), bits)
