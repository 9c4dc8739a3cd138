"""Shares, paired differences and bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Sums = npt.NDArray[np.float64]
Z = 1.959964  # 95 %
RESAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval, over `count` items, windows or tasks."""

    value: float
    low: float
    high: float
    count: int


def share(hits: float, count: int) -> Figure:
    """Wilson's interval of a share."""
    value = hits / count
    centre = (value + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(value * (1 - value) / count + Z * Z / (4 * count * count))
    return Figure(value, max(0.0, centre - half), min(1.0, centre + half), count)


def paired_difference(values: Sequence[float], full: Sequence[float]) -> Figure:
    """The difference of two shares over the same items, with Agresti and Min's interval (½ added to each cell)."""
    count = len(values)
    better = sum(a > b for a, b in zip(values, full, strict=True))
    worse = sum(a < b for a, b in zip(values, full, strict=True))
    centre = (better - worse) / (count + 2)
    half = Z * math.sqrt(better + worse + 1 - (better - worse) ** 2 / (count + 2)) / (count + 2)
    return Figure((better - worse) / count, centre - half, centre + half, count)


def bootstrap(
    numerators: Sequence[float] | Sums,
    denominators: Sequence[float] | Sums,
    seed: int,
    transform: Callable[[Any], Any] = lambda value: value,
) -> Figure:
    """`transform` of a ratio of sums over items, with the percentile interval of resampled items."""
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    picks = np.random.default_rng(seed).integers(0, len(above), (RESAMPLES, len(above)))
    low, high = np.percentile(transform(above[picks].sum(axis=1) / below[picks].sum(axis=1)), [2.5, 97.5])
    return Figure(float(transform(above.sum() / below.sum())), float(low), float(high), len(above))


def _are_shares(values: Sequence[float]) -> bool:
    return all(value in (0, 1) for value in values)


def item_mean(values: Sequence[float], seed: int) -> Figure:
    """The mean of items' values: of hits and misses a share, of all else with the bootstrap's interval."""
    if _are_shares(values):
        return share(sum(values), len(values))
    return bootstrap(values, np.ones(len(values)), seed)


def item_difference(values: Sequence[float], full: Sequence[float], seed: int) -> Figure:
    """The paired difference of two means over the same items, by the same choice."""
    if _are_shares([*values, *full]):
        return paired_difference(values, full)
    return bootstrap(np.subtract(values, full), np.ones(len(values)), seed)


def average(figures: Sequence[Figure], weights: Sequence[float] | None = None) -> Figure:
    """The mean of independent figures, weighted or not; their intervals' halves stand for standard errors.

    Its count is that of the figures.
    """
    shares = np.ones(len(figures)) if weights is None else np.asarray(weights, np.float64)
    shares = shares / shares.sum()
    value = float(sum(one * figure.value for one, figure in zip(shares, figures, strict=True)))
    squares = ((one * (figure.high - figure.low) / 2) ** 2 for one, figure in zip(shares, figures, strict=True))
    half = math.sqrt(sum(squares))
    return Figure(value, value - half, value + half, len(figures))
