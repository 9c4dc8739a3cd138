"""What a surrogate replaces: a whole layer (`9`), or one of its halves (`9.attn`, `9.mlp`).

Enters: what a user typed or a file says. Leaves: names in one spelling and order. Knows no model and no plan.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lora_drop_runtime.errors import PlanError

ATTENTION, MLP = "attn", "mlp"
INJECTIONS = ("block", "attn_mlp")  # one surrogate per layer of a drop list, or one per half
_NAME = re.compile(rf"(0|[1-9][0-9]{{0,8}})(?:\.({ATTENTION}|{MLP}))?", re.ASCII)


def layer_of(site: str) -> int:
    """The layer that a site is, or is a half of."""
    return int(site.partition(".")[0])


def half_of(site: str) -> str:
    """`attn` or `mlp`, empty for a whole layer."""
    return site.partition(".")[2]


def sorted_sites(sites: Iterable[int | str]) -> tuple[str, ...]:
    """Sites by their names, in the order of their computation; a number is a whole layer.

    Raises:
        PlanError: one is no site.
    """
    names: list[str] = [str(site) if type(site) is int else site for site in sites]  # type: ignore[misc]
    for name in names:
        if not isinstance(name, str) or _NAME.fullmatch(name) is None:
            raise PlanError(
                "The drop list names something that is no layer and no half of one.",
                note=f"{name!r:.40} was given; known are 9, 9.attn and 9.mlp.",
                hint="Write it as --drop-layers 4,6,9 or --drop-layers 4,9.attn,12.mlp.",
            )
    return tuple(sorted(names, key=lambda name: (layer_of(name), half_of(name))))


def in_halves(sites: Iterable[int | str]) -> tuple[str, ...]:
    """The same with both halves in the place of each whole layer."""
    halves: list[str] = []
    for site in sorted_sites(sites):
        halves += [site] if half_of(site) else [f"{site}.{ATTENTION}", f"{site}.{MLP}"]
    return tuple(halves)


def injected(sites: Iterable[int | str], injection: str | None) -> tuple[str, ...]:
    """A drop list under `--injection`: `attn_mlp` writes both halves in the place of each layer.

    Raises:
        PlanError: `block`, and the list names a half.
    """
    sites = sorted_sites(sites)
    halves = [site for site in sites if half_of(site)]
    if injection == INJECTIONS[0] and halves:
        raise PlanError(
            "--injection block puts a surrogate in the place of whole layers.",
            note=f"The drop list names {halves[0]}.",
            hint="Leave --injection out.",
        )
    return in_halves(sites) if injection == INJECTIONS[1] else sites


def parse_sites(text: str) -> tuple[str, ...]:
    """`"4,9.attn"` as sites."""
    return sorted_sites(part.strip() for part in text.split(","))


def listed(sites: Iterable[str]) -> str:
    """A drop list for a person to read."""
    return ", ".join(sites)
