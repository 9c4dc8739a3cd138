"""A naive reference of the attention kernel in float64, and the comparison with it.

Enter: a case and its arrays before and after a call. Leaves: an assertion. Nothing here knows the kernel's algorithm:
the reference follows the comment of skip_write_kv_attention.h.
"""

from __future__ import annotations

import numpy as np

from tests.support.kernel_cases import Case

Arrays = dict[str, np.ndarray | None]

# Of the output, by dtype: (absolute, relative, least cosine).
TOLERANCES = {
    # float32 sums of a few hundred terms, scores of a few units through exp2
    "f32": (2e-6, 2e-5, 1 - 1e-10),
    # the output is rounded once, by at most 2⁻¹¹ of itself
    "f16": (2e-5, 6e-4, 1 - 1e-6),
    # the same with 2⁻⁹
    "bf16": (2e-5, 4e-3, 1 - 1e-5),
}


# Of a weight that is rounded for a tensor core, by dtype: the largest relative error, and half as much again for an
# element of the query that float32 arithmetic rounds another way than float64 near a tie.
WEIGHT_ROUNDING = {"f16": 1.5 * 2.0**-11, "bf16": 1.5 * 2.0**-9}


def on_tensor_cores(case: Case) -> bool:
    return case.dtype != "f32" and (case.new_tokens > 1 or case.heads // case.kv_heads >= 8)


def quantize(x: np.ndarray, scale: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """x: [B, G, …, D]. To nearest, ties to even; saturating with a scale [G]."""
    if scale is None:
        return x.astype(dtype)
    x = x / scale.astype(x.dtype).reshape(1, -1, *(1,) * (x.ndim - 2))
    if dtype == np.int8:
        return np.rint(np.clip(x, -128, 127)).astype(dtype)
    return np.clip(x, -448, 448).astype(dtype)


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


def attention(case: Case, arrays: Arrays, caches: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Output in float64 from caches that hold the new tokens, one token and one head at a time.

    With it the same sum over the absolute values: what the relative errors of the weights amount to at most.
    """
    batch, group = len(case.lengths), case.heads // case.kv_heads
    query = arrays["query"].astype(np.float64).reshape(batch, case.new_tokens, case.heads, case.head_dim)
    output, absolute = np.zeros_like(query), np.zeros_like(query)
    for b, (length, count) in enumerate(zip(case.lengths, case.appended, strict=True)):
        for s in range(count):
            first = max(0, length + s - case.window + 1) if case.window else 0
            for n in range(case.heads):
                g = n // group
                keys = caches["key_cache"][b, g, first : length + s + 1].astype(np.float64)
                values = caches["value_cache"][b, g, first : length + s + 1].astype(np.float64)
                if case.quantized:
                    keys, values = keys * float(arrays["k_scale"][g]), values * float(arrays["v_scale"][g])
                head = prepared(case, arrays, query[b, s, n], "q_norm", b, s)
                if on_tensor_cores(case):
                    head = head.astype(arrays["query"].dtype).astype(np.float64)
                score = keys @ head * score_scale(case)
                if case.softcap:
                    score = case.softcap * np.tanh(score / case.softcap)
                sink = [] if arrays["sinks"] is None else [float(arrays["sinks"][n])]
                weight = np.exp(np.concatenate([score, sink]) - score.max())
                total, weight = weight.sum(), weight[: len(score)]
                output[b, s, n] = weight @ values / total
                absolute[b, s, n] = weight @ np.abs(values) / total
    shape = (batch, case.new_tokens, -1)
    return output.reshape(shape), absolute.reshape(shape)


def ordinal(x: np.ndarray) -> np.ndarray:
    """Floats of up to 16 bits, counted: neighbours differ by one."""
    bits = x.view(f"i{x.dtype.itemsize}").astype(np.int64)
    sign = 1 << (8 * x.dtype.itemsize - 1)
    return np.where(bits < 0, -(bits + sign), bits)


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
    output, spread = attention(case, before, after)
    absolute, relative, least_cosine = TOLERANCES[case.dtype]
    rounding = WEIGHT_ROUNDING[case.dtype] * spread if on_tensor_cores(case) else 0.0
    got = after["output"].astype(np.float64)
    assert np.isfinite(got).all(), "not finite"
    for row, count in enumerate(case.appended):
        assert not got[row, count:].any(), "an output past the count is not zero"
    too_far = np.abs(got - output) > absolute + relative * np.abs(output) + rounding
    assert not too_far.any(), f"{np.mean(too_far):.1%} too far, by up to {np.abs(got - output)[too_far].max():.1e}"
    norms = np.linalg.norm(got) * np.linalg.norm(output)
    assert norms == 0 or np.vdot(got, output) / norms > least_cosine
