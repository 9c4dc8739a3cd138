"""Results that are written: figures."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
from lora_drop_tools.shared.results import add_legend, colours, figure_bytes


def _figure(name: str) -> Any:
    """A name at every place where figures have one, and an axis whose ticks are formulas."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.plot([1, 1000], [1, 1000], label=name)
    axes.set_yscale("log")
    axes.legend()
    axes.set_title(name)
    figure.suptitle(name)
    return figure


@pytest.mark.parametrize("name", ["cost$5_and_$6", "of$x$"])
def test_names_with_dollars_are_no_formulas(name: str) -> None:
    """The first one cannot be read as a formula, the second would lose its dollars; `\\$` is matplotlib's own way."""
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `bench`, is not installed")
    expected = io.BytesIO()
    _figure(name.replace("$", r"\$")).savefig(expected, format="png", dpi=150, metadata={"Software": "lora-drop"})
    assert figure_bytes(_figure(name)) == expected.getvalue()


@pytest.mark.parametrize(("count", "name"), [(30, "k"), (2, "bundle-" * 20)], ids=["many", "long"])
def test_a_legend_that_has_no_room_stands_below_the_axes(count: int, name: str) -> None:
    """The whole of it is in the picture, the axes keep their size, and no two curves have one colour."""
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `bench`, is not installed")
    from matplotlib.figure import Figure

    pictures, heights = [], []
    for entries in (1, count):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for n, colour in enumerate(colours(entries)):
            axes.plot([0, 1], [n, n], color=colour, label="k" if entries == 1 else f"{name} {n}")
        axes.set_xlabel("x")
        add_legend(axes)
        pictures.append(struct.unpack(">II", figure_bytes(figure)[16:24]))
        heights.append(axes.get_window_extent().height)
    assert len({line.get_color() for line in axes.lines}) == count
    assert heights[1] > 0.95 * heights[0]
    legend = axes.get_legend().get_window_extent()
    assert legend.y1 < axes.get_window_extent().y0
    assert legend.x1 < 1.1 * figure.bbox.x1
    assert pictures[1][1] > pictures[0][1]
