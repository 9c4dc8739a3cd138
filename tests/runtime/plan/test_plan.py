"""The drop list and the schedule against examples worked out by hand from docs/algorithm.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from lora_drop_runtime.errors import InputError, PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan, eligible_layers, spread_layers
from lora_drop_runtime.plan.schedule import PeriodicSchedule, StepKind

WINDOWS = (0, 1, 2, 3, 5, 19)
PLAN = DropPlan(num_layers=8, sites=(3, 5))


def assert_refused(call: Callable[[], object], fact: str, *note: str, error: type[InputError] = PlanError) -> None:
    """The call raises the error, with a fact, a note that has the values, and a hint."""
    with pytest.raises(error) as caught:
        call()
    assert fact in caught.value.fact
    for value in note:
        assert value in caught.value.note
    assert caught.value.hint


# ── eligible layers ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((32,), list(range(3, 31))),  # a = 4: all but the first 3 and the last 1
        ((30,), list(range(3, 29))),
        ((5,), [3]),
        ((4,), []),
        ((2,), []),
        ((6, 0, 0), [0, 1, 2, 3, 4, 5]),
        ((6, 2, 3), [2]),
        ((6, 3, 3), []),
        ((6, 9, 9), []),
        ((10, 3, 1, (0, 2, 4, 6, 8)), [3, 5, 7]),  # windowed layers cannot have holes
        ((10, 3, 1, range(10)), []),
    ],
)
def test_eligible_layers(arguments: tuple, expected: list[int]) -> None:
    assert list(eligible_layers(*arguments)) == expected


@pytest.mark.parametrize(("first", "last"), [(-1, 1), (3, -2)])
def test_eligible_layers_refuse(first: int, last: int) -> None:
    assert_refused(lambda: eligible_layers(8, first, last), "cannot be negative", str(first), str(last))


# ── spreading ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_spread_over_32_layers() -> None:
    """docs/algorithm.md's example: 28 eligible layers, m = 14, every second one, ρ_eff = 0.4375."""
    layers = spread_layers(eligible_layers(32), 0.5)
    assert layers == (4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
    plan = DropPlan(num_layers=32, sites=layers)
    assert plan.rho == 0.5
    assert plan.rho_eff == 0.4375
    assert len(plan.kept_attentions) == 18


def test_spread_over_30_layers() -> None:
    """26 eligible layers 3 … 28: ρ = 0.25 gives m = floor(6.5 + 0.5) = 7, at floor((j + 0.5) · 26 / 7) = 1, 5, 9, …"""
    assert spread_layers(eligible_layers(30), 0.5) == (4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28)
    assert spread_layers(eligible_layers(30), 0.25) == (4, 8, 12, 16, 19, 23, 27)
    # m = floor(19.5 + 0.5) = 20, a step of 1.3 from 0.65: 0 1 3 4 5 7 8 9 11 12 13 14 16 17 18 20 21 22 24 25
    expected = (0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14, 16, 17, 18, 20, 21, 22, 24, 25)
    assert spread_layers(eligible_layers(30), 0.75) == tuple(3 + place for place in expected)


def test_spread_skips_windowed_layers() -> None:
    """Gemma-2 style: 3, 5, 7 are eligible; ρ = 0.5 gives m = 2 at places floor(0.75) = 0 and floor(2.25) = 2."""
    assert spread_layers(eligible_layers(10, windowed=(0, 2, 4, 6, 8)), 0.5) == (3, 7)


@pytest.mark.parametrize(
    ("eligible", "ratio", "count"),
    [
        (28, 0.0, 0),
        (28, 0.017, 0),  # 0.476 + 0.5
        (28, 0.018, 1),  # 0.504 + 0.5
        (4, 0.375, 2),  # exactly a half rounds up
        (4, 0.625, 3),  # also to an odd number: not Python's round
        (2, 0.25, 1),
        (1, 0.49, 0),
        (1, 0.5, 1),
        (28, 0.25, 7),
        (28, 0.75, 21),
        (28, 1.0, 28),
        (0, 0.5, 0),
        (0, 1.0, 0),
    ],
)
def test_number_of_dropped_layers(eligible: int, ratio: float, count: int) -> None:
    """m = floor(ρ · (n − a) + 0.5)."""
    layers = spread_layers(range(eligible), ratio)
    assert len(layers) == count
    assert len(set(layers)) == count
    assert list(layers) == sorted(layers)
    assert set(layers) <= set(range(eligible))


def test_ratio_1_drops_every_eligible_layer() -> None:
    assert spread_layers(eligible_layers(32), 1) == tuple(range(3, 31))


@pytest.mark.parametrize("ratio", [-0.01, 1.01, float("nan"), float("inf")])
def test_spread_refuses(ratio: float) -> None:
    assert_refused(lambda: spread_layers(range(28), ratio), "--drop-ratio is ", str(ratio))


# ── the schedule ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("k", "expected"), [(0, "RRRRRRRR"), (1, "LRLRLRLR"), (2, "LLRLLRLL"), (3, "LLLRLLLR"), (5, "LLLLLRLL")]
)
def test_periodic_schedule(k: int, expected: str) -> None:
    """Decode step j is a refresh iff j mod (k+1) == 0."""
    kinds = [PeriodicSchedule(k).kind(step) for step in range(1, 9)]
    assert kinds == [{"R": StepKind.REFRESH, "L": StepKind.LORA}[letter] for letter in expected]


