"""The grid of docs/modes.md: its tables, and its two pictures.

    python docs/modes/grid.py

Reads what `lora-drop eval --json` and `lora-drop bench --json` wrote: `eval-MODEL-TEXT.json` with every bundle under
its own policy, `bench-MODEL-POLICY.json`, the same of other dtypes with `-int8` and `-float32` at the end; and what
lossless.py wrote. Prints Markdown, and writes speed.png and kv.png beside itself, both of int4.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODELS = {"smol": "SmolLM2-135M", "q05": "Qwen2.5-Coder-0.5B", "q15": "Qwen2.5-Coder-1.5B"}
TEXTS = ("prose", "code")
COLOURS = {"skip": "tab:red", "backfill": "tab:blue", "fill": "tab:green"}
MARKS = {"0.25": "o", "0.5": "s", "0.75": "^"}


@dataclass(frozen=True)
class Cell:
    """A policy, ρ and k: perplexity over the full schedule's by text, the speed over it, share of K/V not kept.
    `float32` is the speed there."""

    policy: str
    rho: str
    k: int
    perplexity: dict[str, float]
    speed: float | None
    float32: float | None
    saved: float


def _read(name: str) -> dict[str, Any] | None:
    path = HERE / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _key(bundle: str) -> tuple[str, str]:
    """Policy and ρ of a bundle that is called MODEL-DTYPE-POLICY-ρ."""
    policy, rho = Path(bundle).name.split("-")[-2:]
    return policy, rho


def _saved(row: dict[str, Any], full: float, request: list[int]) -> float:
    """Share of the generated tokens' K/V that is not kept."""
    return float((full - row["kv_bytes"]) / (full * request[1] / sum(request)))


def _speeds(model: str, dtype: str) -> dict[tuple[str, str, int], float]:
    """By policy, ρ and k."""
    return {
        (*_key(row["bundle"]), row["k"]): row["speedup"]
        for policy in COLOURS
        for row in (_read(f"bench-{model}-{policy}{dtype}.json") or {"rows": []})["rows"]
    }


def cells(model: str, dtype: str = "") -> list[Cell]:
    """All that was measured of a model, in int4 or as a dtype's files end."""
    quality: dict[tuple[str, str, int], dict[str, float]] = {}
    saved: dict[tuple[str, str, int], float] = {}
    for text in TEXTS:
        data = _read(f"eval-{model}-{text}{dtype}.json") or {"rows": []}
        full = {row["label"]: row["kv_bytes"] for row in data["rows"] if not row["k"]}
        for row in data["rows"]:
            if row["k"]:
                place = (*_key(row["label"]), row["k"])
                quality.setdefault(place, {})[text] = row["text"]["ratio"]["value"]
                saved[place] = _saved(row, full[row["label"]], data["kv_request"])
    speeds, float32 = _speeds(model, dtype), {} if dtype else _speeds(model, "-float32")
    order = {policy: number for number, policy in enumerate(COLOURS)}
    return [
        Cell(*place, found, speeds.get(place), float32.get(place), saved[place])
        for place, found in sorted(quality.items(), key=lambda one: (order[one[0][0]], *one[0][1:]))
    ]


def table(found: list[Cell]) -> None:
    """The speed in float32 where it was measured."""
    wide = any(cell.float32 for cell in found)
    more, line = (" speed, float32 |", "---|") if wide else ("", "")
    print(f"| policy | ρ | k | speed |{more} perplexity, prose | perplexity, code | K/V saved |")
    print(f"|---|---|---|---|{line}---|---|---|")
    for cell in found:
        speeds = [cell.speed, cell.float32][: 1 + wide]
        said = " | ".join("" if speed is None else f"{speed:.2f}×" for speed in speeds)
        texts = " | ".join(f"{cell.perplexity[text]:.3f}" if text in cell.perplexity else "" for text in TEXTS)
        print(f"| `{cell.policy}` | {cell.rho} | {cell.k} | {said} | {texts} | {cell.saved:.1%} |")


def drafts(model: str) -> None:
    """What lossless.py measured."""
    data = _read(f"lossless-{model}.json")
    if data is None:
        return
    rows = {(row["bundle"].split("-")[-1], row["k"], row["text"]): row for row in data["rows"]}
    print(
        "\nUnder `lossless`, LoRA steps as drafts. `parts` counts greedy continuations that are not the full\n"
        f"schedule's token for token, of {next(iter(rows.values()))['windows']}.\n\n"
        "| ρ | k | text | tokens per refresh | drafts accepted | speed | parts |\n|---|---|---|---|---|---|---|"
    )
    for (rho, k, text), row in sorted(rows.items(), key=lambda one: (one[0][0], one[0][1], TEXTS.index(one[0][2]))):
        figures = f"{row['tokens_per_refresh']:.2f} | {row['accepted']:.0%} | {row['speed']:.2f}×"
        print(f"| {rho} | {k} | {text} | {figures} | {len(row['parts'])} |")


def draw(grids: dict[str, list[Cell]], name: str, label: str, x: Callable[[Cell], float | None]) -> None:
    """A panel a model, a line over k for each policy and ρ; the prose."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(grids), figsize=(5 * len(grids), 4.2), squeeze=False)
    for axes, (model, found) in zip(panels[0], grids.items(), strict=True):
        for policy, rho in dict.fromkeys((cell.policy, cell.rho) for cell in found):
            own = [cell for cell in found if (cell.policy, cell.rho) == (policy, rho) and x(cell) is not None]
            places = [(x(cell), cell.perplexity["prose"]) for cell in own if "prose" in cell.perplexity]
            if places:
                axes.plot(*zip(*places, strict=True), MARKS[rho] + "-", color=COLOURS[policy], label=f"{policy}, {rho}")
        axes.axhline(1.1, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=MODELS[model], xlabel=label, ylabel="perplexity over the full schedule's", yscale="log")
        ticks = [1, 1.1, 1.25, 1.5, 2, 3, 4]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    panels[0][0].legend(fontsize="x-small", title="policy, ρ; k = 1, 2, 3, 5 along a line", title_fontsize="x-small")
    figure.tight_layout()
    figure.savefig(HERE / name, dpi=110)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("# The grid of modes.md\n\nMade by `python docs/modes/grid.py`. Perplexity is over the full schedule's.")
    grids = {model: found for model in MODELS if (found := cells(model))}
    for model, found in grids.items():
        print(f"\n## {MODELS[model]}\n")
        table(found)
        drafts(model)
        if in_int8 := cells(model, "-int8"):
            print("\nIn int8:\n")
            table(in_int8)
    if any(cell.speed for found in grids.values() for cell in found):
        draw(grids, "speed.png", "decoding speed over the full schedule's", lambda cell: cell.speed)
    saving = {model: [cell for cell in found if cell.policy == "skip"] for model, found in grids.items()}
    draw(saving, "kv.png", "share of the generated tokens' K/V that is not kept", lambda cell: cell.saved)


if __name__ == "__main__":
    main()
