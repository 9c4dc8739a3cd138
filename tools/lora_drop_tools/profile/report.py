"""The table and figures of `lora-drop profile`.

Enters: a `Profile`. Leaves: lines of text; with matplotlib, PNG files. Measures nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_drop_runtime.plan.surrogate import SURROGATES

from lora_drop_tools.shared.table import table

if TYPE_CHECKING:
    from .result import Profile

BASES = tuple(SURROGATES)


def _ratios(result: Profile) -> list[float]:
    return sorted({ranked.rho for ranked in result.drop_lists})


def describe(result: Profile, out: Path) -> list[str]:
    """The lines that `profile` prints."""
    settings, ratios = result.settings, _ratios(result)
    names = tuple(result.rankings)
    places = {name: {layer: str(i + 1) for i, layer in enumerate(order)} for name, order in result.rankings.items()}
    headings = ("layer", "sim Δ=1", "centred", "influence", *BASES, "KL alone", *names)
    rows = [
        (
            str(layer.layer),
            f"{layer.similarity[1]:.3f}",
            f"{layer.centred_similarity[1]:.3f}",
            f"{layer.influence_cosine:.4f}",
            *(f"{layer.base_errors[base]:.2f}" for base in BASES),
            "–" if layer.kl_alone is None else f"{layer.kl_alone:.4f}",
            *(places[name].get(layer.layer, "–" if layer.eligible else "kept") for name in names),
        )
        for layer in result.layers
    ]
    lists = {(ranked.ranking, ranked.rho): ranked for ranked in result.drop_lists}
    scores = [
        (f"ρ = {rho:g}", str(len(lists[names[0], rho].drop_layers)), *(f"{lists[n, rho].kl:.4f}" for n in names))
        for rho in ratios
    ]
    best = [result.best(rho) for rho in ratios]
    return [
        "",
        f"{result.model}: {settings['tokens']} tokens in windows of {settings['window']}",
        "",
        *table(headings, rows),
        "sim: cosine of a layer's outputs at t and t+1; centred: the same less their mean; influence: cosine of a",
        "layer's input and output; residual, recurrent, anchor: distance of the surrogate's base from the output, over",
        "that of the mean; KL alone: of LoRA steps when the layer alone is dropped; then its place in each ranking",
        "",
        *table(("KL of LoRA steps, nats", "layers", *names), scores),
        f"on {settings['sensitivity_tokens']} other tokens, k = {settings['k']}, policy {settings['policy']}, "
        "residual without adapters",
        "",
        "recommended, the least KL:",
        *(f"  {out / ranked.file}: {', '.join(map(str, ranked.drop_layers)) or 'none'}" for ranked in best),
        "use one: lora-drop-export --model … --drop-list FILE --out DIR",
    ]
