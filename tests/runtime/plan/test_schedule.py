"""Schedules that look at logits: what they see, what they choose, what they refuse. Numbers by another way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from lora_drop_runtime.errors import InputError, PlanError
from lora_drop_runtime.plan.schedule import (
    ADAPTIVE,
    AdaptiveSchedule,
    EntropySchedule,
    LastLogits,
    MarginSchedule,
    PeriodicSchedule,
    StepKind,
    as_schedule,
    kind_of_step,
    most_refreshes,
    periodic_like,
)

REFRESH, LORA = StepKind.REFRESH, StepKind.LORA
INFINITY = math.inf


def last(logits: Any, lora_steps: int = 1) -> LastLogits:
    return LastLogits(lora_steps, lambda: np.atleast_2d(np.asarray(logits, np.float32)))


def test_margin_and_entropy_of_the_least_sure_row() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (5, 200)).astype(np.float32)
    margins, entropies = [], []
    for row in logits.astype(np.float64):
        second, first = sorted(row)[-2:]
        margins.append(first - second)
        p = [math.exp(x) / sum(map(math.exp, row)) for x in row]
        entropies.append(-sum(x * math.log(x) for x in p))
    seen = last(logits)
    assert seen.margin == pytest.approx(min(margins), rel=1e-5)
    assert seen.entropy == pytest.approx(max(entropies), rel=1e-5)
    assert last([3.0, 1.0, 3.0]).margin == 0
    assert last(np.zeros(8)).entropy == pytest.approx(math.log(8))
    assert last([800.0, -800.0, -np.inf]).entropy == 0  # nothing overflows, and 0 · ∞ is 0


def test_logits_are_read_once_and_only_when_asked() -> None:
    reads = []
    seen = LastLogits(2, lambda: reads.append(1) or np.array([[1.0, 3.0, 0.0]], np.float32))
    assert PeriodicSchedule(3).kind(1, seen) is LORA
    assert MarginSchedule(2, 1.0).kind(9, seen) is REFRESH  # the last of two LoRA steps
    assert MarginSchedule(2, 1.0).kind(9, LastLogits(0, seen._read)) is LORA
    assert reads == []
    assert MarginSchedule(3, 2.0).kind(9, seen) is LORA
    assert MarginSchedule(3, 2.1).kind(9, seen) is REFRESH
    assert seen.entropy < 1
    assert reads == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_never_sure(bad: float) -> None:
    seen = last([[1.0, 9.0, 2.0], [0.0, bad, bad]])
    assert MarginSchedule(3, -INFINITY).kind(5, seen) is REFRESH
    assert EntropySchedule(3, INFINITY).kind(5, seen) is REFRESH


def kinds(schedule: AdaptiveSchedule, logits: list[list[float]]) -> str:
    """A letter for each step; `logits[i]` are those before step i + 1."""
    found, lora_steps = "", 0
    for step, one in enumerate(logits, start=1):
        kind = schedule.kind(step, last(one, lora_steps))
        lora_steps = lora_steps + 1 if kind is LORA else 0
        found += kind.name[0]
    return found


def test_the_rule_by_hand() -> None:
    """A refresh follows the LoRA step that is unsure; those of refreshes and the prefill do not count."""
    sure, unsure = [0.0, 5.0], [1.0, 1.5]
    pattern = [unsure, sure, unsure, unsure, sure, sure, sure, sure, unsure]
    assert kinds(MarginSchedule(3, 2.0), pattern) == "LLRLLLRLR"
    assert kinds(EntropySchedule(3, 0.3), pattern) == "LLRLLLRLR"
    assert kinds(MarginSchedule(2, 2.0), pattern) == "LLRLLRLLR"
    assert kinds(MarginSchedule(0, 2.0), pattern) == "R" * 9


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_the_limits_of_the_threshold_are_periodic(k: int) -> None:
    logits = np.random.default_rng(k).normal(0, 1, (40, 9)).tolist()
    periodic = "".join(PeriodicSchedule(k).kind(step).name[0] for step in range(1, 41))
    assert kinds(MarginSchedule(k, -INFINITY), logits) == kinds(EntropySchedule(k, INFINITY), logits) == periodic
    assert kinds(MarginSchedule(k, INFINITY), logits) == kinds(EntropySchedule(k, -INFINITY), logits) == "LR" * 20


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_most_refreshes_is_reached_and_never_passed(k: int) -> None:
    generator = np.random.default_rng(k)
    for steps in range(20):
        assert most_refreshes(PeriodicSchedule(k), steps) == sum(j % (k + 1) == 0 for j in range(1, steps + 1))
        for adaptive in (MarginSchedule(k, INFINITY), EntropySchedule(k, -INFINITY), MarginSchedule(k, 1.0)):
            seen = kinds(adaptive, generator.normal(0, 1, (steps, 5)).tolist()).count("R")
            assert seen <= most_refreshes(adaptive, steps)
            if math.isinf(adaptive.threshold):
                assert seen == most_refreshes(adaptive, steps)


class Own:
    def __init__(self, most: Any) -> None:
        self.most_refreshes = lambda steps: most

    def kind(self, step: int, last: LastLogits) -> StepKind:
        return LORA


def test_what_one_s_own_says_is_checked() -> None:
    assert most_refreshes(Own(3), 5) == 3
    assert most_refreshes(type("Bare", (), {"kind": Own.kind})(), 5) == 5
    for wrong in (6, -1, 1.5, True, None):
        with pytest.raises(InputError, match="impossible number of refreshes"):
            most_refreshes(Own(wrong), 5)
    with pytest.raises(InputError, match="What a schedule's kind returns has the wrong type"):
        kind_of_step(type("Wrong", (), {"kind": lambda self, step, last: "lora"})(), 1, last([1.0, 2.0]))


def test_as_schedule_refuses_a_kind_that_takes_other_arguments() -> None:
    class OneArgument:
        def kind(self, step: int) -> StepKind:
            return LORA

    own, margin = Own(1), MarginSchedule(2, 1.0)
    assert as_schedule(own) is own
    assert as_schedule(margin) is margin
    assert as_schedule(3) == PeriodicSchedule(3)
    for wrong in (OneArgument(), MarginSchedule, type("No", (), {"kind": "margin"})()):
        with pytest.raises(InputError, match="cannot be called with a step and the last logits") as caught:
            as_schedule(wrong)  # type: ignore[arg-type]
        assert "def kind(self, step, last)" in str(caught.value)
    for wrong in ("margin", 1.5, -1, None):
        with pytest.raises(PlanError):
            as_schedule(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ADAPTIVE.values())
def test_thresholds_and_windows_are_checked(schedule: type[AdaptiveSchedule]) -> None:
    assert schedule(np.int64(3), np.float32(0.5)) == schedule(3, 0.5)  # type: ignore[arg-type]
    for wrong in (math.nan, "1", None, True):
        with pytest.raises(InputError, match="The threshold must be a number"):
            schedule(3, wrong)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="k is too small"):
        schedule(-1, 0.5)


def test_periodic_like() -> None:
    assert periodic_like(PeriodicSchedule(4), 9) == PeriodicSchedule(4)
    assert periodic_like(EntropySchedule(2, 1.0), 9) == PeriodicSchedule(2)
    assert periodic_like(Own(0), 9) == PeriodicSchedule(9)
