"""float32 rows → integers, or E4M3, with scales and zero points, a few rows at a time.

rtn       the scale spans each block's range, values are rounded to the nearest
search    the scale that has the least weighted squared error among many, solved again for the integers it gives

E4M3 has one method: the scale of a row takes its largest magnitude to 448, values are rounded to the nearest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from lora_drop_runtime.dtypes import CACHE_DTYPES
from lora_drop_runtime.errors import InputError

from .formats import FLOAT8, Blocked, BlockFormat, Floats

_PIECE_VALUES = 1 << 17  # of one thread: what a core's cache holds
_LEAST = 1e-36  # of a block's range: steps of less than that have no reciprocal in float32, and are 0 in any product
_STEPS = np.arange(-1.0, 1.01, 0.1, dtype=np.float32)  # levels by which a block's range is widened or clipped


def _range(x: Floats, form: BlockFormat) -> tuple[Floats, Floats]:
    """Per block, [b]: the steps per unit that make the range fit, and its lower end.

    Symmetric integers reach one further down than up, so the value of largest magnitude goes to the lower end.
    """
    if form.symmetric:
        largest = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
        steps = np.divide(-form.middle, largest, out=np.zeros_like(largest), where=np.abs(largest) > _LEAST)
        return steps, np.zeros_like(largest)
    low = np.minimum(x.min(0), 0)
    span = np.maximum(x.max(0), 0) - low
    return np.divide(2**form.bits - 1, span, out=np.zeros_like(span), where=span > _LEAST), low


def _zero(steps: Floats, low: Floats, form: BlockFormat) -> Floats:
    """The zero points, [b], as float32."""
    if form.symmetric:
        return np.full_like(steps, form.middle)
    zero: Floats = np.clip(np.rint(-low * steps), 0, 2**form.bits - 1)
    return zero


def _round(x: Floats, zero: Floats, form: BlockFormat, out: Floats) -> None:
    """Values in steps [block_size, b] → integers q − zero_point, as float32."""
    np.rint(x, out=out)
    np.maximum(out, -zero, out=out)
    np.minimum(out, 2**form.bits - 1 - zero, out=out)


def searched(x: Floats, form: BlockFormat, weights: Floats) -> Blocked:
    """The scales of the least weighted squared error.

    With integers q and rests r, in steps per unit t: x = (q + r) / t. The least-squares scale is Σwxq / Σwq², with
    which Σw(x − sq)² = (Σwr² − (Σwqr)² / Σwq²) / t²: no small difference of large sums.

    Args:
        x: float32 [block_size, b]: a block is a column, so that what is done to all of them runs along the memory.
        weights: of each value's squared error, [block_size, b] or [block_size, 1].

    Returns:
        Integers uint8 [block_size, b], scales [b] and zero points [b].
    """
    fit, low = _range(x, form)
    levels = form.middle if form.symmetric else 2**form.bits - 1
    best_error = np.full_like(fit, np.inf)
    best_steps, best_scale, best_zero = np.zeros_like(fit), np.zeros_like(fit), _zero(fit, low, form)
    rest, q, weighted, terms = (np.empty_like(x) for _ in range(4))
    for step in _STEPS:
        steps = fit * (1 + step / levels)
        zero = _zero(steps, low, form)
        np.multiply(x, steps, out=rest)
        _round(rest, zero, form, q)
        rest -= q
        np.multiply(weights, q, out=weighted)
        norm = np.multiply(weighted, q, out=terms).sum(0)
        lean = np.multiply(weighted, rest, out=terms).sum(0)
        np.multiply(rest, rest, out=terms)
        error = np.multiply(terms, weights, out=terms).sum(0)
        held = norm > 0
        lean = np.divide(lean, norm, out=np.zeros_like(norm), where=held)
        error -= lean * lean * norm
        error = np.divide(error, steps * steps, out=np.full_like(error, np.inf), where=held)
        scale = np.divide(1 + lean, steps, out=np.zeros_like(norm), where=held)
        better = error < best_error
        for best, new in ((best_error, error), (best_steps, steps), (best_scale, scale), (best_zero, zero)):
            np.copyto(best, new, where=better)
    np.multiply(x, best_steps, out=rest)
    _round(rest, best_zero, form, q)
    q += best_zero
    return q.astype(np.uint8), best_scale, best_zero.astype(np.uint8)


def _search(x: Floats, form: BlockFormat) -> Blocked:
    exponents = np.frexp(np.abs(x).max(0))[1]
    x = np.ldexp(x, -exponents)  # exact; the third powers below leave float32 with what is beyond 1e13 or 1e-13
    weights = np.abs(x)
    weights += np.sqrt(np.mean(x * x, axis=0))  # large values matter more, none is nothing
    q, scales, zero_points = searched(x, form, weights)
    return q, np.ldexp(scales, exponents), zero_points


def _rtn(x: Floats, form: BlockFormat) -> Blocked:
    steps, low = _range(x, form)
    zero, q = _zero(steps, low, form), x * steps
    _round(q, zero, form, q)
    q += zero
    scales = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
    return q.astype(np.uint8), scales, zero.astype(np.uint8)


@dataclass(frozen=True)
class Rounding:
    """A method of finding integers and scales.

    Attributes:
        blocks: float32 [block_size, b] → integers uint8 [block_size, b], scales [b] and zero points [b].
        zero_points: whether 4-bit blocks get a zero point of their own where the format has room for it.
    """

    blocks: Callable[[Floats, BlockFormat], Blocked]
    zero_points: bool


ROUNDINGS = {"search": Rounding(_search, zero_points=True), "rtn": Rounding(_rtn, zero_points=False)}


def quantize_rows(rows: Floats, form: BlockFormat, method: str) -> Blocked:
    """Quantize float32 [n, K]; returns q uint8 [n, K], scales float32 and zero points uint8 [n, K / block_size]."""
    n, k = rows.shape
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, form.block_size)
    quantize = ROUNDINGS[method].blocks
    step = max(1, _PIECE_VALUES // form.block_size)
    pieces = [blocks[begin : begin + step] for begin in range(0, len(blocks), step)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda piece: quantize(np.ascontiguousarray(piece.T), form), pieces))
    q = np.concatenate([part[0].T for part in results])
    scales, zero_points = (np.concatenate([part[i] for part in results]) for i in (1, 2))
    return q.reshape(n, k), scales.reshape(n, -1), zero_points.reshape(n, -1)


def round_to_float8(rows: Floats, scale_dtype: str) -> Blocked:
    """Round float32 [n, K] to E4M3; returns its bits uint8 [n, K], scales float32 [n, 1], and zero points [n, 1] of 0.

    A scale is the least value of `scale_dtype` that takes the row's largest magnitude to 448 or less, so that what is
    rounded is what is read, also where the scale is a subnormal float16. That of a row of zeros is 1.
    """
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if scale_dtype == "bfloat16" else scale_dtype)
    needed = np.abs(rows).max(axis=1, keepdims=True, initial=0) / np.float32(CACHE_DTYPES[FLOAT8][1])
    needed[needed == 0] = 1
    with np.errstate(over="ignore"):
        scales = needed.astype(kind)
        scales = np.where(scales.astype(np.float32) < needed, np.nextafter(scales, kind.type(np.inf)), scales)
    scales = scales.astype(np.float32)
    scales = np.where(np.isfinite(scales), scales, needed)  # which are refused where they are stored
    bits = (rows / scales).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)  # to nearest, ties to even
    return bits, scales, np.zeros(scales.shape, np.uint8)


def has_native(source: Any, form: BlockFormat) -> bool:
    """Whether a tensor has integers already, in blocks of this size; they are taken as they are."""
    native = getattr(source, "native", None)
    return native is not None and replace(native, symmetric=form.symmetric) == form


def finite(rows: Floats, name: str) -> Floats:
    """Rows of the weight `name`.

    Raises:
        InputError: a value is infinite or not a number.
    """
    if not np.isfinite(rows).all():
        raise InputError(
            "A weight cannot be quantized.",
            note=f"{name} has values that are infinite or not a number.",
            hint="The checkpoint is damaged, or needs --dtype fp32.",
        )
    return rows


def quantized_blocks(
    source: Any, form: BlockFormat, method: str, chunk_rows: int, scale_dtype: str = "float32"
) -> Iterable[Blocked]:
    """A tensor's integers, scales and zero points, `chunk_rows` rows at a time.

    Integers that the checkpoint holds in blocks of the same size are taken as they are.

    Args:
        source: what has `rows`, and `native_rows` where it has integers of its own.
        method: a row of `ROUNDINGS`, which E4M3 does not ask for.
        scale_dtype: that scales will be stored in.

    Raises:
        InputError: a value is infinite or not a number.
    """
    taken = has_native(source, form)
    for begin in range(0, source.shape[0], chunk_rows):
        if taken:
            q, scales, zero_points = source.native_rows(begin, begin + chunk_rows)
            yield q, finite(scales, source.name), zero_points
            continue
        # A copy: of a mapped file that is cut while these are rounded, the system ends the process (SIGBUS)
        rows = finite(np.array(source.rows(begin, begin + chunk_rows), np.float32), source.name)
        yield round_to_float8(rows, scale_dtype) if form.floating else quantize_rows(rows, form, method)
