"""Covering arrays of strength 2: few rows in which every pair of values of two factors meets.

Enters: factors with their values, and a rule that says which rows are allowed. Leaves: rows. Knows no options.

A greedy search (AETG): a row begins with a pair that no row has yet, the other factors follow in random order, those of
the rule before the free ones, each with the value that meets most pairs anew.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
Factors = Mapping[str, Sequence[Any]]
Allowed = Callable[[Mapping[str, Any]], bool]
Pair = frozenset[tuple[str, Any]]  # two factors, a value each


def pairs_of(row: Mapping[str, Any]) -> set[Pair]:
    """All pairs of values that a row has."""
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


class _Search:
    """The values of all factors, numbered, and which pairs of them no row has yet."""

    def __init__(self, factors: Factors, allowed: Allowed, seed: int) -> None:
        self.factors, self.allowed, self.chance = factors, allowed, random.Random(seed)
        items = [(name, value) for name, values in factors.items() for value in values]
        self.numbers = {item: number for number, item in enumerate(items)}
        owners = np.array([list(factors).index(name) for name, _ in items])
        self.items, self.uncovered = items, owners[:, None] != owners[None, :]

    def cover(self, row: Row) -> None:
        numbers = [self.numbers[item] for item in row.items()]
        self.uncovered[np.ix_(numbers, numbers)] = False

    def completed(self, row: Row, left: Sequence[str]) -> Row | None:
        """`row` with values for the factors that are `left`, the gainful first; None where the rule allows none."""
        if not left:
            return row
        factor, *others = left
        numbers = [self.numbers[item] for item in row.items()]
        gains = {value: self.uncovered[self.numbers[factor, value], numbers].sum() for value in self.factors[factor]}
        for value in sorted(gains, key=lambda value: (-gains[value], self.chance.random())):
            longer = {**row, factor: value}
            if self.allowed(longer):
                found = self.completed(longer, others)
                if found is not None:
                    return found
        return None


def covering_array(
    factors: Factors, seed: int, ruled: Collection[str] = (), allowed: Allowed = lambda row: True
) -> list[Row]:
    """Rows that have every pair of values that some allowed row has.

    Args:
        factors: name → its values, all hashable.
        seed: of all that is left to chance; the same rows every time.
        ruled: the factors that the rule looks at.
        allowed: the rule: whether a row, or the part of one that is chosen so far, may be; what it says no to must not
            become right by growing.
    """
    search = _Search(factors, allowed, seed)
    rows: list[Row] = []
    while search.uncovered.any():
        a, b = search.chance.choice(np.argwhere(search.uncovered)).tolist()
        begun = dict([search.items[a], search.items[b]])
        left = [name for name in factors if name not in begun]
        search.chance.shuffle(left)
        left.sort(key=lambda name: name not in ruled)
        row = search.completed(begun, left) if allowed(begun) else None
        if row is None:  # no row has this pair
            search.uncovered[[a, b], [b, a]] = False
        else:
            rows.append({name: row[name] for name in factors})
            search.cover(row)
    return rows
