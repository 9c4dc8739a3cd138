"""What may be dropped, and how long the drop lists can be.

Enters: a model's layers, the settings, adapters that are in place. Leaves: the plan whose sites are ranked, and these
sites. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_drop_runtime.bounds import Bounds
from lora_drop_runtime.errors import PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan, eligible_layers
from lora_drop_runtime.plan.policy import DEFAULT_POLICY
from lora_drop_runtime.plan.sites import listed
from lora_drop_runtime.plan.surrogate import DEFAULT_SURROGATE

from .fitted import Fitted
from .settings import ProfileSettings
from .sizes import Savings

if TYPE_CHECKING:
    from lora_drop_export.decoder.loaded import LoadedModel

RATIOS = (0.25, 0.5, 0.75)


def plan_to_profile(
    windows: Sequence[int], settings: ProfileSettings, fitted: Fitted | None, loaded: LoadedModel
) -> DropPlan:
    """The plan whose eligible sites are ranked; it drops none.

    Raises:
        PlanError: no layer is eligible, or the rank is larger than the hidden size.
        InputError: nothing is saved under the policy that the adapters or the bundle bring.
    """
    from lora_drop_export.compiler.options import always_kept

    width = loaded.model.get_input_embeddings().weight.shape[1]
    Bounds(0, width).whole("--rank", settings.rank, why="the model's hidden size", error=PlanError)
    theirs = None if fitted is None else fitted.config
    first, last = always_kept(settings, theirs)
    brought = (theirs and theirs.policy) or (loaded.plan and loaded.plan.policy) or DEFAULT_POLICY
    policy = settings.policy or brought
    settings.check_under(policy)
    windowed = tuple(i for i, size in enumerate(windows) if size)
    layers = eligible_layers(len(windows), first, last)
    no_mlps = not settings.halves or settings.objective == "kv"
    if not (eligible_layers(len(windows), first, last, windowed, policy) if no_mlps else layers):
        raise PlanError(
            "No layer of the model may be dropped.",
            note=f"Of {len(windows)} the first {first} and the last {last} are always kept"
            + (
                f", and {len(windowed)} have a sliding window, a short convolution or a recurrent state."
                if windowed
                else "."
            ),
            hint="Lower --always-first or --always-last."
            if not layers
            else "Use --policy backfill without --objective kv: none of these may have holes in its K/V."
            if settings.objective == "kv"
            else "Use --policy backfill, or --sites halves for their MLPs.",
        )
    return DropPlan(
        len(windows),
        (),
        settings.k,
        surrogate=(theirs and theirs.surrogate) or DEFAULT_SURROGATE,
        policy=policy,
        always_first=first,
        always_last=last,
        windowed_layers=windowed,
    )


@dataclass(frozen=True)
class Choice:
    """What may be dropped, and the shares ρ that lists of it can reach, rising; without adapters all of RATIOS."""

    candidates: tuple[str, ...]
    ratios: tuple[float, ...]
    saved: Savings

    @property
    def rounds(self) -> int:
        """How long the longest list can become: with the sites that save least."""
        return len(self.saved.list_under(sorted(self.candidates, key=self.saved.of), self.ratios[-1]))


def choose(saved: Savings, settings: ProfileSettings, fitted: Fitted | None) -> Choice:
    """What may be dropped.

    Raises:
        PlanError: nothing saves any bytes, or too little for a list.
    """
    candidates = saved.candidates(settings.halves)
    if not candidates:
        raise PlanError(
            f"No {'half of a layer' if settings.halves else 'layer'} saves any bytes.",
            note=f"An adapter of rank {settings.rank} takes as many as what it stands for.",
            hint="Lower --rank." if fitted is None else "Fit adapters of a lower rank.",
        )
    if fitted is None:
        return Choice(candidates, RATIOS, saved)
    candidates = tuple(site for site in candidates if site in fitted.sites)
    ratios = tuple(rho for rho in RATIOS if saved.reaches(candidates, rho))
    if not ratios:
        raise PlanError(
            "The adapters stand in for too little: no drop list can be made of it.",
            note=f"They have {listed(candidates)}; the shortest list leaves out ρ = {RATIOS[0]:g}.",
            hint="Fit adapters for more layers: the closed form alone (--steps 0) is enough to rank by.",
        )
    return Choice(candidates, ratios, saved)
