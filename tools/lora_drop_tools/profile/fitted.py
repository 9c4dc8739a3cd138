"""Adapters that are in place while what they stand in for is ranked.

Enters: a directory of `lora-drop fit`. Leaves: the sites that may be ranked, and a pair of matrices for each of them
that has an adapter. Measures nothing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.bundle.adapters import AdapterConfig
from lora_drop_runtime.command_line import refuse_unused
from lora_drop_runtime.errors import PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.policy import DEFAULT_POLICY
from lora_drop_runtime.plan.sites import half_of, layer_of, listed
from lora_drop_runtime.plan.surrogate import DEFAULT_SURROGATE

from lora_drop_tools.teacher_forcing.stored import config_with_sites, stored_surrogates

from .settings import SITES

if TYPE_CHECKING:
    from lora_drop_export.decoder.loaded import LoadedModel
    from lora_drop_tools.teacher_forcing.surrogates import Surrogates

    from .settings import ProfileSettings


@dataclass(frozen=True)
class Fitted:
    """Adapters by what their header says; the matrices are read when the model is known.

    Attributes:
        sites: what they stand in for, all of it whole layers or all halves.
    """

    directory: Path
    config: AdapterConfig
    sites: tuple[str, ...]

    def matrices(self, plan: DropPlan, loaded: LoadedModel, device: Any) -> Surrogates:
        """A [r, d] and s·B [d, r] of each site that has an adapter, float32 on the device.

        Args:
            plan: without sites; with the adapters' surrogate.

        Raises:
            PlanError, BundleError: they were fitted for another model, or for layers that the plan keeps.
        """
        own = self.config
        theirs = dataclasses.replace(plan, sites=self.sites, bare_sites=own.bare_sites, rank=own.rank)
        return stored_surrogates(self.directory, theirs, loaded, device)


def read_fitted(settings: ProfileSettings) -> tuple[ProfileSettings, Fitted | None]:
    """The adapters that were asked for, and the settings with what they bring.

    Raises:
        InputError: an option was given that they bring.
        BundleError, PlanError: these are no adapters, or of whole layers and of halves.
    """
    directory = settings.adapters
    if directory is None:
        return settings, None
    refuse_unused(settings, ("sites", "rank"), "--adapters brings it", "leave --adapters out")
    config, sites = config_with_sites(directory)
    halves = any(map(half_of, sites))
    if halves and not all(map(half_of, sites)):
        raise PlanError(
            "The adapters stand in for whole layers and for halves of others, which are not ranked together.",
            note=f"{directory} has {listed(sites)}.",
            hint="Fit adapters for whole layers alone, or for halves alone.",
        )
    fitted_for = DropPlan(
        1 + max(map(layer_of, sites)),
        sites,
        surrogate=config.surrogate or DEFAULT_SURROGATE,
        rank=config.rank,
        bare_sites=config.bare_sites,
        always_first=0,
        always_last=0,
        policy=config.policy or DEFAULT_POLICY,
    )
    if fitted_for.form.of_runs:
        raise PlanError(
            "The adapters mean something with their neighbours alone, and say nothing of another drop list.",
            note=f"{directory} was fitted with --surrogate {fitted_for.surrogate}.",
            hint=f"Fit them for profile with: lora-drop fit --surrogate {DEFAULT_SURROGATE} --apart",
        )
    together = next((run for run in fitted_for.surrogate_runs if len(run) > 1), None)
    if config.apart is False and together:
        raise PlanError(
            "The adapters of neighbours were fitted as one, so they say nothing of a single layer.",
            note=f"{directory} has {listed(together)} together.",
            hint="Fit them for profile with: lora-drop fit --apart",
        )
    rank = config.rank if settings.objective == "speed" else settings.rank
    return dataclasses.replace(settings, sites=SITES[halves], rank=rank), Fitted(directory, config, sites)
