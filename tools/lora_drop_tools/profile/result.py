"""What a profile found, as it is written to disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .measures import SiteFigures

PROFILE_NAME = "profile.json"


@dataclass(frozen=True)
class SiteProfile(SiteFigures):
    """Attributes:
    site: a layer, or a half of one.
    eligible: whether it may be dropped.
    saved_bytes: that a LoRA step does not read when it is dropped, as the objective counts them.
    kl_alone: KL of LoRA steps when it alone is dropped; None where that was not measured.
    """

    site: str
    eligible: bool
    saved_bytes: float
    kl_alone: float | None


def list_file(ranking: str, rho: float) -> str:
    """The file of a drop list in the profile's directory."""
    return f"drop-{ranking}-{rho:g}.json"


@dataclass(frozen=True)
class RankedList:
    """A drop list.

    Attributes:
        rho: asked for; sizes.py says which lists stand under it.
        sites: of the list, in order.
        kl: mean KL(full model ‖ LoRA step) in nats, on text that no ranking saw.
        kl_fitted: the same with adapters in closed form in place (runs.py); None where `run` was no ranking.
        attention_share: of the eligible layers' attentions, how many are dropped.
        weight_share: of the bytes of the eligible layers' weights, how many a LoRA step does not read.
    """

    ranking: str
    rho: float
    sites: tuple[str, ...]
    kl: float
    attention_share: float
    weight_share: float
    kl_fitted: float | None = None

    @property
    def file(self) -> str:
        return list_file(self.ranking, self.rho)


@dataclass(frozen=True)
class Profile:
    """What profile.json holds.

    Attributes:
        settings: the arguments, and how much text was measured.
        sites: every layer, or every half.
        rankings: name → eligible sites, the first to be dropped first; of `sensitivity` as many as were found, of `run`
            those of the shortest list, then what each longer one adds.
        greedy_kl: of the lists that `sensitivity` grows by one site each, on the text that it ranks on.
    """

    model: str
    fingerprint: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    sites: tuple[SiteProfile, ...]
    rankings: Mapping[str, tuple[str, ...]]
    greedy_kl: tuple[float, ...]
    drop_lists: tuple[RankedList, ...]

    def best(self, rho: float) -> RankedList:
        """The list with the least KL, with adapters where that is known; of equal ones the first ranking's."""
        lists = (ranked for ranked in self.drop_lists if ranked.rho == rho)
        return min(lists, key=lambda ranked: ranked.kl if ranked.kl_fitted is None else ranked.kl_fitted)


def profile_files(root: Path) -> frozenset[str] | None:
    """The files of a profile beside its figures, as its profile.json has them; None where it is not of this program."""
    try:
        data = json.loads((root / PROFILE_NAME).read_bytes())
        lists = [list_file(one["ranking"], one["rho"]) for one in data["drop_lists"]]
        measured = data["sites" if "sites" in data else "layers"]  # version 0.1 wrote the latter
        known = isinstance(data["fingerprint"], str) and isinstance(data["rankings"], dict) and bool(measured)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return frozenset((PROFILE_NAME, *lists)) if known else None
