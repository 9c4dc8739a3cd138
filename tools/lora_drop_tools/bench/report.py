"""The tables and figures of `lora-drop bench`.

Enters: a `BenchResult`. Leaves: lines of text; with matplotlib, PNG files. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_drop_runtime.plan.drafting import said_policy
from lora_drop_runtime.plan.schedule import PERIODIC
from lora_drop_runtime.plan.sites import listed

from lora_drop_tools.shared.table import table

from .result import BenchResult, Memory, PeerRow, Row

NOT_MEASURED = "not measured"


def _others(cores: float | None) -> str:
    return NOT_MEASURED if cores is None else f"{cores:.2f} cores were kept busy by other processes meanwhile"


def _bundle(entry: dict[str, Any]) -> str:
    return f"drops {listed(entry['sites']) or 'nothing'}"


def _name(row: Row) -> str:
    name = f"{row.bundle} ρ={row.rho:.2f} k={row.k}"
    return name if row.schedule == PERIODIC else f"{name} {row.schedule} ({row.refresh_share:.0%} refreshes)"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _with_operations(row: Row) -> tuple[str, str]:
    if row.operations_ceiling is None:
        return "–", "–"
    return f"{row.operations_ceiling:.3f}×", _percent(row.speedup / row.operations_ceiling)


def _about_cycles(rows: Sequence[Row]) -> list[str]:
    forms = {row.timed for row in rows}
    lines = ["timed: cycles run without the host; a latency is a cycle's time divided by its steps"]
    if len(forms) > 1:
        lines.append("timed: rows that differ in it are not compared in one form")
    return lines if forms != {"steps"} else []


def _speed_table(rows: Sequence[Row]) -> list[str]:
    counted = any(row.tokens_per_refresh for row in rows)
    batched = any(row.operations_ceiling for row in rows)
    headings = (
        "speed-up",
        "timed",
        "tokens/s",
        "over k=0",
        "spread",
        "ceiling",
        "of ceiling",
        "own steps",
        "of its gain",
        "Eq. 10",
        *(["tokens/refresh"] if counted else []),
        *(["with operations", "of that"] if batched else []),
    )
    cells = [
        (
            _name(row),
            row.timed,
            f"{row.tokens_per_second:.2f}",
            f"{row.speedup:.3f}×",
            f"{row.noise:.3f}",
            f"{row.ceiling:.3f}×",
            _percent(row.share) + ("!" if row.above_ceiling else ""),
            _percent(row.own_share),
            _percent(row.gain_share),
            "–" if row.asymptotic is None else f"{row.asymptotic:.3f}×",
            *([f"{row.tokens_per_refresh:.2f}" if row.tokens_per_refresh else "–"] if counted else []),
            *(_with_operations(row) if batched else ()),
        )
        for row in rows
    ]
    return [
        *table(headings, cells),
        "own steps: of ceiling, from the medians of the request's own refreshes and LoRA steps; free of drift",
        *_about_cycles(rows),
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


def _pss(pss: dict[str, int] | None) -> str:
    return NOT_MEASURED if pss is None else f"{pss['total'] / 1e6:.0f}"


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


def describe(result: BenchResult) -> list[str]:
    """The lines that `bench` prints."""
    facts = result.machine
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"model      {result.model}, weights {result.weight_dtype}, engine {result.engine}, {result.threads} threads",
        f"machine    {facts['cpu']}, {facts['physical_cores']} cores, {facts['system']}",
        f"versions   {versions}",
        f"others     {_others(result.foreign_cores)}",
        f"reading    {result.bandwidth.describe()}" if result.bandwidth else "reading    not measured: not on the CPU",
        f"requests   {result.new_tokens} new tokens, {result.repeats} repeats, all in turn; medians over the repeats; "
        f"policy {said_policy(result.policy, result.lenience)}" + (f", drafts {result.draft}" if result.draft else ""),
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
