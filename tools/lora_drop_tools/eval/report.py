"""The tables and figures of `lora-drop eval`.

Enters: an `EvalResult`. Leaves: lines of text; with matplotlib, PNG files. Measures nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lora_drop_runtime.plan.schedule import PERIODIC
from lora_drop_runtime.plan.sites import half_of, listed

from lora_drop_tools.shared.table import MIB, table

from .intervals import Figure, McNemar
from .result import EvalResult, EvalRow, GroupFigures, OffsetFigures, SafeZone, TaskFigures

MISSING = "–"


def _how_much(row: EvalRow) -> str:
    if not any(half_of(site) for site in row.sites):
        return f"ρ = {row.rho:.2f}"
    return (
        f"{row.attentions:.0%} of the eligible attentions, {row.weight_bytes:.0%} of the eligible layers' weight "
        "bytes; "
        f"LoRA steps read no more than at ρ = {row.rho:.2f}"
    )


def _bundle(row: EvalRow) -> str:
    adapters = f"adapters of rank {row.rank}" if row.rank else "no adapters"
    what = f"drops {listed(row.sites) or 'nothing'} ({_how_much(row)})"
    return f"{row.label}: {row.method}, {row.surrogate}, {adapters}, {what}"


def schedule_name(row: EvalRow) -> str:
    adaptive = "" if row.schedule == PERIODIC else f" {row.schedule}"
    return f"{row.label} k={row.k} {row.policy}{adaptive}"


def with_half(figure: Figure | None, scale: float, digits: int) -> str:
    """The value with half of its interval; alone where that has no width: of one window, or without lm-eval's error."""
    if figure is None:
        return MISSING
    value = f"{scale * figure.value:z.{digits}f}"
    return value if figure.low == figure.high else f"{value} ±{scale * (figure.high - figure.low) / 2:.{digits}f}"


def _text_table(rows: Sequence[EvalRow]) -> list[str]:
    names = "text|tokens|refreshes %|perplexity|over full|agree %|agree % (LoRA)|KL|KL (LoRA)"
    cells = [
        (
            schedule_name(row),
            str(row.text.tokens),
            f"{100 * row.text.refresh_share.value:.1f}",
            with_half(row.text.perplexity, 1, 2),
            with_half(row.text.ratio, 1, 3) if row.k else MISSING,
            with_half(row.text.agreement, 100, 1) if row.k else MISSING,
            with_half(row.text.lora_agreement, 100, 1),
            with_half(row.text.kl, 1, 3) if row.k else MISSING,
            with_half(row.text.lora_kl, 1, 3),
        )
        for row in rows
        if row.text
    ]
    return [
        *table(names.split("|"), cells),
        "agree: the likeliest token is the full schedule's; KL: of its distribution to this one's, in nats; "
        "(LoRA): LoRA steps alone",
    ]


# A figure of each offset whose mean over several is theirs together, and how the mean is written.
_OFFSET_LINES: tuple[tuple[str, Callable[[OffsetFigures], float], Callable[[float], str]], ...] = (
    ("over full", lambda one: math.log(one.ratio), lambda mean: f"{math.exp(mean):.3f}"),
    ("agree %", lambda one: one.agreement, lambda mean: f"{100 * mean:.1f}"),
    ("KL", lambda one: one.kl, lambda mean: f"{mean:z.3f}"),  # rounding leaves less than 0 of equal logits
)
_OFFSETS_APART = 8  # LoRA steps of a cycle that have a column each


def _columns(longest: int) -> list[range]:
    """Offsets by column: each its own in a short cycle, stretches that double in a long one."""
    if longest <= _OFFSETS_APART:
        return [range(offset, offset + 1) for offset in range(longest + 1)]
    columns, begin, end = [range(1)], 1, 2
    while begin <= longest:
        columns.append(range(begin, min(end, longest + 1)))
        begin, end = end, 2 * end - 1
    return columns


def _heading(column: range) -> str:
    first, last = column[0], column[-1]
    return "refresh" if not first else f"LoRA {first}" if first == last else f"LoRA {first}–{last}"


