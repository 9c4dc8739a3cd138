"""Figures of a profile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lora_drop_tools.profile.plots import _draw_sensitivity


def test_a_ranking_has_one_colour_and_no_curve_stands_on_the_frame() -> None:
    """Eight curves had eight colours of matplotlib's, the last of them the grey of the greedy list."""
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `bench`, is not installed")
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure

    names = ("sensitivity", "influence", "temporal", "run")
    lists = [
        SimpleNamespace(ranking=name, sites=["3"] * count, kl=0.2 * count, kl_fitted=0.15 * count)
        for name in names
        for count in (1, 2, 3)
    ]
    sites = [SimpleNamespace(site=str(n), kl_alone=0.1 * n) for n in range(1, 6)]
    result: Any = SimpleNamespace(
        sites=sites, greedy_kl=[0.1, 0.2, 0.3], rankings=names, drop_lists=lists, settings={"sites": "layers"}
    )
    panels = Figure().subplots(2, 1)
    _draw_sensitivity(panels, result)
    colours: dict[str, set[str]] = {}
    for line in panels[1].lines:
        colours.setdefault(str(line.get_label()).partition(",")[0], set()).add(to_hex(line.get_color()))
    assert all(len(own) == 1 for own in colours.values())
    assert len(set.union(*colours.values())) == len(colours) == 5
    assert panels[1].get_ylim()[1] > 1.2 * 0.6
