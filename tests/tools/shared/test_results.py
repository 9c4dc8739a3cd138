"""Results that are written: figures."""

from __future__ import annotations

import io
from typing import Any

import pytest
from lora_drop_tools.shared.results import figure_bytes


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
