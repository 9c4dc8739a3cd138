"""Figures of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_drop_runtime.plan.schedule import PERIODIC

from lora_drop_tools.shared.results import add_legend, colours, save_figure
from lora_drop_tools.shared.table import MIB

from .intervals import Figure
from .report import schedule_name
from .result import FULL, EvalResult, EvalRow

_QUALITIES: tuple[tuple[str, str, Callable[[EvalRow], Figure | None]], ...] = (
    ("accuracy", "average accuracy", lambda row: row.average),
    ("perplexity", "perplexity over the full schedule's", lambda row: row.text.ratio if row.text else None),
)
FIGURES = ("offsets.png", *(f"{name}_{cost}.png" for name, *_ in _QUALITIES for cost in ("speedup", "kv")))


def _arm(row: EvalRow) -> str:
    return f"{row.label} {row.policy}" + ("" if row.schedule == PERIODIC else f" {row.schedule}")


def _draw_pareto(axes: Any, points: Sequence[tuple[EvalRow, Figure, float]], quality: str, cost: str) -> None:
    """A line for each bundle, policy and schedule over its windows; the full schedule is where they begin."""
    arms = dict.fromkeys((row.bundle, row.policy, row.schedule) for row, _, _ in points if row.k)
    for (bundle, policy, schedule), colour in zip(arms, colours(len(arms)), strict=True):
        own = [
            one
            for one in points
            if one[0].bundle == bundle and (one[0].policy, one[0].schedule) in ((policy, schedule), (FULL, PERIODIC))
        ]
        own.sort(key=lambda one: one[0].k)
        x, y = [one[2] for one in own], [one[1].value for one in own]
        low = [max(0.0, one[1].value - one[1].low) for one in own]
        high = [max(0.0, one[1].high - one[1].value) for one in own]
        axes.errorbar(x, y, [low, high], fmt="o-", color=colour, capsize=3, label=_arm(own[-1][0]))
        for row, figure, at in own:
            axes.annotate(
                f"k={row.k}", (at, figure.value), textcoords="offset points", xytext=(5, 4), fontsize="x-small"
            )
    axes.margins(x=0.1)  # room for the last label
    axes.set_xlabel(cost)
    axes.set_ylabel(quality)


def _draw_offsets(axes: Any, rows: Sequence[EvalRow], name: str, label: str) -> None:
    drawn = [(row, row.text.offsets) for row in rows if row.k and row.text]
    for (row, found), colour in zip(drawn, colours(len(drawn)), strict=True):
        offsets, y = [one.offset for one in found], [getattr(one, name) for one in found]
        axes.plot(offsets, y, "o-", color=colour, label=schedule_name(row))
    axes.set_xlabel("offset within the cycle (0: refresh)")
    axes.set_xticks(range(max(row.k for row in rows) + 1))
    axes.set_ylabel(label)
    if name == "agreement":
        axes.set_ylim(top=1.02)
    else:
        axes.set_ylim(bottom=0)


def write_plots(result: EvalResult, directory: Path) -> list[Path]:
    """Quality against measured speed-up and against K/V bytes, and agreement and KL at each offset of the cycle."""
    from matplotlib.figure import Figure as Canvas

    written = []

    def draw(name: str, panels: Sequence[Callable[[Any], None]]) -> None:
        figure = Canvas(figsize=(6.4 * len(panels), 4.4), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel(axes)
            axes.grid(alpha=0.3)
            add_legend(axes)
        figure.suptitle(f"{result.model}, {result.weight_dtype}", fontsize="small")
        written.append(save_figure(figure, directory / f"{name}.png"))

    for name, what, quality in _QUALITIES:
        rows = [(row, found) for row in result.rows if (found := quality(row)) is not None]
        if any(row.k and row.speedup is not None for row, _ in rows):
            timed = [(row, found, row.speedup) for row, found in rows if row.speedup is not None]
            draw(f"{name}_speedup", [lambda axes, p=timed, w=what: _draw_pareto(axes, p, w, "measured speed-up")])  # type: ignore[misc]
        if any(row.k for row, _ in rows):
            held = [(row, found, row.kv_bytes / MIB) for row, found in rows]
            draw(f"{name}_kv", [lambda axes, p=held, w=what: _draw_pareto(axes, p, w, "K/V (MiB)")])  # type: ignore[misc]
    if any(row.k and row.text for row in result.rows):
        draw(
            "offsets",
            [
                lambda axes: _draw_offsets(axes, result.rows, "agreement", "top-1 agreement with the full schedule"),
                lambda axes: _draw_offsets(axes, result.rows, "kl", "KL to the full schedule (nats)"),
            ],
        )
    return written