def _offset_cell(offsets: Sequence[OffsetFigures], pick: Callable[[OffsetFigures], float]) -> float:
    """The mean over their steps."""
    return sum(pick(one) * one.tokens for one in offsets) / sum(one.tokens for one in offsets)


def _offset_table(rows: Sequence[EvalRow]) -> list[str]:
    """A line for each figure, a column for each offset within the cycle, or for several of a long one."""
    columns = _columns(max(row.k for row in rows))
    headings = ("offset within the cycle", "", *map(_heading, columns))
    cells = []
    for row in rows:
        if row.text is None or not row.k:
            continue
        parts = [[one for one in row.text.offsets if one.offset in column] for column in columns]
        for what, pick, written in _OFFSET_LINES:
            found = (written(_offset_cell(part, pick)) if part else "" for part in parts)
            cells.append((schedule_name(row), what, *found))
    return table(headings, cells) if cells else []


def _points(figure: Figure | None) -> str:
    """A difference of shares in percentage points, with its interval."""
    if figure is None:
        return MISSING
    return f"{100 * figure.value:+.1f} [{100 * figure.low:+.1f}, {100 * figure.high:+.1f}]"


def heads(row: EvalRow) -> dict[str, TaskFigures | GroupFigures]:
    """What was asked for: groups in the place of their tasks, and tasks that belong to none."""
    outer = {name: group for name, group in row.groups.items() if not group.is_part}
    of_task = {task: name for name, group in outer.items() for task in group.tasks}
    found: dict[str, TaskFigures | GroupFigures] = {}
    for name, task in row.tasks.items():
        group = of_task.get(name)
        found[group or name] = outer[group] if group else task
    return found


def value(one: TaskFigures | GroupFigures | None) -> str:
    """A share in percent, another figure as it is."""
    if one is None:
        return MISSING
    return with_half(one.figure, 100, 1) if one.is_share else with_half(one.figure, 1, 3)


def _paired_cells(difference: Figure | None, test: McNemar | None, is_share: bool) -> tuple[str, ...]:
    """A difference with the ends of its interval, in points where it is one of shares; its test."""
    if difference is None:
        return (MISSING,) * 6
    scale, digits = (100, 1) if is_share else (1, 3)
    ends = (f"{scale * one:+.{digits}f}" for one in (difference.value, difference.low, difference.high))
    if test is None:
        return (*ends, *(MISSING,) * 3)
    return (*ends, str(test.won), str(test.lost), f"{test.p_value:.3f}" if test.p_value >= 0.001 else "<0.001")


def _paired_table(rows: Sequence[EvalRow]) -> list[str]:
    """A line for each schedule and task, and one for their average where there are several."""
    cells = []
    for row in rows:
        if not row.k:
            continue
        own = heads(row)
        lines = [(name, _paired_cells(one.difference, one.test, one.is_share)) for name, one in own.items()]
        if sum(one.is_share for one in own.values()) > 1:
            lines.append(("average", _paired_cells(row.average_difference, row.average_test, True)))
        cells += [(schedule_name(row), name, *found) for name, found in lines]
    if not cells:
        return []
    return [
        "",
        *table(("task − full, pp", "task", "difference", "lowest", "highest", "won", "lost", "p"), cells),
        "won, lost: items that this schedule alone and the full one alone gets right; p: McNemar's exact test of these",
    ]


def _part_table(rows: Sequence[EvalRow]) -> list[str]:
    """A line for each task and group inside a group."""
    first, outer = rows[0], [group for group in rows[0].groups.values() if not group.is_part]
    inside = {name for group in outer for name in group.tasks}
    names = [name for name, group in first.groups.items() if group.is_part] + [n for n in first.tasks if n in inside]
    if not names:
        return []
    cells = [
        (name, *(value(row.groups.get(name) if name in first.groups else row.tasks.get(name)) for row in rows))
        for name in names
    ]
    return ["", *table(("within groups, %", *map(schedule_name, rows)), cells)]


