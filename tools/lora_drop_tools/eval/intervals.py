"""Shares, paired differences with their test, and bootstrap intervals."""

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


@dataclass(frozen=True)
class McNemar:
    """Items that one of two schedules gets right and the other does not.

    Attributes:
        won, lost: the schedule alone is right, and the full schedule alone.
        p_value: two-sided, exact: of so many items the chance that they fall out as unevenly without a difference.
    """

    won: int
    lost: int
    p_value: float


def share(hits: float, count: int) -> Figure:
    """Wilson's interval of a share."""
    value = hits / count
    centre = (value + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(value * (1 - value) / count + Z * Z / (4 * count * count))
    return Figure(value, max(0.0, centre - half), min(1.0, centre + half), count)


def _discordant(values: Sequence[float], full: Sequence[float]) -> tuple[int, int]:
    """How many items are better than under the full schedule, and how many are worse."""
    pairs = list(zip(values, full, strict=True))
    return sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)


def paired_difference(values: Sequence[float], full: Sequence[float]) -> Figure:
    """The difference of two shares over the same items, with Agresti and Min's interval (½ added to each cell), of
    which no part is beyond ±1.
    """
    count = len(values)
    better, worse = _discordant(values, full)
    centre = (better - worse) / (count + 2)
    half = Z * math.sqrt(better + worse + 1 - (better - worse) ** 2 / (count + 2)) / (count + 2)
    return Figure((better - worse) / count, max(-1.0, centre - half), min(1.0, centre + half), count)


def mcnemar(won: int, lost: int) -> McNemar:
    """McNemar's test (1947) in its exact form.

    Without a difference `lost` is binomial with won + lost draws of ½, so p = 2 · P(X ≤ min(won, lost)), at most 1.
    """
    draws, ways, total = won + lost, 1, 0
    for drawn in range(min(won, lost) + 1):
        total += ways
        ways = ways * (draws - drawn) // (drawn + 1)  # of choosing one more
    return McNemar(won, lost, min(1.0, 2 * total / 2**draws))


def bootstrap(
    numerators: Sequence[float] | Sums,
    denominators: Sequence[float] | Sums,
    seed: int,
    transform: Callable[[Any], Any] = lambda value: value,
) -> Figure:
    """`transform` of a ratio of sums over items, with the percentile interval of resampled items.

    Some denominator is above 0. Resamples of none but items whose denominator is 0 say nothing, and are left out.
    """
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    picks = np.random.default_rng(seed).integers(0, len(above), (RESAMPLES, len(above)))
    sums, counts = above[picks].sum(axis=1), below[picks].sum(axis=1)
    low, high = np.percentile(transform(sums[counts > 0] / counts[counts > 0]), [2.5, 97.5])
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


def item_test(values: Sequence[float], full: Sequence[float]) -> McNemar | None:
    """McNemar's test of hits and misses over the same items; None where values lie between."""
    return mcnemar(*_discordant(values, full)) if _are_shares([*values, *full]) else None


def average(figures: Sequence[Figure], weights: Sequence[float] | None = None) -> Figure:
    """The mean of independent figures, weighted or not, with Zou and Donner's interval: each end lies as far from the
    mean as the figures' own do together. So that of one figure is its own, and that of shares is within 0 and 1.

    Its count is that of the figures.
    """
    shares = np.ones(len(figures)) if weights is None else np.asarray(weights, np.float64)
    shares = shares / shares.sum()
    value, low, high = (np.array([getattr(one, name) for one in figures]) for name in ("value", "low", "high"))
    mean = float(shares @ value)
    below, above = (float(np.linalg.norm(shares * (value - end))) for end in (low, high))
    return Figure(mean, mean - below, mean + above, len(figures))
