"""Figures of a profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.plan.sites import MLP, half_of, layer_of

from lora_drop_tools.shared.results import colours, figure_bytes

from .measures import DELTAS
from .report import BASES

if TYPE_CHECKING:
    from .result import Profile, SiteProfile


def _similarities(result: Profile) -> tuple[tuple[str, list[Mapping[int, float]]], ...]:
    return (
        ("hidden states", [site.similarity for site in result.sites]),
        ("less their mean over the window", [site.centred_similarity for site in result.sites]),
    )


def _places(result: Profile) -> tuple[list[float], float, str]:
    """Where sites stand on an axis of layers, how wide one is, and what the axis is called."""
    places = [layer_of(one.site) + (0.5 if half_of(one.site) == MLP else 0.0) for one in result.sites]
    halves = any(half_of(one.site) for one in result.sites)
    return places, 0.4 if halves else 0.8, "layer (its MLP half a place to the right)" if halves else "layer"


def _color(one: SiteProfile) -> str:
    return "C1" if half_of(one.site) == MLP else "C0"


def _label(panel: Any, result: Profile, what: str, title: str) -> None:
    panel.set_xlabel(_places(result)[2])
    panel.set_ylabel(what)
    panel.set_title(title, fontsize="small")
    panel.grid(alpha=0.3)


def _draw_similarity(axes: Any, result: Profile) -> None:
    for panel, (title, sites) in zip(axes, _similarities(result), strict=True):
        for delta in DELTAS:
            panel.plot(_places(result)[0], [site[delta] for site in sites], ".-", label=f"Δ = {delta}")
        _label(panel, result, "cosine of outputs at t and t+Δ", title)
        panel.set_ylim(min(0.0, panel.get_ylim()[0]), 1.0)
        panel.legend(fontsize="small", ncols=len(DELTAS))


def _draw_similarity_map(axes: Any, result: Profile) -> None:
    for panel, (title, sites) in zip(axes, _similarities(result), strict=True):
        places, width, what = _places(result)
        span = (places[0] - width / 1.6, places[-1] + width / 1.6, len(DELTAS) - 0.5, -0.5)
        rows = [[site[delta] for site in sites] for delta in DELTAS]
        image = panel.imshow(rows, aspect="auto", cmap="viridis", extent=span)
        panel.figure.colorbar(image, ax=panel, label="cosine")
        panel.set_yticks(range(len(DELTAS)), list(map(str, DELTAS)))
        panel.set_xlabel(what)
        panel.set_ylabel("Δ, tokens apart")
        panel.set_title(title, fontsize="small")


def _draw_influence(axes: Any, result: Profile) -> None:
    places, width, _ = _places(result)
    values = [1 - site.influence_cosine for site in result.sites]
    colors = [_color(one) if one.eligible else "lightgrey" for one in result.sites]
    axes[0].bar(places, values, width, color=colors)
    axes[0].set_yscale("log")
    _label(axes[0], result, "1 − cosine of input and output", "influence; grey ones are always kept")


def _draw_base_errors(axes: Any, result: Profile) -> None:
    for base in BASES:
        axes[0].plot(_places(result)[0], [site.base_errors[base] for site in result.sites], ".-", label=base)
    axes[0].axhline(1, color="grey", linestyle="--", linewidth=0.8, label="the mean of the outputs")
    _label(axes[0], result, "distance from the output", "what a surrogate starts from; 1 is no better than the mean")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize="small")


def _draw_sensitivity(axes: Any, result: Profile) -> None:
    """Each site alone, and lists as they grow: the greedy one where it was ranked, the lists on other text."""
    places, width, _ = _places(result)
    alone = [(at, one) for at, one in zip(places, result.sites, strict=True) if one.kl_alone is not None]
    colors = [_color(one) for _, one in alone]
    axes[0].bar([at for at, _ in alone], [one.kl_alone for _, one in alone], width, color=colors)
    what = "one half dropped" if width < 0.5 else "one layer dropped"
    _label(axes[0], result, "KL of LoRA steps (nats)", what if alone else f"{what}: not measured")
    if result.greedy_kl:
        axes[1].plot(
            range(1, len(result.greedy_kl) + 1), result.greedy_kl, "-", color="grey", label="greedy, as ranked"
        )
    for name, colour in zip(result.rankings, colours(len(result.rankings)), strict=True):
        lists = [ranked for ranked in result.drop_lists if ranked.ranking == name]
        axes[1].plot(
            [len(r.sites) for r in lists], [r.kl for r in lists], "o--", color=colour, label=f"{name}, other text"
        )
        fitted = [(len(r.sites), r.kl_fitted) for r in lists if r.kl_fitted is not None]
        if fitted:
            axes[1].plot(*zip(*fitted, strict=True), "s-", color=colour, label=f"{name}, with adapters")
    _label(axes[1], result, "KL of LoRA steps (nats)", "drop lists")
    axes[1].set_xlabel(f"dropped {result.settings['sites']}")
    axes[1].legend(fontsize="small")
    for panel in axes:
        if panel.get_ylim()[1] > 0.1:  # below it such a scale has no ticks to read
            panel.set_yscale("symlog", linthresh=0.01)
            panel.set_ylim(top=1.5 * panel.get_ylim()[1])  # else the highest stand on the frame
        panel.set_ylim(bottom=0)
        panel.xaxis.get_major_locator().set_params(integer=True)


_FIGURES: tuple[tuple[str, int, Callable[[Any, Profile], None]], ...] = (  # name, panels, what draws them
    ("similarity", 2, _draw_similarity),
    ("similarity_map", 2, _draw_similarity_map),
    ("influence", 1, _draw_influence),
    ("base_errors", 1, _draw_base_errors),
    ("sensitivity", 2, _draw_sensitivity),
)
FIGURE_FILES = frozenset(f"{name}.png" for name, *_ in _FIGURES)


def write_plots(result: Profile, directory: Path) -> list[Path]:
    """Similarity as curves and as a map (the paper's Figs. 1 and 4), influence, base errors, sensitivity."""
    from matplotlib.figure import Figure

    written = []
    for name, panels, draw in _FIGURES:
        figure = Figure(figsize=(6.4, 4.0 * panels), layout="constrained")
        figure.suptitle(result.model, fontsize="medium")
        draw(figure.subplots(panels, 1, squeeze=False)[:, 0], result)
        written.append(directory / f"{name}.png")
        written[-1].write_bytes(figure_bytes(figure))
    return written
