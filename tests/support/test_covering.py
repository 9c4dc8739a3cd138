"""Covering arrays have every pair that a rule allows, counted by going through all rows there could be."""

from __future__ import annotations

import itertools

import pytest

from tests.support import export_array
from tests.support.covering import covering_array, pairs_of


def all_rows(factors, allowed=lambda row: True):
    rows = (dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values()))
    return [row for row in rows if allowed(row)]


def possible_pairs(rows):
    return set().union(*map(pairs_of, rows))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [(2, 2), (3, 3, 3), (5, 4, 3, 2), (2,) * 8])
def test_every_pair_of_small_ones(sizes, seed):
    factors = {f"f{i}": tuple(range(size)) for i, size in enumerate(sizes)}
    rows = covering_array(factors, seed)
    assert set().union(*map(pairs_of, rows)) == possible_pairs(all_rows(factors))
    assert len(rows) <= 2 * sizes[0] * sizes[1]  # far fewer than all where there are many factors


def test_a_rule_that_looks_far():
    """`a` and `c` exclude each other through `b` alone; no row breaks the rule, no possible pair is left out."""
    factors = {"a": (0, 1), "b": (0, 1, 2), "c": (0, 1), "d": (0, 1, 2)}

    def allowed(row):
        if "a" in row and "b" in row and row["b"] != (row["a"] or row["b"]):
            return False
        return not ("b" in row and "c" in row and row["b"] == 1 and row["c"])

    rows = covering_array(factors, 1, ("a", "b", "c"), allowed)
    assert all(map(allowed, rows))
    possible = possible_pairs(all_rows(factors, allowed))
    assert frozenset({("a", 1), ("c", 1)}) not in possible
    assert set().union(*map(pairs_of, rows)) == possible


def test_models_of_the_export():
    rows = export_array.MODELS
    factors = export_array.MODEL_FACTORS
    assert set().union(*map(pairs_of, rows)) == possible_pairs(all_rows(factors))
    assert len(rows) == 10


def test_options_of_the_export():
    """Factors that the rule does not look at meet all; of the others every row that it allows is gone through.

    Each of the models is met.
    """
    factors, ruled = export_array.OPTION_FACTORS, export_array.RULED
    rows = export_array.rows()
    assert all(map(export_array.is_allowed, rows))
    options = all_rows({name: factors[name] for name in export_array.OPTIONS_RULED})
    every = (model | row for model in export_array.MODELS for row in options)
    ruled_rows = [row for row in every if export_array.is_allowed(row)]
    possible = possible_pairs(ruled_rows)
    for a, b in itertools.combinations(factors, 2):
        if not {a, b} <= set(ruled):
            possible |= {frozenset({(a, x), (b, y)}) for x in factors[a] for y in factors[b]}
    assert set().union(*map(pairs_of, rows)) == possible
    assert len(rows) < 40
    assert {index for row in rows for index in export_array.models_of(row)} == set(range(len(export_array.MODELS)))
    assert rows == tuple(export_array.rows.__wrapped__())
    for name in ruled:  # the rule takes no value out
        assert {row[name] for row in ruled_rows} == set(factors[name])


def test_the_rule_looks_at_no_other_factor():
    """Else pairs with such a factor could be impossible without its being seen."""
    row = export_array.rows()[0]
    free = [name for name in export_array.OPTION_FACTORS if name not in export_array.RULED]
    asked = set()

    class Watched(dict):
        def __getitem__(self, name):
            asked.add(name)
            return super().__getitem__(name)

        def __contains__(self, name):
            asked.add(name)
            return super().__contains__(name)

        def get(self, name, default=None):
            asked.add(name)
            return super().get(name, default)

    for other in export_array.rows():
        export_array.is_allowed(Watched(row | other))
    assert asked
    assert not asked & set(free)
