"""`lora-drop eval`: shares, differences and intervals by hand, and the safe zone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from lora_drop_tools.eval.intervals import (
    Figure,
    average,
    bootstrap,
    item_difference,
    item_mean,
    item_test,
    mcnemar,
    paired_difference,
    share,
)
from lora_drop_tools.eval.result import (
    EvalRow,
    TaskFigures,
    averages,
    group_figures,
    pooled_test,
    safe_zones,
    task_figures,
    too_wide,
)
from lora_drop_tools.eval.tasks.catalogue import OpenedGroup
from lora_drop_tools.eval.tasks.metrics import Measured

from tests.support.eval_rows import eval_row


def test_share() -> None:
    """Wilson's interval of 8 of 10 and of 0 of 20, as in textbooks."""
    figure = share(8, 10)
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert (share(0, 20).low, share(0, 20).high) == pytest.approx((0, 0.1611), abs=1e-4)


def test_paired_difference_by_hand() -> None:
    """10 items, 3 lost, 1 won: −0.2; ½ in each cell: −2/12 ± 1.96 √(4 + 1 − 4/12) / 12."""
    full = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    ours = [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    figure = paired_difference(ours, full)
    half = 1.959964 * math.sqrt(5 - 4 / 12) / 12
    assert (figure.value, figure.low, figure.high) == pytest.approx((-0.2, -1 / 6 - half, -1 / 6 + half))
    one = paired_difference([0.0], [1.0])  # (0 - 1) / 3 less 1.96 · √(2 - 1/3) / 3 were -1.18
    assert (one.value, one.low) == (-1.0, -1.0)
    same = paired_difference(full, full)
    assert same.value == 0
    assert same.low < 0 < same.high  # nothing lost in ten items is no proof


def test_resamples_that_say_nothing_are_left_out() -> None:
    """Windows without a LoRA step: of two windows a quarter of the resamples has none."""
    figure = bootstrap([0.2, 0.0], [2.0, 0.0], 0)
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.1, 0.1, 0.1))


def test_a_group_of_another_metric_than_its_tasks() -> None:
    """A perplexity is no share, whatever the tasks' own metric is; acc beside acc_norm is one."""
    figures = {"acc": Figure(0.5, 0.4, 0.6, 9), "ppl": Figure(12.0, 11.0, 13.0, 9), "other": Figure(0.4, 0.3, 0.5, 9)}
    tasks = {name: TaskFigures("acc", figures, None, 0) for name in ("a", "b")}
    for metric, is_share in (("acc", True), ("ppl", False), ("other", True)):
        group = OpenedGroup("g", tuple(tasks), metric, None, by_size=True, is_part=False)
        found = group_figures(group, tasks)
        assert found is not None
        assert (found.metric, found.is_share) == (metric, is_share)
        assert (averages(tasks, {"g": found})[0] is not None) == is_share
        part = dataclasses.replace(found, is_part=True, is_share=True, figure=Figure(0.9, 0.8, 1.0, 9))
        assert averages(tasks, {"g": found, "part": part}) == averages(tasks, {"g": found})  # the whole has counted it


