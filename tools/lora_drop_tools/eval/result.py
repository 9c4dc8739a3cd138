"""What `lora-drop eval` measured, and the arithmetic on it.

Enters: sums over the windows of a text, metrics of items. Leaves: figures with 95 % intervals, differences to the full
schedule of the same bundle on the same items, averages, the largest safe speed-up; all of that in an `EvalResult`.
Measures nothing.

Intervals: Wilson's for a share; Agresti and Min's for the difference of two shares over the same items; the bootstrap
over windows or items, with the run's seed, for all else that is a mean; lm-eval's standard error for its own figures.
That of an average over tasks takes them as independent, and is Zou and Donner's. Beside a difference of shares stands
McNemar's exact test; that of several tasks is over all of their items.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lora_drop_runtime.plan.schedule import PERIODIC

from lora_drop_tools.eval.tasks.catalogue import OpenedGroup
from lora_drop_tools.eval.tasks.metrics import Aggregate, Measured

from .intervals import (
    Figure,
    McNemar,
    Sums,
    Z,
    average,
    bootstrap,
    item_difference,
    item_mean,
    item_test,
    mcnemar,
)

THRESHOLDS = (0.005, 0.01)  # of an average accuracy, the paper's safe zone


@dataclass(frozen=True)
class OffsetFigures:
    """Steps at one place of the cycle: 0 the refresh, 1 … k the LoRA steps after it."""

    offset: int
    tokens: int
    perplexity: float
    ratio: float
    agreement: float
    kl: float


@dataclass(frozen=True)
class TextFigures:
    """A text under one window k, against k = 0 at the same positions.

    Attributes:
        perplexity, ratio: over all decode steps; the ratio to the perplexity under k = 0.
        agreement, kl: over all decode steps; how often the likeliest token is that of k = 0, and KL(p₀ ‖ p_k) in nats.
        lora_agreement, lora_kl: over LoRA steps alone; None under k = 0.
        refresh_share: of the steps; an adaptive schedule's is what it came to.
        offsets: those that there were.
    """

    windows: int
    tokens: int
    perplexity: Figure
    ratio: Figure
    agreement: Figure
    kl: Figure
    lora_agreement: Figure | None
    lora_kl: Figure | None
    refresh_share: Figure
    offsets: list[OffsetFigures]


@dataclass(frozen=True)
class TaskFigures:
    """A task under one window k.

    Attributes:
        metric: the one that stands for the task in tables and averages.
        metrics: every metric of lm-eval's definition; a log-likelihood as its perplexity. One that is no mean of
            items' values is lm-eval's own figure.
        difference: of `metric`, paired, to k = 0; None under k = 0, and where it is no mean of items' values.
        cut: requests that lost the beginning of their context.
        is_share: whether `metric` is a mean of values from 0 to 1, the more the better.
        test: of `difference`; None where items do more than hit or miss.
    """

    metric: str
    metrics: dict[str, Figure]
    difference: Figure | None
    cut: int
    is_share: bool = True
    test: McNemar | None = None

    @property
    def figure(self) -> Figure:
        return self.metrics[self.metric]


@dataclass(frozen=True)
class GroupFigures:
    """A group of tasks under one window k, weighted as lm-eval does.

    Attributes:
        figure: the mean of its tasks' `metric`, and `difference` to k = 0.
        items: of all its tasks.
        is_part: of another group that was asked for and has a figure.
        test: over the items of all its tasks; None where one has none.
    """

    metric: str
    figure: Figure
    difference: Figure | None
    items: int
    tasks: tuple[str, ...]
    is_share: bool
    is_part: bool
    test: McNemar | None = None


@dataclass(frozen=True)
class EvalRow:
    """A bundle under a policy and a window k.

    Attributes:
        method: what the literature calls such a plan.
        rho, attentions, weight_bytes: `costs.Shares`.
        policy: "full" under k = 0, where all policies are one.
        kv_bytes: of valid K/V at the end of the request that `EvalResult.kv_request` names; of an adaptive schedule
            with as many refreshes as it had on the text.
        schedule: `periodic`, or the adaptive one, whose `threshold` it ran with.
        speedup: measured by `lora-drop bench`, None where it was not.
        tasks, groups: by their names in lm-eval.
        average: of the shares of what was asked for, see `averages`; `average_difference` to k = 0, `average_test` over
            the items of all of them.
        aim: the share that `average` may lie below that of k = 0; None where none was given.
    """

    bundle: str
    label: str
    method: str
    surrogate: str
    rank: int
    sites: tuple[str, ...]
    rho: float
    attentions: float
    weight_bytes: float
    policy: str
    k: int
    kv_bytes: int
    speedup: float | None
    text: TextFigures | None
    tasks: dict[str, TaskFigures]
    average: Figure | None
    average_difference: Figure | None
    schedule: str = PERIODIC
    threshold: float | None = None
    groups: dict[str, GroupFigures] = field(default_factory=dict)
    average_test: McNemar | None = None
    aim: float | None = None


@dataclass(frozen=True)
class SafeZone:
    """The fastest row whose average is within `threshold` of the full model's; no row where only k = 0 is.

    `certain`: whether its interval is within the threshold too.
    """

    threshold: float
    row: EvalRow | None
    certain: bool


def safe_zones(rows: Sequence[EvalRow]) -> list[SafeZone]:
    """For each threshold the fastest row that stays within; empty without speed-ups or averages."""
    timed = [row for row in rows if row.k and row.speedup is not None and row.average_difference is not None]
    zones = []
    for threshold in THRESHOLDS if timed else ():
        within = [row for row in timed if row.average_difference and row.average_difference.value >= -threshold]
        best = max((row for row in within if (row.speedup or 0) > 1), key=lambda row: row.speedup or 0, default=None)
        certain = best is None or (best.average_difference is not None and best.average_difference.low >= -threshold)
        zones.append(SafeZone(threshold, best, certain))
    return zones


KEYS = ("command", "begun", "machine", "kv_request", "rows", "safe_zones")  # by which an earlier --json is known


@dataclass
class EvalResult:
    """Everything that was measured; `to_json` is what --json writes."""

    command: str
    arguments: dict[str, Any]
    begun: str
    machine: dict[str, Any]
    model: str
    weight_dtype: str
    seed: int
    kv_request: tuple[int, int]
    speed_request: str
    rows: list[EvalRow] = field(default_factory=list)
    safe_zones: list[SafeZone] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def text_figures(windows: Sequence[Sums], seed: int) -> TextFigures:
    """Of the sums of all windows, each float64 [k + 1, 5] with scoring.py's `COLUMNS`."""
    stacked = np.stack(windows)  # [windows, k + 1, 5]
    tokens, nll, nll_full, agree, kl = np.moveaxis(stacked.sum(axis=1), 1, 0)  # [windows] each
    lora = stacked[:, 1:].sum(axis=1)  # [windows, 5]
    offsets = [
        OffsetFigures(
            offset,
            int(count),
            float(np.exp(own / count)),
            float(np.exp((own - whole) / count)),
            float(same / count),
            float(divergence / count),
        )
        for offset, (count, own, whole, same, divergence) in enumerate(stacked.sum(axis=0))
        if count
    ]
    has_lora = any(one.offset for one in offsets)
    return TextFigures(
        windows=len(windows),
        tokens=int(tokens.sum()),
        perplexity=bootstrap(nll, tokens, seed, np.exp),
        ratio=bootstrap(nll - nll_full, tokens, seed, np.exp),
        agreement=bootstrap(agree, tokens, seed),
        kl=bootstrap(kl, tokens, seed),
        lora_agreement=bootstrap(lora[:, 3], lora[:, 0], seed) if has_lora else None,
        lora_kl=bootstrap(lora[:, 4], lora[:, 0], seed) if has_lora else None,
        refresh_share=bootstrap(stacked[:, 0, 0], tokens, seed),
        offsets=offsets,
    )


