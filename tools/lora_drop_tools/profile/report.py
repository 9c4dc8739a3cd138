"""The table and figures of `lora-drop profile`.

Enters: a `Profile`. Leaves: lines of text; with matplotlib, PNG files. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.plan.surrogate import SURROGATES

from lora_drop_tools.shared.table import table

from .settings import RUN, RUN_SURROGATE

if TYPE_CHECKING:
    from .result import Profile, RankedList

BASES = tuple(name for name, form in SURROGATES.items() if not form.of_runs)


def _ratios(result: Profile) -> list[float]:
    return sorted({ranked.rho for ranked in result.drop_lists})


def _kl(ranked: RankedList, halves: bool, fitted: bool) -> str:
    kl = ranked.kl_fitted if fitted else ranked.kl
    return f"{kl:.4f} of {len(ranked.sites):2}" if halves else f"{kl:.4f}"


def _compared(result: Profile, fitted: bool = False) -> list[str]:
    """The KL of the drop lists, as they are or with adapters: of whole layers all are equally long."""
    settings, names = result.settings, tuple(result.rankings)
    lists = {(ranked.ranking, ranked.rho): ranked for ranked in result.drop_lists}
    share = "attentions" if settings["objective"] == "kv" else "ρ"
    halves = settings["sites"] == "halves"
    rows = []
    for rho in _ratios(result):
        ranked = [lists.get((name, rho)) for name in names]  # neighbours may reach less than other lists
        lengths = {len(one.sites) for one in ranked if one}
        rows.append(
            (
                f"{share} = {rho:g}",
                *(() if halves else map(str, lengths)),
                *("–" if one is None else _kl(one, halves, fitted) for one in ranked),
            )
        )
    heading = "the same with adapters" if fitted else "KL of LoRA steps, nats"
    return table((heading, *(() if halves else ("layers",)), *names), rows)


def _objective(settings: Mapping[str, Any]) -> str:
    """What `sensitivity` weighed KL against."""
    if settings["objective"] == "kv":
        return "sensitivity: KL per byte of K/V that is not stored"
    dtype = f"weights in {settings['bundle_dtype']}" if settings["bundle_dtype"] else "weights as loaded"
    adapters = f", adapters of rank {settings['rank']}" if settings["rank"] else ""
    return f"sensitivity: KL per byte that a LoRA step does not read ({dtype}, {settings['context']} tokens{adapters})"


def _adapters(settings: Mapping[str, Any]) -> str:
    return f"with the adapters of {settings['adapters']}" if settings["adapters"] else "without adapters"


def _fitted(settings: Mapping[str, Any]) -> str:
    form = f"{RUN_SURROGATE} of rank {settings['run_rank']}"
    return f"in closed form, {form}, each run of neighbours as one; a fit makes them better"


def _use(result: Profile) -> str:
    """The command that takes a list; adapters of a longer one, or of a run, are fitted anew for it."""
    settings = result.settings
    if RUN in result.rankings:
        surrogate, rank = RUN_SURROGATE, settings["run_rank"]
    else:
        surrogate, rank = settings["surrogate"], settings["rank"]
    command = "lora-drop-export --model MODEL"
    if settings["adapters"] or RUN in result.rankings:
        command = f"lora-drop fit MODEL --text … --surrogate {surrogate}" + (f" --rank {rank}" if rank else "")
    return f"{command} --drop-list FILE --policy {settings['policy']} --k {settings['k']} --out DIR"


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
        *(["", *_compared(result, fitted=True), _fitted(settings)] if RUN in names else []),
        "",
        "recommended, the least KL:",
        *(
            f"  {out / ranked.file}: {', '.join(ranked.sites) or 'none'}" + (f" ({share})" if what == "half" else "")
            for ranked, share in zip(best, shares, strict=True)
        ),
        f"use one: {_use(result)}",
    ]
