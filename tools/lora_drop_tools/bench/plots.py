"""Figures of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_drop_runtime.plan.schedule import PERIODIC

from lora_drop_tools.shared.results import add_legend, colours, save_figure

from .result import BenchResult, Row


def _by_window(rows: Sequence[Row], skip_full: bool) -> list[tuple[int | str, list[Row], Any]]:
    """Rows of each k, by ρ, and a colour."""
    windows = list(dict.fromkeys(row.k for row in rows if row.k or not skip_full))
    own = (sorted((row for row in rows if row.k == k), key=lambda row: row.rho) for k in windows)
    return list(zip(windows, own, colours(len(windows)), strict=True))


def _draw_speedup(axes: Any, rows: Sequence[Row]) -> None:
    for k, own, colour in _by_window(rows, skip_full=True):
        rho = [row.rho for row in own]
        low = [row.speedup - min(row.speedups) for row in own]
        high = [max(row.speedups) - row.speedup for row in own]
        axes.errorbar(rho, [r.speedup for r in own], [low, high], fmt="o-", color=colour, capsize=3, label=f"k = {k}")
        axes.plot(rho, [r.ceiling for r in own], "_--", color=colour, alpha=0.6, label=f"k = {k}, ceiling by bytes")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("ρ, dropped share of the eligible layers")
    axes.set_ylabel("speed-up over the full schedule")


def _draw_latency(axes: Any, rows: Sequence[Row]) -> None:
    for k, own, colour in _by_window(rows, skip_full=False):
        rho = [row.rho for row in own]
        axes.plot(rho, [row.latency_ms["p50"] for row in own], "o-", color=colour, label=f"k = {k}, p50")
        axes.plot(rho, [row.latency_ms["p95"] for row in own], "^--", color=colour, label=f"k = {k}, p95")
    axes.set_xlabel("ρ, dropped share of the eligible layers")
    axes.set_ylabel("latency of a token (ms)")
    axes.set_ylim(bottom=0)


def _draw_kv_saving(axes: Any, rows: Sequence[Row]) -> None:
    for k, own, colour in _by_window(rows, skip_full=True):
        most = max(own, key=lambda row: row.attention_share)
        line, equation = [0.0, most.attention_share], [0.0, 100 * most.kv_saving]
        axes.plot(line, equation, "--", color=colour, alpha=0.6, label=f"k = {k}, Eq. 16")
        saved = [100 * row.kv_saved for row in own]
        axes.plot([row.attention_share for row in own], saved, "o", color=colour, label=f"k = {k}, measured")
    axes.set_xlabel("share of all layers whose attention is dropped")
    axes.set_ylabel("K/V of generated tokens saved (%)")


_DRAWN = {"speedup": _draw_speedup, "latency": _draw_latency, "kv_saving": _draw_kv_saving}
FIGURES = tuple(f"{name}_context*_batch*.png" for name in _DRAWN)  # patterns of their names


def write_plots(result: BenchResult, directory: Path) -> list[Path]:
    """Speed-up against ρ with its ceilings, latencies, and K/V saving against ρ, for each context and batch."""
    from matplotlib.figure import Figure

    written = []
    for context, rows in dict.fromkeys((row.context, row.rows) for row in result.rows):
        periodic = (row for row in result.rows if row.schedule == PERIODIC)
        own = [row for row in periodic if (row.context, row.rows) == (context, rows)]
        title = f"{result.model}, {result.weight_dtype}, context {context}, batch {rows}"
        for name, draw in _DRAWN.items() if any(row.k for row in own) else [("latency", _draw_latency)]:
            figure = Figure(figsize=(6.4, 4.4), layout="constrained")
            axes = figure.add_subplot()
            draw(axes, own)
            axes.set_title(title, fontsize="small")
            axes.grid(alpha=0.3)
            add_legend(axes)
            written.append(save_figure(figure, directory / f"{name}_context{context}_batch{rows}.png"))
    return written
