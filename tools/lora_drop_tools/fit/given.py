"""Adapters that a fit goes on from.

Enters: a directory of `lora-drop fit`. Leaves: the plan that they are of, and their matrices. They stand in the place
of the closed form.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.bundle.adapters import AdapterConfig
from lora_drop_runtime.plan.drop_plan import DropPlan

from lora_drop_export.checkpoint.drop_list import DropList
from lora_drop_tools.teacher_forcing.stored import config_with_sites, stored_surrogates

from .settings import FitSettings

if TYPE_CHECKING:
    from lora_drop_export.decoder.loaded import LoadedModel
    from lora_drop_tools.teacher_forcing.surrogates import Surrogates


@dataclass(frozen=True)
class Given:
    """Adapters by what their header says; the matrices are read when the model is known."""

    directory: Path
    config: AdapterConfig

    @property
    def listed(self) -> DropList:
        config = self.config
        return DropList(config.sites or (), always_first=config.always_first, always_last=config.always_last)

    @property
    def digest(self) -> str:
        """Of the matrices' file, by which a fit that goes on knows them again."""
        with (self.directory / "adapter_model.safetensors").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def pairs(self, plan: DropPlan, loaded: LoadedModel, device: Any) -> Surrogates:
        """Of each adapted site of the plan; raises as `stored_surrogates` does."""
        return stored_surrogates(self.directory, plan, loaded, device)


def read_given(settings: FitSettings) -> tuple[FitSettings, Given | None]:
    """The adapters that were asked for, and the settings with the rank and the policy that they bring.

    Raises:
        BundleError, PlanError: these are no adapters, or do not say what they stand in for.
    """
    directory = settings.adapters
    if directory is None:
        return settings, None
    config, _ = config_with_sites(directory)
    brought = (config.policy,) if config.policy else ()
    settings = dataclasses.replace(
        settings,
        adapters=None,
        rank=config.rank,
        policies=settings.policies or brought,
        closed_form_tokens=0,
    )
    return settings, Given(directory, config)