def test_an_average_has_a_difference_where_all_of_it_have_one() -> None:
    """That of the rest stood beside an average of more, and was judged by the aim."""

    def task(hits: str) -> TaskFigures:
        items, full = ({n: {"acc": float(hit)} for n, hit in enumerate(one)} for one in (hits, "1111"))
        return task_figures(Measured(items, "acc"), Measured(full, "acc"), 0)

    kept, lost = task("1110"), task("0000")
    assert averages({"kept": kept, "lost": lost})[1] == average([kept.difference, lost.difference])  # type: ignore[list-item]
    for without in (dataclasses.replace(lost, difference=None, test=None), dataclasses.replace(lost, is_share=False)):
        mean, difference, _ = averages({"kept": kept, "lost": without})
        assert mean == average([one.figure for one in (kept, without) if one.is_share])
        assert difference == (None if without.is_share else average([kept.difference]))  # type: ignore[list-item]


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (3, 9), (9, 3), (6, 6), (12, 25), (0, 20), (700, 800)])
def test_mcnemar_is_scipys_binomial_test(won: int, lost: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(lost, won + lost).pvalue if won + lost else 1.0
    assert (mcnemar(won, lost).won, mcnemar(won, lost).lost) == (won, lost)
    assert mcnemar(won, lost).p_value == pytest.approx(expected)


def test_mcnemar_by_hand() -> None:
    """3 lost and 1 won of four: 2 (1 + 4) / 16; items that both get right or wrong say nothing."""
    full = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    ours = [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    test = item_test(ours, full)
    assert test is not None
    assert (test.won, test.lost, test.p_value) == (1, 3, 0.625)
    assert item_test([0.5, 1.0], [1.0, 1.0]) is None  # no hits and misses
    assert mcnemar(0, 6).p_value == 2 / 64


def test_the_test_of_several_tasks_is_over_all_their_items() -> None:
    def task(hits: str, of_full: str) -> Any:
        each = [{place: {"acc": float(hit)} for place, hit in enumerate(one)} for one in (hits, of_full)]
        full = dict(reversed(each[1].items()))  # pairs are of one item, whatever came first
        return task_figures(Measured(each[0], "acc"), Measured(full, "acc"), 0)

    one, two = task("0001", "1110"), task("00011", "11011")
    assert one.test == mcnemar(1, 3)
    assert averages({"one": one, "two": two})[2] == pooled_test([one, two]) == mcnemar(1, 5)
    scored = task_figures(Measured({0: {"f1": 0.5}}, "f1"), Measured({0: {"f1": 0.6}}, "f1"), 0)
    assert pooled_test([one, scored]) is None
    assert pooled_test([]) is None


def test_bootstrap() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(3, 2, 400)
    figure = bootstrap(values, np.ones(400), seed=1)
    assert figure.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (figure.value - figure.low, figure.high - figure.value) == pytest.approx((half, half), rel=0.15)
    assert bootstrap(values, np.ones(400), seed=1) == figure
    assert bootstrap([2.0, 4.0], [1.0, 3.0], 0).value == 1.5  # a ratio of sums
    assert bootstrap([0.0, 0.0], [1.0, 1.0], 0, np.exp) == Figure(1, 1, 1, 2)


def test_average_and_perplexity_of_items() -> None:
    mean = average([Figure(0.5, 0.4, 0.6, 10), Figure(0.7, 0.5, 0.9, 10)])
    half = math.hypot(0.1, 0.2) / 2
    assert (mean.value, mean.low, mean.high, mean.count) == pytest.approx((0.6, 0.6 - half, 0.6 + half, 2))
    # Of few hits and misses: not below 0, not above 1; and of one task it is the task's
    for hits in (0, 1, 4, 5):
        alone, together = average([share(hits, 5)]), average([share(hits, 5), share(hits, 5)])
        assert (alone.low, alone.high) == pytest.approx((share(hits, 5).low, share(hits, 5).high))
        assert together.low >= -1e-9
        assert together.high <= 1 + 1e-9
    lost = paired_difference([0.0] * 3 + [1.0] * 7, [1.0] * 10)
    assert (average([lost]).low, average([lost]).high) == pytest.approx((lost.low, lost.high))
    items = {4: {"perplexity": -1.0, "acc": 1.0}, 9: {"perplexity": -3.0, "acc": 0.0}}
    full = {4: {"perplexity": -1.0, "acc": 1.0}, 9: {"perplexity": -2.0, "acc": 1.0}}
    logs = frozenset({"perplexity"})
    figures = task_figures(Measured(items, "acc", likelihoods=logs), Measured(full, "acc", likelihoods=logs), 0)
    assert figures.metrics["perplexity"].value == pytest.approx(math.exp(2))
    assert figures.figure.value == 0.5
    assert figures.difference is not None
    assert figures.difference.value == -0.5


def test_a_weighted_average() -> None:
    mean = average([Figure(0.5, 0.4, 0.6, 30), Figure(0.9, 0.8, 1.0, 10)], [30, 10])
    half = math.hypot(0.75 * 0.1, 0.25 * 0.1)
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.6, 0.6 - half, 0.6 + half))