@pytest.mark.parametrize("k", [-1, 1.0, 1.5, "3", None])
def test_schedule_refuses(k: object) -> None:
    fact = "k is too small" if k == -1 else "k must be a whole number"
    assert_refused(lambda: PeriodicSchedule(k), fact, str(k), "0")


# ── the plan ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_drop_list_is_sorted_and_splits_the_layers() -> None:
    plan = DropPlan(num_layers=8, sites=(5, 3))
    assert plan == PLAN
    assert plan.sites == ("3", "5")
    assert plan.dropped_layers == plan.dropped_attentions == plan.dropped_mlps == (3, 5)
    assert plan.kept_attentions == (0, 1, 2, 4, 6, 7)
    assert plan.eligible_layers == (3, 4, 5, 6)
    assert plan.rho == 0.5
    assert plan.rho_eff == 0.25
    assert (plan.k, plan.surrogate, plan.rank, plan.policy) == (3, "residual", 0, "skip")


def test_a_plan_may_drop_nothing() -> None:
    plan = DropPlan(num_layers=3, sites=())
    assert plan.eligible_layers == ()
    assert plan.kept_attentions == (0, 1, 2)
    assert (plan.rho, plan.rho_eff) == (0.0, 0.0)
    assert plan.sites == ()


@pytest.mark.parametrize(
    ("surrogate", "rank", "has_state", "updates_state"),
    [
        ("residual", 0, False, False),
        ("residual", 4, False, False),
        ("anchor", 0, True, False),
        ("anchor", 4, True, False),
        ("recurrent", 0, True, False),  # y of the anchor, again and again
        ("recurrent", 4, True, True),
        ("residual-delta", 0, False, False),  # nothing reads a change
        ("residual-delta", 4, True, False),
    ],
)
def test_state(surrogate: str, rank: int, has_state: bool, updates_state: bool) -> None:
    plan = dataclasses.replace(PLAN, surrogate=surrogate, rank=rank)
    assert (plan.has_state, plan.updated_states) == (has_state, PLAN.sites if updates_state else ())


def test_sites() -> None:
    assert PLAN.sites == ("3", "5")


