"""The paper's tables and figure for the user's own bundles: `lora-drop eval --paper NAME`.

Enters: an `EvalResult`, or rows of `lora-drop bench --json`, or a manifest. Leaves: lines of text; for Fig. 3 four
panels. Measures nothing. The paper's own numbers stand beside where they are at hand: those of its Tables III and V,
and the ranges of speed-ups of its Table I. They are of other models on other machines, and its speed-ups exceed its
own Eq. 10: they are context, no yardstick.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_drop_runtime.bundle.manifest import Manifest
from lora_drop_runtime.plan.drafting import said_policy
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.schedule import PERIODIC

from lora_drop_tools.shared import costs
from lora_drop_tools.shared.results import bench_file, check_bench_bundles, of_one_request, save_figure
from lora_drop_tools.shared.table import MIB, table

from .methods import LORA_DROP
from .report import MISSING, heads, value, with_half
from .result import EvalResult, EvalRow

TABLE_1 = ("arc_easy", "lambada_openai", "piqa", "winogrande", "mmlu", "hellaswag", "humaneval")
TABLE_2 = ("gsm8k", "hendrycks_math", "bbh", "mbpp", "mbpp_10", "longbench", "needle", "xnli", "xcopa")
GRID_K = (1, 2, 3, 5)  # of Tables III and IV
_RATIOS = (0.25, 0.5, 0.75)
_NEAR = 0.05  # a plan's ρ is the paper's up to this: layers are whole
ABSENT = "not at hand"
CONTEXT = 4096  # tokens, of Table IV and Fig. 3
FIGURE = "paper_fig3"


@dataclass(frozen=True)
class Reproduced:
    """What of the paper is made, and what it takes.

    Attributes:
        tasks, ks: evaluated where the user does not say; nothing is evaluated where there are no tasks.
        shots: examples in the prompts of some of the tasks.
    """

    title: str
    tasks: tuple[str, ...] = ()
    ks: tuple[int, ...] = ()
    shots: Mapping[str, int] = field(default_factory=lambda: {"mmlu": 5})


PAPER: Mapping[str, Reproduced] = {
    "table1": Reproduced("Table I: accuracy in % by task, and speed-up", TABLE_1, (3,)),
    "table2": Reproduced("Table II: reasoning, code, long context and languages, in %", TABLE_2, (3,)),
    "table3": Reproduced("Table III: average accuracy in % and speed-up over ρ and k", TABLE_1, GRID_K),
    "table4": Reproduced("Table IV: latency of a token and K/V over ρ and k"),
    "table5": Reproduced("Table V: adapters of blocks against those of attention and MLP, k = 2", TABLE_1, (2,)),
    "fig3": Reproduced("Fig. 3: what Eq. 13 to 16 say of the K/V"),
}
MODELS = ("LLaMA2-7B", "Qwen2.5-7B", "LLaMA3-8B")
# Table III: (ρ, k) → average accuracy in % and speed-up of MODELS; (0, 0) is the full model
_TABLE_3: Mapping[tuple[float, int], tuple[tuple[float, ...], tuple[float, ...]]] = {
    (0, 0): ((64.6, 66.4, 67.7), (1.0, 1.0, 1.0)),
    (0.25, 1): ((64.7, 66.5, 67.8), (1.20, 1.22, 1.15)),
    (0.25, 2): ((64.8, 66.6, 67.8), (1.25, 1.27, 1.20)),
    (0.25, 3): ((64.8, 66.6, 67.8), (1.27, 1.29, 1.24)),
    (0.25, 5): ((64.5, 66.3, 67.5), (1.30, 1.31, 1.32)),
    (0.5, 1): ((64.6, 66.3, 67.6), (1.45, 1.47, 1.35)),
    (0.5, 2): ((64.6, 66.3, 67.5), (1.55, 1.58, 1.45)),
    (0.5, 3): ((64.5, 66.3, 67.4), (1.68, 1.73, 1.70)),
    (0.5, 5): ((64.1, 66.0, 67.1), (1.80, 1.85, 1.75)),
    (0.75, 1): ((63.5, 65.5, 66.8), (2.00, 2.05, 1.85)),
    (0.75, 2): ((63.0, 65.0, 66.4), (2.20, 2.25, 1.98)),
    (0.75, 3): ((62.8, 64.7, 65.3), (2.35, 2.42, 2.20)),
    (0.75, 5): ((62.1, 63.9, 64.1), (2.45, 2.50, 2.45)),
}
# Table I, k = 3: speed-ups over the models, by method and ρ
_TABLE_1_SPEEDUP: Mapping[tuple[str, float], str] = {
    (LORA_DROP, 0.25): "1.34–1.39×",
    (LORA_DROP, 0.5): "1.68–1.73×",
    (LORA_DROP, 0.75): "2.35–2.60×",
}
_TABLE_1_METHODS: Mapping[str, str] = {"Unified Layer Skipping": "1.34–1.42×", "FlexiDepth, static": "1.49–1.55×"}
# Table V, ρ = 0.5, k = 2: speed-up of MODELS by what has adapters; the accuracy is the same
_TABLE_5: Mapping[bool, tuple[float, ...]] = {False: (1.55, 1.58, 1.45), True: (1.37, 1.39, 1.27)}


def _paper_ratio(rho: float) -> float | None:
    """The paper's ρ that a plan's is near to; None where it is near to none."""
    return next((ratio for ratio in _RATIOS if abs(ratio - rho) <= _NEAR), None)


def _speedup(row: EvalRow) -> str:
    return "1.00×" if not row.k else MISSING if row.speedup is None else f"{row.speedup:.2f}×"


def _slashed(values: Sequence[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def _in_halves(row: EvalRow) -> bool:
    return any(not site.isdecimal() for site in row.sites)


def _names(row: EvalRow) -> tuple[str, ...]:
    """What begins a line: bundle, method, ρ, k, policy."""
    method = "full model" if not row.k else row.method
    return row.label, method, f"{row.rho:.2f}" if row.k else MISSING, str(row.k), row.policy


_NAMES = ("bundle", "method", "ρ", "k", "policy")


def _by_task(result: EvalResult, speedups: bool) -> list[str]:
    """Tables I and II: a column for each task or group."""
    names = list(heads(result.rows[0]))
    headings = [*_NAMES, *names, "average", *(("speed-up", "paper's speed-up") if speedups else ()), "paper's accuracy"]
    lines = []
    for row in result.rows:
        ours = _TABLE_1_SPEEDUP.get((row.method, _paper_ratio(row.rho) or 0), MISSING) if row.k == 3 else MISSING
        theirs = _TABLE_1_METHODS.get(row.method) or ours
        speed = (_speedup(row), theirs if row.k else "1.00×") if speedups else ()
        lines.append(
            (
                *_names(row),
                *(value(heads(row).get(name)) for name in names),
                with_half(row.average, 100, 1),
                *speed,
                ABSENT,
            )
        )
    return table(headings, lines)


def _table_3(result: EvalResult) -> list[str]:
    headings = (*_NAMES, "average", "speed-up", "paper's average", "paper's speed-up")
    lines = []
    for row in result.rows:
        ratio = 0 if not row.k else _paper_ratio(row.rho) if row.method == LORA_DROP else None
        theirs = None if ratio is None else _TABLE_3.get((ratio, row.k))
        paper = (_slashed(theirs[0], 1), _slashed(theirs[1], 2)) if theirs else (MISSING, MISSING)
        lines.append((*_names(row), with_half(row.average, 100, 1), _speedup(row), *paper))
    return [*table(headings, lines), f"paper: {' / '.join(MODELS)}"]


def _table_5(result: EvalResult) -> list[str]:
    headings = (*_NAMES, "adapters of", "average", "speed-up", "paper's speed-up")
    lines = []
    for row in result.rows:
        same = row.k == 2 and row.rank and _paper_ratio(row.rho) == 0.5 and row.method == LORA_DROP
        kind = "none" if not row.rank else "attention and MLP" if _in_halves(row) else "blocks"
        paper = _slashed(_TABLE_5[_in_halves(row)], 2) if same else MISSING
        lines.append((*_names(row), kind if row.k else MISSING, with_half(row.average, 100, 1), _speedup(row), paper))
    return [
        *table(headings, lines),
        f"paper: {' / '.join(MODELS)} at ρ = 0.5, with the same accuracy for both; its accuracies are {ABSENT}",
    ]


_TABLES: Mapping[str, Callable[[EvalResult], list[str]]] = {
    "table1": lambda result: _by_task(result, True),
    "table2": lambda result: _by_task(result, False),
    "table3": _table_3,
    "table5": _table_5,
}


def described(name: str, result: EvalResult) -> list[str]:
    """The lines of a table of accuracies."""
    lines = ["", PAPER[name].title, "", *_TABLES[name](result)]
    if name != "table2" and not any(row.speedup for row in result.rows):
        lines.append("speed-ups are read from --bench FILE, which lora-drop bench --json writes")
    return lines


# ── Table IV ───────────────────────────────────────────────────────────────────────────────────────────────────


def latencies(path: Path, names: Sequence[str]) -> list[str]:
    """Table IV of what `lora-drop bench --json` wrote of these bundles under the periodic schedule, at the longest
    context and smallest batch.

    Raises:
        InputError: the file cannot be read, or has nothing of them.
    """
    with bench_file(path, "latencies"):
        data = json.loads(path.read_text(encoding="utf-8"))
        periodic = [row for row in data["rows"] if row.get("schedule", PERIODIC) == PERIODIC]
        check_bench_bundles(path, "latencies", {row["bundle"] for row in periodic}, names)
        rows, batch, context = of_one_request([row for row in periodic if row["bundle"] in names])
        cells = [
            (
                row["bundle"],
                f"{row['rho']:.2f}" if row["k"] else MISSING,
                str(row["k"]),
                *(f"{row['latency_ms'][name]:.2f}" for name in ("p50", "p95")),
                f"{(row['kv_bytes']['kept'] + row['kv_bytes']['dropped']) / MIB:.1f}",
                ABSENT,
            )
            for row in rows
        ]
    headings = ("bundle", "ρ", "k", "p50 ms", "p95 ms", "K/V MiB", "paper's")
    said = {"policy": said_policy(data.get("policy", ""), data.get("lenience")), "engine": data.get("engine")}
    named = "".join(f", {name} {value}" for name, value in said.items() if value)
    where = f"context {context}, batch {batch}{named}"
    lines = [PAPER["table4"].title, "", *table(headings, cells), where]
    if context != CONTEXT:
        lines[-1] += f"; the paper's is {CONTEXT}: lora-drop bench --contexts {CONTEXT}"
    return [*lines, "Eq. 11: p95 is the refresh's for every k below 19"]


# ── Fig. 3 ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class KvShape:
    """What Eq. 12 to 16 take of a model: `n` layers, `a` of them always on, and the mean of a token's bytes of K/V in
    one layer."""

    layers: int
    always_on: int
    token_bytes: float

    @classmethod
    def of(cls, manifest: Manifest) -> KvShape:
        layers, counted = manifest.plan.num_layers, len(manifest.plan.counted_layers)
        return cls(layers, layers - counted, manifest.model.token_kv_bytes(range(layers)) / layers)

    def saving(self, rho: float, k: int) -> float:
        """Eq. 16: `(1 − a/n) · p · (1 − 1/w)`, p = ρ, w = k + 1."""
        return (1 - self.always_on / self.layers) * rho * (1 - 1 / (k + 1))

    def bytes_of(self, tokens: int, rho: float, k: int) -> float:
        """Eq. 13 of one row: `2 h_kv d b · [a N + (1 − p) S N + p S N / w]`, S = n − a."""
        eligible = self.layers - self.always_on
        entries = self.always_on + (1 - rho) * eligible + rho * eligible / (k + 1)
        return self.token_bytes * tokens * entries


def kv_lines(name: str, manifest: Manifest) -> list[str]:
    """Fig. 3 as a table: Eq. 16 over ρ and k, and Eq. 13 at `CONTEXT` generated tokens."""
    shape = KvShape.of(manifest)
    cells = [
        (
            f"ρ = {rho:.2f}",
            *(f"{shape.saving(rho, k):.1%}" for k in GRID_K),
            *(f"{shape.bytes_of(CONTEXT, rho, k) / MIB:.1f}" for k in GRID_K),
        )
        for rho in (*_RATIOS, 1.0)
    ]
    headings = ("K/V", *(f"saved, k = {k}" for k in GRID_K), *(f"MiB, k = {k}" for k in GRID_K))
    full = shape.bytes_of(CONTEXT, 0, 1) / MIB
    own = costs.kv_saving(manifest, manifest.plan.k, POLICIES[manifest.plan.policy])
    return [
        f"{name}: {shape.layers} layers, {shape.always_on} always on; {CONTEXT} generated tokens of one row take "
        f"{full:.1f} MiB in full",
        "",
        *table(headings, cells),
        f"the bundle itself, under {manifest.plan.policy} with k = {manifest.plan.k}: {own:.1%} saved",
    ]


def figure_files(names: Sequence[str]) -> list[str]:
    """A file for each bundle's Fig. 3; names have parts of a path where two directories are alike, and any signs."""
    flat = list[str]()
    for name in names:
        own = re.sub(r"[^\w.-]+", "-", name).strip("-.")
        while own in flat:
            own += "_"
        flat.append(own)
    return [f"{FIGURE}_{own}.png" for own in flat]


