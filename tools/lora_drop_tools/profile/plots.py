"""Figures of a profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_tools.shared.results import figure_bytes

from .measures import DELTAS
from .report import BASES

if TYPE_CHECKING:
    from .result import Profile


def _similarities(result: Profile) -> tuple[tuple[str, list[Mapping[int, float]]], ...]:
    return (
        ("hidden states", [layer.similarity for layer in result.layers]),
        ("less their mean over the window", [layer.centred_similarity for layer in result.layers]),
    )


def _label(panel: Any, what: str, title: str) -> None:
    panel.set_xlabel("layer")
    panel.set_ylabel(what)
    panel.set_title(title, fontsize="small")
    panel.grid(alpha=0.3)


def _draw_similarity(axes: Any, result: Profile) -> None:
    for panel, (title, layers) in zip(axes, _similarities(result), strict=True):
        for delta in DELTAS:
            panel.plot([layer[delta] for layer in layers], ".-", label=f"Δ = {delta}")
        _label(panel, "cosine of outputs at t and t+Δ", title)
        panel.set_ylim(min(0.0, panel.get_ylim()[0]), 1.0)
        panel.legend(fontsize="small", ncols=len(DELTAS))


def _draw_similarity_map(axes: Any, result: Profile) -> None:
    for panel, (title, layers) in zip(axes, _similarities(result), strict=True):
        image = panel.imshow([[layer[delta] for layer in layers] for delta in DELTAS], aspect="auto", cmap="viridis")
        panel.figure.colorbar(image, ax=panel, label="cosine")
        panel.set_yticks(range(len(DELTAS)), list(map(str, DELTAS)))
        panel.set_xlabel("layer")
        panel.set_ylabel("Δ, tokens apart")
        panel.set_title(title, fontsize="small")


def _draw_influence(axes: Any, result: Profile) -> None:
    values = [1 - layer.influence_cosine for layer in result.layers]
    axes[0].bar(range(len(values)), values, color=["C0" if layer.eligible else "lightgrey" for layer in result.layers])
    axes[0].set_yscale("log")
    _label(axes[0], "1 − cosine of input and output", "block influence; grey layers are always kept")


def _draw_base_errors(axes: Any, result: Profile) -> None:
    for base in BASES:
        axes[0].plot([layer.base_errors[base] for layer in result.layers], ".-", label=base)
    axes[0].axhline(1, color="grey", linestyle="--", linewidth=0.8, label="the mean of the outputs")
    _label(axes[0], "distance from the layer's output", "what a surrogate starts from; 1 is no better than the mean")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(fontsize="small")


def _draw_sensitivity(axes: Any, result: Profile) -> None:
    """Each layer alone, and lists as they grow: the greedy one where it was ranked, the lists on other text."""
    alone = {layer.layer: layer.kl_alone for layer in result.layers if layer.kl_alone is not None}
    axes[0].bar(list(alone), list(alone.values()))
    _label(axes[0], "KL of LoRA steps (nats)", "one layer dropped" if alone else "one layer dropped: not measured")
    if result.greedy_kl:
        axes[1].plot(
            range(1, len(result.greedy_kl) + 1), result.greedy_kl, "-", color="grey", label="greedy, as ranked"
        )
    for name in result.rankings:
        lists = [ranked for ranked in result.drop_lists if ranked.ranking == name]
        axes[1].plot([len(r.drop_layers) for r in lists], [r.kl for r in lists], "o--", label=f"{name}, other text")
    _label(axes[1], "KL of LoRA steps (nats)", "drop lists")
    axes[1].set_xlabel("dropped layers")
    axes[1].legend(fontsize="small")
    for panel in axes:
        panel.set_yscale("symlog", linthresh=0.01)
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