def _aggregate_figure(one: Aggregate) -> Figure:
    """lm-eval's figure with ±1.96 of its standard error; without one the interval is the value itself."""
    half = Z * (one.stderr or 0.0)
    return Figure(one.value, one.value - half, one.value + half, one.count)


def task_figures(measured: Measured, full: Measured | None, seed: int) -> TaskFigures:
    """Of what was measured; `full` is the same under k = 0, None for k = 0 itself."""
    items, metric = measured.items, measured.metric
    order = sorted(items)
    metrics: dict[str, Figure] = {}
    for name in items[order[0]]:
        values = [items[item][name] for item in order]
        if name in measured.likelihoods:
            metrics[name] = bootstrap([-value for value in values], [1.0] * len(values), seed, np.exp)
        else:
            metrics[name] = item_mean(values, seed)
    metrics |= {name: _aggregate_figure(one) for name, one in measured.aggregates.items()}
    is_mean = metric in items[order[0]] and metric not in measured.likelihoods
    is_paired = full is not None and metric in full.items[order[0]] and is_mean
    is_share = is_mean and measured.rises and all(0 <= items[item][metric] <= 1 for item in order)
    difference = test = None
    if full is not None and is_paired:
        pair = [items[item][metric] for item in order], [full.items[item][metric] for item in order]
        difference, test = item_difference(*pair, seed), item_test(*pair)
    return TaskFigures(metric, metrics, difference, measured.cut, is_share, test)


