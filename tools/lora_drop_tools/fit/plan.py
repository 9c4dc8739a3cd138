"""The plan that adapters are fitted for: of a bundle, a drop list, or ρ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_drop_runtime.errors import InputError, PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan, eligible_layers, spread_layers
from lora_drop_runtime.plan.surrogate import DEFAULT_SURROGATE

from .settings import FitSettings

if TYPE_CHECKING:
    from lora_drop_export.decoder.loaded import LoadedModel
    from lora_drop_tools.teacher_forcing.forcing import TeacherForcing


def plan_to_fit(
    loaded: LoadedModel,
    forcing: TeacherForcing,
    drop_layers: Sequence[int] | None,
    drop_ratio: float | None,
    always: tuple[int, int] | None,
    surrogate: str | None,
    injection: str | None,
    settings: FitSettings,
) -> DropPlan:
    """The bundle's plan, or the one that was asked for, with the rank to be fitted."""
    given = {
        "a drop list": drop_layers if drop_layers is not None else drop_ratio,
        "--always-first or --always-last": always,
        "--surrogate": surrogate,
        "--injection": injection,
    }
    if loaded.plan is not None:
        odd = [name for name, value in given.items() if value is not None]
        if odd:
            raise InputError(
                "A bundle brings its own plan.",
                note=f"{loaded.name} is a bundle, and {odd[0]} was given.",
                hint="Leave it out, or give the model that the bundle was made from.",
            )
        plan = loaded.plan
    else:
        windowed = tuple(i for i, size in enumerate(forcing.windows()) if size)
        first, last = always or (3, 1)
        eligible = eligible_layers(len(forcing), first, last, windowed)
        ratio = 0.5 if drop_ratio is None else drop_ratio
        plan = DropPlan(
            num_layers=len(forcing),
            drop_layers=spread_layers(eligible, ratio) if drop_layers is None else tuple(drop_layers),
            surrogate=surrogate or DEFAULT_SURROGATE,
            injection=injection or "block",
            always_first=first,
            always_last=last,
            windowed_layers=windowed,
        )
    if not plan.drop_layers:
        raise PlanError(
            "No layer is dropped, so there is nothing to fit.",
            note=f"The drop list of {loaded.name} is empty.",
            hint="Use --drop-ratio 0.5, --drop-layers or --drop-list.",
        )
    width = forcing.model.get_input_embeddings().weight.shape[1]
    if settings.rank > width:
        raise PlanError(
            "The rank is larger than the hidden size.",
            note=f"--rank is {settings.rank}, the hidden size {width}.",
            hint="Use --rank 16.",
        )
    return dataclasses.replace(plan, rank=settings.rank, k=settings.windows[0], policy=settings.policy)