def test_values_between_hit_and_miss_are_no_share_of_hits() -> None:
    """F1 and its like: the bootstrap's interval, and that of paired differences."""
    generator = np.random.default_rng(0)
    full = generator.uniform(0, 1, 300)
    values = full - 0.1 + generator.normal(0, 0.02, 300)
    mean, difference = item_mean(values.tolist(), 0), item_difference(values.tolist(), full.tolist(), 0)
    assert mean == bootstrap(values, np.ones(300), 0)
    assert difference.value == pytest.approx((values - full).mean())
    assert difference.high - difference.low == pytest.approx(2 * 1.96 * 0.02 / math.sqrt(300), rel=0.2)
    assert item_mean([1.0, 0.0], 0) == share(1, 2)
    assert item_difference([1.0, 0.0], [1.0, 1.0], 0) == paired_difference([1.0, 0.0], [1.0, 1.0])


@pytest.mark.parametrize(
    ("values", "rises", "is_share"), [((0.2, 1.0), True, True), ((0.2, 1.0), False, False), ((12.0, 30.0), True, False)]
)
def test_what_goes_into_the_average(values: tuple[float, ...], rises: bool, is_share: bool) -> None:
    """Neither errors, which fall with quality, nor figures in units of their own."""
    measured = Measured({item: {"m": value} for item, value in enumerate(values)}, "m", rises)
    figures = task_figures(measured, None, 0)
    assert figures.is_share is is_share
    assert (averages({"t": figures})[0] is not None) is is_share


def row(k: int, speedup: float | None, difference: float | None, half: float = 0.001) -> EvalRow:
    figure = None if difference is None else Figure(difference, difference - half, difference + half, 3)
    return eval_row(k, speedup, average_difference=figure)


def test_an_interval_wider_than_the_aim_is_said() -> None:
    wide = dataclasses.replace(row(3, None, -0.002, half=0.02), aim=0.01)
    assert too_wide(wide) == (
        "b k=3 skip: the interval of average − full, ±2.0 points, is wider than the aim of 1: more items or tasks "
        "would tell"
    )
    missed = dataclasses.replace(row(3, None, -0.2, half=0.02), aim=0.01)  # for certain
    assert str(too_wide(missed)).endswith("±2.0 points, is wider than the aim of 1")
    assert too_wide(dataclasses.replace(wide, aim=0.03)) is None
    assert too_wide(dataclasses.replace(row(3, None, 0.0, half=0.25), aim=0.25)) is None  # as wide as the aim
    assert too_wide(dataclasses.replace(wide, aim=None)) is None
    assert too_wide(dataclasses.replace(wide, average_difference=None)) is None


def test_safe_zone_by_hand() -> None:
    rows = [row(0, 1.0, None), row(1, 1.1, -0.002), row(2, 1.2, -0.004), row(3, 1.3, -0.009), row(5, 1.5, -0.02)]
    half, one = safe_zones(rows)
    assert (half.threshold, half.row, half.certain) == (0.005, rows[2], True)
    assert (one.threshold, one.row, one.certain) == (0.01, rows[3], True)
    wide = [row(0, 1.0, None), row(1, 1.1, 0.003, half=0.02)]
    assert [(zone.row, zone.certain) for zone in safe_zones(wide)] == [(wide[1], False)] * 2
    none = [row(0, 1.0, None), row(3, 1.3, -0.5), row(1, 0.9, 0.0), row(2, 1.0, 0.0)]  # as fast is no speed-up
    assert [zone.row for zone in safe_zones(none)] == [None, None]
    edge = [row(0, 1.0, None), row(1, 1.1, -0.005, half=0.0)]  # one of 200 items: at the threshold is within it
    assert [(zone.row, zone.certain) for zone in safe_zones(edge)] == [(edge[1], True)] * 2
    assert safe_zones([row(0, None, None), row(3, None, 0.0)]) == []  # nothing was timed
    assert safe_zones([row(0, 1.0, None), row(3, 1.3, None)]) == []  # no task
