"""The table and figures of `lora-drop profile`.

Enters: a `Profile`. Leaves: lines of text; with matplotlib, PNG files. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.plan.surrogate import SURROGATES

from lora_drop_tools.shared.table import table

if TYPE_CHECKING:
    from .result import Profile

BASES = tuple(name for name, form in SURROGATES.items() if not form.with_change)


def _ratios(result: Profile) -> list[float]:
    return sorted({ranked.rho for ranked in result.drop_lists})


def _compared(result: Profile) -> list[str]:
    """The KL of the drop lists: of whole layers all are equally long."""
    settings, names = result.settings, tuple(result.rankings)
    lists = {(ranked.ranking, ranked.rho): ranked for ranked in result.drop_lists}
    share = "attentions" if settings["objective"] == "kv" else "ρ"
    rows = []
    for rho in _ratios(result):
        ranked = [lists[name, rho] for name in names]
        if settings["sites"] == "halves":
            rows.append((f"{share} = {rho:g}", *(f"{one.kl:.4f} of {len(one.sites):2}" for one in ranked)))
        else:
            rows.append((f"{share} = {rho:g}", f"{len(ranked[0].sites)}", *(f"{one.kl:.4f}" for one in ranked)))
    lengths = () if settings["sites"] == "halves" else ("layers",)
    return table(("KL of LoRA steps, nats", *lengths, *names), rows)


def _objective(settings: Mapping[str, Any]) -> str:
    """What `sensitivity` weighed KL against."""
    if settings["objective"] == "kv":
        return "sensitivity: KL per byte of K/V that is not stored"
    dtype = f"weights in {settings['bundle_dtype']}" if settings["bundle_dtype"] else "weights as loaded"
    adapters = f", adapters of rank {settings['rank']}" if settings["rank"] else ""
    return f"sensitivity: KL per byte that a LoRA step does not read ({dtype}, {settings['context']} tokens{adapters})"


def _adapters(settings: Mapping[str, Any]) -> str:
    return f"with the adapters of {settings['adapters']}" if settings["adapters"] else "without adapters"


def _use(settings: Mapping[str, Any]) -> str:
    """The command that takes a list; adapters of a longer one are fitted anew for it."""
    return "lora-drop fit MODEL --text …" if settings["adapters"] else "lora-drop-export --model MODEL"


def describe(result: Profile, out: Path) -> list[str]:
    """The lines that `profile` prints."""
    settings, names = result.settings, tuple(result.rankings)
    what = "half" if settings["sites"] == "halves" else "layer"
    places = {name: {site: str(i + 1) for i, site in enumerate(order)} for name, order in result.rankings.items()}
    headings = (what, "sim Δ=1", "centred", "influence", *BASES, "KL alone", *names)
    rows = [
        (
            one.site,
            f"{one.similarity[1]:.3f}",
            f"{one.centred_similarity[1]:.3f}",
            f"{one.influence_cosine:.4f}",
            *(f"{one.base_errors[base]:.2f}" for base in BASES),
            "–" if one.kl_alone is None else f"{one.kl_alone:.4f}",
            *(places[name].get(one.site, "–" if one.eligible else "kept") for name in names),
        )
        for one in result.sites
    ]
    best = [result.best(rho) for rho in _ratios(result)]
    shares = [f"{one.attention_share:.0%} of attentions, {one.weight_share:.0%} of weights" for one in best]
    return [
        "",
        f"{result.model}: {settings['tokens']} tokens in windows of {settings['window']}",
        "",
        *table(headings, rows),
        f"sim: cosine of a {what}'s outputs at t and t+1; centred: the same less their mean; influence: cosine of a",
        f"{what}'s input and output; {', '.join(BASES)}: distance of the surrogate's base from the output,",
        "over that of the mean; KL alone: of LoRA steps when it alone is dropped; then its place in each ranking",
        "",
        *_compared(result),
        f"on {settings['sensitivity_tokens']} other tokens, k = {settings['k']}, policy {settings['policy']}, "
        f"{settings['surrogate']} {_adapters(settings)}",
        *([_objective(settings)] if "sensitivity" in names else []),
        "",
        "recommended, the least KL:",
        *(
            f"  {out / ranked.file}: {', '.join(ranked.sites) or 'none'}" + (f" ({share})" if what == "half" else "")
            for ranked, share in zip(best, shares, strict=True)
        ),
        f"use one: {_use(settings)} --drop-list FILE --policy {settings['policy']} --out DIR",
    ]
