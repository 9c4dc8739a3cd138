"""The tables and figures of `lora-drop bench`.

Enters: a `BenchResult`. Leaves: lines of text; with matplotlib, PNG files. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_drop_tools.shared import costs

from .result import BenchResult, Memory, PeerRow, Row

MIB = 2**20
NOT_MEASURED = "not measured"


def describe(result: BenchResult) -> list[str]:
    """The lines that `bench` prints."""
    facts = result.machine
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"model      {result.model}, weights {result.weight_dtype}, engine {result.engine}, {result.threads} threads",
        f"machine    {facts['cpu']}, {facts['physical_cores']} cores, {facts['system']}",
        f"versions   {versions}",
        f"load       {_load(result.load_before)} before, {_load(result.load_after)} after"
        + ("" if result.foreign_cores is None else f"; others kept {result.foreign_cores:.2f} cores busy meanwhile"),
        f"reading    {result.bandwidth.describe()}" if result.bandwidth else "reading    not measured: not on the CPU",
        f"requests   {result.new_tokens} new tokens, {result.repeats} repeats, all in turn; medians over the repeats; "
        f"policy {result.policy}",
        *(f"bundle     {name}: {_bundle(entry)}" for name, entry in result.bundles.items()),
    ]
    for context, rows in dict.fromkeys((row.context, row.rows) for row in result.rows):
        own = [row for row in result.rows if (row.context, row.rows) == (context, rows)]
        peers = [peer for peer in result.peer_rows if peer.context == context and rows == 1]
        lines += ["", f"── context {context}, batch {rows} ──", "", *_speed_table(own), "", *_latency_table(own)]
        lines += ["", *_bytes_table(own), *_tails(own), *(["", *_peer_table(own, peers)] if peers else [])]
    lines += ["", *_memory_table(result.memory)]
    if result.peers_left_out:
        lines += ["", "peers left out"]
        lines += [f"  {name}: {reason}" for name, reason in result.peers_left_out.items()]
    lines += ["", *(f"warning: {text}" for text in result.warnings)] if result.warnings else []
    return lines


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need: the first is text, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in (headings, *rows)
    ]


def _load(load: tuple[float, float, float] | None) -> str:
    return NOT_MEASURED if load is None else f"{load[0]:.2f}"


def _bundle(entry: dict[str, Any]) -> str:
    return f"drops {', '.join(map(str, entry['drop_layers'])) or 'nothing'} ({entry['path']})"


def _name(row: Row) -> str:
    return f"{row.bundle} ρ={row.rho:.2f} k={row.k}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _speed_table(rows: Sequence[Row]) -> list[str]:
    headings = (
        "speed-up",
        "tokens/s",
        "over k=0",
        "spread",
        "ceiling",
        "of ceiling",
        "own steps",
        "of its gain",
        "Eq. 10",
    )
    cells = [
        (
            _name(row),
            f"{row.tokens_per_second:.2f}",
            f"{row.speedup:.3f}×",
            f"{row.noise:.3f}",
            f"{row.ceiling:.3f}×",
            _percent(row.share) + ("!" if row.above_ceiling else ""),
            _percent(row.own_share),
            _percent(row.gain_share),
            f"{row.asymptotic:.3f}×",
        )
        for row in rows
    ]
    return [
        *table(headings, cells),
        "own steps: of ceiling, from the medians of the request's own refreshes and LoRA steps; free of drift",
    ]


def _latency_table(rows: Sequence[Row]) -> list[str]:
    headings = (
        "latency",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "first token ms",
        "prefill tokens/s",
        "KV MB",
        "KV saved",
        "Eq. 16",
    )
    cells = [
        (
            _name(row),
            *(f"{row.latency_ms[p]:.2f}" for p in ("p50", "p95", "p99")),
            f"{row.first_token_ms:.1f}",
            f"{row.prefill_tokens_per_second:.1f}",
            f"{(row.kv_bytes['kept'] + row.kv_bytes['dropped']) / 1e6:.2f}",
            _percent(row.kv_saved),
            _percent(row.kv_saving),
        )
        for row in rows
    ]
    return [
        *table(headings, cells),
        "KV MB: valid entries at the end, the prompt's too; KV saved: of generated tokens; Eq. 16: over whole cycles",
    ]


def _bytes_table(rows: Sequence[Row]) -> list[str]:
    headings = ("step", "steps", "median ms", "MB moved", "GB/s", "of bandwidth", "not the engine")
    cells = [
        (
            f"{_name(row)} {kind}",
            str(step.steps),
            f"{step.median_ms:.2f}",
            f"{step.mean_bytes / 1e6:.1f}",
            f"{step.gb_per_second:.1f}",
            _percent(step.bandwidth_share),
            f"{row.overhead_share:.2%}",
        )
        for row in rows
        for kind, step in row.steps.items()
    ]
    return table(headings, cells)


def _tails(rows: Sequence[Row]) -> list[str]:
    headings = ("Eq. 11", "quantile", "measured ms", "predicted", "nearer to", "holds")
    cells = [
        (
            _name(row),
            f"p{100 * tail.quantile:.0f}",
            f"{tail.measured_ms:.2f}",
            tail.predicted,
            tail.nearer_to,
            "yes" if tail.holds else "no",
        )
        for row in rows
        for tail in row.tails
    ]
    return ["", *table(headings, cells)] if cells else []


def _peer_table(rows: Sequence[Row], peers: Sequence[PeerRow]) -> list[str]:
    """Each peer, and how much faster than it the full schedule and the fastest window are."""
    fastest = max(rows, key=lambda row: row.tokens_per_second)
    full = next(row for row in rows if row.bundle == fastest.bundle and row.k == 0)
    headings = ("peer", "tokens/s", "p50 ms", "prefill tokens/s", "PSS MB", "model MB", "k=0 over it", "best over it")
    cells = [
        (
            f"{peer.name} {peer.version or ''} ({peer.built})",
            f"{peer.tokens_per_second:.2f}",
            f"{peer.p50_ms:.2f}",
            f"{peer.prefill_tokens_per_second:.1f}",
            _pss(peer.pss),
            f"{peer.model_bytes / 1e6:.0f}",
            f"{full.over_peers[peer.name]:.3f}×",
            f"{fastest.over_peers[peer.name]:.3f}×",
        )
        for peer in peers
    ]
    return [*table(headings, cells), f"best: {_name(fastest)}; ratios of tokens/s, each within a repeat"]


def _memory_table(memory: Sequence[Memory]) -> list[str]:
    headings = ("memory, a process of its own", "context", "batch", "PSS MB", "of it mapped files MB")
    cells = [
        (
            f"{one.bundle} k={one.k}",
            str(one.request.context),
            str(one.request.rows),
            _pss(one.pss),
            "–" if one.pss is None or "file" not in one.pss else f"{one.pss['file'] / 1e6:.0f}",
        )
        for one in memory
    ]
    return table(headings, cells)


def _pss(pss: dict[str, int] | None) -> str:
    return NOT_MEASURED if pss is None else f"{pss['total'] / 1e6:.0f}"


# ── figures ────────────────────────────────────────────────────────────────────────────────────────────────────


def write_plots(result: BenchResult, directory: Path) -> list[Path]:
    """Speed-up against ρ with its ceilings, latencies, and K/V saving against ρ, for each context and batch."""
    from matplotlib.figure import Figure

    written = []
    for context, rows in dict.fromkeys((row.context, row.rows) for row in result.rows):
        own = [row for row in result.rows if (row.context, row.rows) == (context, rows)]
        title = f"{result.model}, {result.weight_dtype}, context {context}, batch {rows}"
        for name, draw in (("speedup", _draw_speedup), ("latency", _draw_latency), ("kv_saving", _draw_kv_saving)):
            figure = Figure(figsize=(6.4, 4.4), layout="constrained")
            axes = figure.add_subplot()
            draw(axes, own)
            axes.set_title(title, fontsize="small")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
            written.append(directory / f"{name}_context{context}_batch{rows}.png")
            figure.savefig(written[-1], dpi=150)
    return written


def _by_window(rows: Sequence[Row], skip_full: bool) -> dict[int, list[Row]]:
    """Rows of each k, by ρ."""
    windows = sorted({row.k for row in rows if row.k or not skip_full})
    return {k: sorted((row for row in rows if row.k == k), key=lambda row: row.rho) for k in windows}


def _draw_speedup(axes: Any, rows: Sequence[Row]) -> None:
    for index, (k, own) in enumerate(_by_window(rows, skip_full=True).items()):
        rho, colour = [row.rho for row in own], f"C{index}"
        low = [row.speedup - min(row.speedups) for row in own]
        high = [max(row.speedups) - row.speedup for row in own]
        axes.errorbar(rho, [r.speedup for r in own], [low, high], fmt="o-", color=colour, capsize=3, label=f"k = {k}")
        axes.plot(rho, [r.ceiling for r in own], "_--", color=colour, alpha=0.6, label=f"k = {k}, ceiling by bytes")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("ρ, dropped share of the eligible layers")
    axes.set_ylabel("speed-up over the full schedule")


def _draw_latency(axes: Any, rows: Sequence[Row]) -> None:
    for index, (k, own) in enumerate(_by_window(rows, skip_full=False).items()):
        rho, colour = [row.rho for row in own], f"C{index}"
        axes.plot(rho, [row.latency_ms["p50"] for row in own], "o-", color=colour, label=f"k = {k}, p50")
        axes.plot(rho, [row.latency_ms["p95"] for row in own], "^--", color=colour, label=f"k = {k}, p95")
    axes.set_xlabel("ρ, dropped share of the eligible layers")
    axes.set_ylabel("latency of a token (ms)")
    axes.set_ylim(bottom=0)


def _draw_kv_saving(axes: Any, rows: Sequence[Row]) -> None:
    eligible_share = max((row.rho_eff / row.rho for row in rows if row.rho), default=0.0)  # 1 − a/n
    for index, (k, own) in enumerate(_by_window(rows, skip_full=True).items()):
        colour = f"C{index}"
        line = [0.0, max(1e-9, *(row.rho for row in own))]
        equation = [100 * eligible_share * rho * (1 - costs.slow_share(k)) for rho in line]
        axes.plot(line, equation, "--", color=colour, alpha=0.6, label=f"k = {k}, Eq. 16")
        axes.plot([r.rho for r in own], [100 * r.kv_saved for r in own], "o", color=colour, label=f"k = {k}, measured")
    axes.set_xlabel("ρ, dropped share of the eligible layers")
    axes.set_ylabel("K/V of generated tokens saved (%)")