def draw_kv(name: str, manifest: Manifest, path: Path) -> Path:
    """Fig. 3: the saving over ρ and over k, and the bytes over ρ and over tokens."""
    from matplotlib.figure import Figure as Canvas

    shape = KvShape.of(manifest)
    figure = Canvas(figsize=(11, 7.6), layout="constrained")
    panels = figure.subplots(2, 2)
    ratios, windows = [i / 50 for i in range(51)], [*range(1, 17)]
    tokens = [256 * i for i in range(1, 33)]

    def lines(axes: Any, x: Sequence[float], named: Mapping[str, Sequence[float]], xlabel: str, ylabel: str) -> None:
        for label, y in named.items():
            axes.plot(x, y, "k:" if label == "full" else "-", label=label)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")

    saved = {f"k = {k}": [100 * shape.saving(rho, k) for rho in ratios] for k in GRID_K}
    lines(panels[0][0], ratios, saved, "ρ", "K/V saved, %  (Eq. 16)")
    over_k = {f"ρ = {rho:g}": [100 * shape.saving(rho, k) for k in windows] for rho in _RATIOS}
    lines(panels[0][1], windows, over_k, "k", "K/V saved, %  (Eq. 16)")
    held = {f"k = {k}": [shape.bytes_of(CONTEXT, rho, k) / MIB for rho in ratios] for k in GRID_K}
    held["full"] = [shape.bytes_of(CONTEXT, 0, 1) / MIB for _ in ratios]
    lines(panels[1][0], ratios, held, "ρ", f"K/V of {CONTEXT} generated tokens, MiB  (Eq. 13)")
    over_tokens = {f"ρ = {rho:g}": [shape.bytes_of(n, rho, 3) / MIB for n in tokens] for rho in _RATIOS}
    over_tokens["full"] = [shape.bytes_of(n, 0, 1) / MIB for n in tokens]
    lines(panels[1][1], tokens, over_tokens, "generated tokens", "K/V, MiB, k = 3  (Eq. 13)")
    figure.suptitle(
        f"{name}: {shape.layers} layers, {shape.always_on} always on, one row, policy skip", fontsize="medium"
    )
    return save_figure(figure, path)