def pooled_test(parts: Sequence[TaskFigures | GroupFigures]) -> McNemar | None:
    """McNemar's test over the items of all parts; None where there are none, or one has no test."""
    tests = [part.test for part in parts if part.test is not None]
    if not tests or len(tests) < len(parts):
        return None
    return mcnemar(sum(test.won for test in tests), sum(test.lost for test in tests))


def group_figures(group: OpenedGroup, tasks: Mapping[str, TaskFigures]) -> GroupFigures | None:
    """The group's figure of those of its tasks, weighted as lm-eval does; None where they have no such metric.

    Its difference is that of the tasks' own, where the metric is their main one.
    """
    own = [tasks[name] for name in group.tasks]
    metric = group.figure_name(list(own[0].metrics))
    if metric is None or any(metric not in task.metrics for task in own):
        return None
    figures = [task.metrics[metric] for task in own]
    weights = [float(figure.count) if group.by_size else 1.0 for figure in figures]
    differences = [task.difference for task in own if task.difference is not None and task.metric == metric]
    return GroupFigures(
        metric,
        average(figures, weights),
        average(differences, weights) if len(differences) == len(own) else None,
        sum(figure.count for figure in figures),
        group.tasks,
        all(task.is_share if task.metric == metric else 0 <= task.metrics[metric].value <= 1 for task in own),
        group.is_part,
        pooled_test(own) if all(task.metric == metric for task in own) else None,
    )


def averages(
    tasks: Mapping[str, TaskFigures], groups: Mapping[str, GroupFigures] | None = None
) -> tuple[Figure | None, Figure | None, McNemar | None]:
    """The average over the shares that were asked for, of their differences to k = 0, and the test of these.

    A group counts once. Figures that are no shares, such as a perplexity, are left out of it. Where one of the others
    has no difference, the average has none: it would be that of the rest.
    """
    outer = [group for group in (groups or {}).values() if not group.is_part]
    inside = {name for group in outer for name in group.tasks}
    alone = [task for name, task in tasks.items() if name not in inside]
    every: list[TaskFigures | GroupFigures] = [*outer, *alone]
    counted = [one for one in every if one.is_share]
    if not counted:
        return None, None, None
    differences = [one.difference for one in counted if one.difference is not None]
    mean = average([one.figure for one in counted])
    return mean, average(differences) if len(differences) == len(counted) else None, pooled_test(counted)


def too_wide(row: EvalRow) -> str | None:
    """What to say of a row whose interval is wider than its aim; None where it is not."""
    difference = row.average_difference
    if row.aim is None or difference is None:
        return None
    half = (difference.high - difference.low) / 2
    if half <= row.aim:
        return None
    undecided = difference.low < -row.aim <= difference.high
    return (
        f"{row.label} k={row.k} {row.policy}: the interval of average − full, ±{100 * half:.1f} points, is wider than "
        f"the aim of {100 * row.aim:g}" + (": more items or tasks would tell" if undecided else "")
    )


FULL = "full"  # the policy of k = 0