@pytest.mark.parametrize(
    ("sites", "changes", "runs"),
    [
        ((3, 5), {}, ["3", "5"]),
        ((3, 4, 5), {}, ["3 4 5"]),
        ((3, "4.attn", 5), {}, ["3 4.attn", "5"]),
        ((3, "4.mlp", "5.attn", "5.mlp", "6.attn"), {}, ["3", "4.mlp 5.attn 5.mlp 6.attn"]),
        ((3, 4, 5, 6), {"bare_sites": ("4",)}, ["3 5 6"]),
        ((3, 4, 5, 6), {"bare_sites": ("3", "6")}, ["4 5"]),
        ((3, 4, 5), {"surrogate": "recurrent"}, ["3", "4", "5"]),
        ((3, 4, 5), {"surrogate": "anchor"}, ["3", "4", "5"]),
        ((3, 4, 6), {"surrogate": "residual-delta"}, ["3 4", "6"]),
        ((3, 4, 5), {"policy": "backfill"}, ["3 4 5"]),
        ((3, "4.mlp", "5.attn", "5.mlp", 6), {"policy": "fill"}, ["3", "4.mlp", "5.attn 5.mlp", "6"]),
        (("3.mlp", "4.attn", "4.mlp"), {"policy": "fill", "bare_sites": ("4.attn",)}, ["3.mlp", "4.mlp"]),
        ((3, 4), {"rank": 0}, []),
    ],
    ids=str,
)
def test_surrogates_with_nothing_between_them(sites: tuple, changes: dict, runs: list[str]) -> None:
    plan = DropPlan(**{"num_layers": 8, "sites": sites, "rank": 2, **changes})
    assert [" ".join(run) for run in plan.surrogate_runs] == runs
    if plan.form.with_change:
        assert plan.states == {"3": "4", "6": "6"}


def test_fewer_layers_may_be_kept_always() -> None:
    assert DropPlan(num_layers=4, sites=(0, 3), always_first=0, always_last=0).kept_attentions == (1, 2)


@pytest.mark.parametrize(
    ("changes", "fact", "note"),
    [
        ({"k": -1}, "k is too small", ["-1", "0"]),
        ({"k": 2.0}, "k must be", ["2.0"]),
        ({"surrogate": "mean"}, "--surrogate", ["'mean'", "residual, recurrent, anchor, residual-delta"]),
        ({"rank": -2}, "rank cannot be negative", ["-2"]),
        ({"always_first": -1}, "cannot be negative", ["-1"]),
        ({"always_last": -1}, "cannot be negative", ["-1"]),
        ({"sites": (4, 3, 4)}, "twice", ["3, 4, 4"]),
        ({"sites": (8,)}, "does not have", ["Layer 8", "0 to 7"]),
        ({"sites": (-1, 4)}, "no layer", ["'-1'"]),
        ({"sites": (2, 4)}, "always kept", ["Layer 2", "first 3", "last 1"]),
        ({"sites": (4, 7)}, "always kept", ["Layer 7", "first 3", "last 1"]),
        ({"sites": (6,), "always_last": 2}, "always kept", ["Layer 6", "last 2"]),
        ({"sites": (3, 4), "windowed_layers": (0, 2, 4)}, "always kept", ["Layer 4", "sliding window"]),
        ({"sites": (2, 4), "windowed_layers": (0, 2, 4)}, "always kept", ["Layer 4", "sliding window"]),
        ({"sites": (2,), "windowed_layers": (0, 2, 4)}, "always kept", ["Layer 2", "first 3", "last 1"]),
        ({"sites": ("2.mlp", "4.attn"), "kv_sources": (2, 4)}, "always kept", ["Layer 4", "take its K and V"]),
        ({"sites": (2,), "kv_sources": (2, 4)}, "always kept", ["Layer 2", "first 3", "last 1"]),
    ],
    ids=str,
)
def test_plan_refuses(changes: dict, fact: str, note: list[str]) -> None:
    assert_refused(lambda: dataclasses.replace(PLAN, **changes), fact, *note)


@pytest.mark.parametrize("why", ["windowed_layers", "kv_sources"])
def test_the_half_that_the_hint_names_can_be_dropped(why: str) -> None:
    for first, named in ((0, True), (3, False)):
        with pytest.raises(PlanError, match="always kept") as refused:
            DropPlan(num_layers=8, sites=(2,), always_first=first, **{why: (2,)})
        assert ("2.mlp" in refused.value.hint) == named
    DropPlan(num_layers=8, sites=("2.mlp",), always_first=0, **{why: (2,)})


def test_the_hint_names_every_policy_that_takes_a_layer_with_a_window() -> None:
    with pytest.raises(PlanError, match="sliding window") as refused:
        DropPlan(num_layers=8, sites=(4,), windowed_layers=(4,))
    assert refused.value.hint == "Leave it out, name 4.mlp, or use --policy backfill, fill or lossless."
    for policy in ("backfill", "fill", "lossless"):
        DropPlan(num_layers=8, sites=(4,), windowed_layers=(4,), policy=policy)