def _task_table(rows: Sequence[EvalRow]) -> list[str]:
    names = list(heads(rows[0]))
    headings = ("tasks, %", "ρ", *names, "average", "average − full, pp")
    cells = [
        (
            schedule_name(row),
            f"{row.rho:.2f}" if row.k else MISSING,
            *(value(heads(row).get(name)) for name in names),
            with_half(row.average, 100, 1),
            _points(row.average_difference),
        )
        for row in rows
    ]
    return [*table(headings, cells), *_paired_table(rows), *_part_table(rows)]


def _notes(result: EvalResult) -> list[str]:
    """Which metric stands for each task, over how many items, and what was cut."""
    first = result.rows[0]
    said = [
        f"{name} {one.metric} of {one.items} in {len(one.tasks)} tasks"
        if isinstance(one, GroupFigures)
        else f"{name} {one.metric} of {one.figure.count}"
        for name, one in heads(first).items()
    ]
    lines = ["metrics: " + ", ".join(said)]
    odd = [name for name, one in heads(first).items() if not one.is_share]
    if odd:
        lines.append(f"{', '.join(odd)}: no share, so as it is, and not in the average")
    for name in first.tasks:
        cut = max(row.tasks[name].cut for row in result.rows)
        if cut:
            lines.append(f"{name}: {cut} requests were longer than the bundle allows and lost the beginning")
    return lines


def _aims(rows: Sequence[EvalRow]) -> list[str]:
    """Of each schedule with an aim, whether its average is within it."""
    lines = []
    for row in rows:
        if row.aim is None:
            continue
        if row.average_difference is not None:
            reached = "reached" if row.average_difference.value >= -row.aim else "missed"
            verdict = f"{reached}, {_points(row.average_difference)} pp"
        elif row.average is not None:
            verdict = "not known, some of the average has no difference to full"
        else:
            verdict = "not known, there is no average"
        lines.append(f"aim        {schedule_name(row)} within {100 * row.aim:g} pp of the full model: {verdict}")
    return lines


def _cost_table(result: EvalResult) -> list[str]:
    prompt, steps = result.kv_request
    headings = ("cost", "ρ", "k", "policy", "schedule", "speed-up", "KV MiB", "of full")
    base = {row.bundle: row.kv_bytes for row in result.rows if not row.k}
    cells = [
        (
            row.label,
            f"{row.rho:.2f}" if row.k else MISSING,
            str(row.k),
            row.policy,
            row.schedule if row.k else MISSING,
            MISSING if row.speedup is None else f"{row.speedup:.2f}×",
            f"{row.kv_bytes / MIB:.2f}",
            f"{row.kv_bytes / base[row.bundle]:.1%}",
        )
        for row in result.rows
    ]
    return [
        *table(headings, cells),
        f"speed-up: {result.speed_request}; KV: valid entries of one row, {prompt} tokens of prompt and {steps} steps",
    ]


def _verdict(zone: SafeZone) -> str:
    begin = f"safe zone  within {100 * zone.threshold:.1f} pp of the full model: "
    if zone.row is None:
        return begin + "nothing that is faster than 1.00×"
    text = f"{zone.row.speedup:.2f}× by {schedule_name(zone.row)}, {_points(zone.row.average_difference)} pp"
    return begin + text + ("" if zone.certain else "; the interval is wider than that: more items (--limit) would tell")


def describe(result: EvalResult) -> list[str]:
    """The lines that `eval` prints."""
    versions = ", ".join(f"{name} {version}" for name, version in result.machine["versions"].items())
    lines = [
        f"model      {result.model}, weights {result.weight_dtype}",
        f"versions   {versions}",
        f"seed       {result.seed}; intervals are of 95 %; full: k = 0 of the same bundle",
        *(f"bundle     {_bundle(row)}" for row in result.rows if not row.k),
    ]
    if any(row.text for row in result.rows):
        offsets = _offset_table(result.rows)
        lines += ["", *_text_table(result.rows), *(["", *offsets] if offsets else [])]
    if any(row.tasks for row in result.rows):
        lines += ["", *_task_table(result.rows), *_notes(result), *_aims(result.rows)]
    lines += ["", *_cost_table(result)]
    lines += ["", *map(_verdict, result.safe_zones)] if result.safe_zones else []
    lines += ["", *(f"warning: {text}" for text in result.warnings)] if result.warnings else []
    return lines
