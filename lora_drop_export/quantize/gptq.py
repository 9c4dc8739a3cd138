"""Calibrated rounding: a linear layer's weights → integers, scales and zero points, by what its inputs were.

Enters: float32 rows and the second moments of the layer's inputs. Leaves: blocks as `rounding` makes them. Knows no
model and no text.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds one column after the other and lets the columns that follow make up
for the error so far. Its updates by the inverse Hessian are those of Babai's nearest plane (Chen et al. 2025, arXiv
2507.18553): with H = R Rᵀ and R upper triangular the loss of W − Q is ‖(W − Q) R‖², and column c of (W − Q) R depends
on no later column. So one factorization is enough, nothing is inverted, and R_cc² weighs the error of column c.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .formats import Blocked, BlockFormat, Floats
from .rounding import searched

DAMPING = 0.1  # of the mean of H's diagonal, added to it; the paper has 0.01, for ten times as many inputs and more
TIED_DAMPING = 1.0  # of a head whose rows are looked up, too: they stay closer to what they are
_COLUMNS = 128  # whose errors go on to all that follow in one product; every block size but a whole row divides it
_ROWS = 4096  # at once: their columns fit into the caches


def triangle(moments: Floats, damping: float = DAMPING) -> tuple[Any, Any] | None:
    """The factor of H = R Rᵀ after damping, as `gptq_rows` wants it.

    Args:
        moments: H float32 [K, K], the sum of x xᵀ over inputs x [K], at any scale.
        damping: as `DAMPING`; ten times as much, and more, where H has no factor.

    Returns:
        float32 tensors: R with each column divided by its diagonal element, [K, K], and the diagonal, [K]. None where H
        has values that are infinite or not a number.
    """
    import torch

    h = torch.from_numpy(moments).to(torch.float64)
    if not torch.isfinite(h).all():
        return None
    diagonal = h.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean  # an input that is always zero: its weights are rounded to the nearest
    while True:
        diagonal += damping * mean
        factor, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        if not failed:
            break
        damping *= 10
    factor = factor.flip(0, 1)
    own = factor.diagonal().clone()
    return (factor / own).to(torch.float32), own.to(torch.float32)


def correction(unit: Any, own: Any, missing: Floats, rows: Floats | None = None) -> Floats | None:
    """What takes weights to those that make of a layer's inputs what they make of its inputs without rounding.

    After GPTAQ (Li et al. 2025, arXiv 2504.02692), as ridge regression: W + W D H⁻¹ has the least ‖W' x − W (x + e)‖²
    over inputs x that lack e, with the damping times ‖W' − W‖² added.

    Args:
        unit, own: the layer's `triangle`.
        missing: Dᵀ float32 [K, K], the sum of x eᵀ at the scale of H.
        rows: W float32 [n, K], where only its own change is wanted: with few rows that costs n / K as much.

    Returns:
        D H⁻¹ float32 [K, K], or W D H⁻¹ [n, K]; None where `missing` has values that are infinite or not a number.
    """
    import torch

    wanted, factor = torch.from_numpy(missing).to(torch.float64), (unit * own).to(torch.float64)
    if not torch.isfinite(wanted).all():
        return None
    if rows is not None:
        wanted = wanted @ torch.from_numpy(rows).to(torch.float64).T
    change = torch.cholesky_solve(wanted.flip(0), factor.flip(0, 1)).flip(0)  # H⁻¹ Dᵀ, of the flipped H = L Lᵀ
    found: Floats = change.T.to(torch.float32).numpy()
    return found


def share_that_holds(change: Floats, moments: Floats, missing: Floats, rows: Floats | None = None) -> float:
    """The α between 0 and 1 of the least ‖α C x − e‖² over inputs x that lack e and that C was not found on; with
    rows W of the least ‖α C x − W e‖².

    A correction is fitted to errors, and errors that come of single tokens or of one kind of text do not come again:
    what there is of them in C is added to the errors of other inputs.

    Args:
        change: C, a `correction` that was found on other inputs, [K, K], or of `rows` [n, K].
        moments, missing: of these inputs, as `triangle` and `correction` want them.
        rows: W, as `correction` had them.
    """
    wanted = missing.T if rows is None else rows @ missing.T
    held, norm = float((change * wanted).sum()), float(((change @ moments) * change).sum())
    return min(1.0, max(0.0, held / norm)) if norm > 0 else 0.0


def corrected(rows: Floats, change: Floats | None) -> Floats:
    """W + W C of weights W float32 [n, K] and their layer's `correction` C [K, K]; `rows` where there is none."""
    return rows if change is None else rows + rows @ change


def _columns(rows: Any, unit: Any, own: Any, form: BlockFormat) -> Blocked:
    """`gptq_rows` of a few rows; works on columns, which lie together."""
    import torch

    columns = rows.T.contiguous()  # [K, n]
    k, n = columns.shape
    size = form.block_size
    q = np.empty((k, n), np.uint8)
    scales, zero_points = np.empty((k // size, n), np.float32), np.empty((k // size, n), np.uint8)
    if size == k:  # a whole row: nothing is carried when it begins
        _, scales[0], zero_points[0] = searched(columns.numpy(), form, own.square().numpy()[:, None])
    errors = torch.zeros_like(columns)  # W − Q
    for begin in range(0, k, _COLUMNS):
        end = min(k, begin + _COLUMNS)
        carried = unit[:begin, begin:end].T @ errors[:begin]  # what the columns so far ask of these, [≤ 128, n]
        for first in range(begin, end, size):
            last = min(first + size, end)
            inner = unit[first:last, first:last]
            carry = carried[first - begin : last - begin]
            if size < k:
                now = columns[first:last]
                now = now + torch.linalg.solve_triangular(inner.T, carry, upper=False, unitriangular=True)
                found = searched(now.numpy(), form, own[first:last].square().numpy()[:, None])
                _, scales[first // size], zero_points[first // size] = found
            scale, zero = scales[first // size], zero_points[first // size]
            step, middle = torch.from_numpy(scale), torch.from_numpy(zero.astype(np.float32))
            inverse = torch.where(step == 0, 0, 1 / step)
            for i in range(last - first):
                wanted = columns[first + i] + carry[i]
                level = torch.round(wanted * inverse).add_(middle).clamp_(0, 2**form.bits - 1)
                q[first + i] = level.numpy()
                errors[first + i] = columns[first + i] - (level - middle) * step
                carry[i + 1 :].addr_(inner[i, i + 1 :], errors[first + i])
            carried[last - begin :] += unit[first:last, last:end].T @ errors[first:last]
    return q.T, scales.T, zero_points.T


def gptq_rows(rows: Floats, unit: Any, own: Any, form: BlockFormat) -> Blocked:
    """Quantize float32 [n, K] by a layer's `triangle`; the layer's scales are searched when their block is reached.

    Returns:
        q uint8 [n, K], scales float32 and zero points uint8 [n, K / block_size].
    """
    import torch

    with torch.no_grad():
        parts = [_columns(torch.from_numpy(rows[i : i + _ROWS]), unit, own, form) for i in range(0, len(rows), _ROWS)]
    q, scales, zero_points = (np.ascontiguousarray(np.concatenate(part)) for part in zip(*parts, strict=True))
    return q, scales, zero_points
