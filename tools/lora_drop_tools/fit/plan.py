"""The plan that adapters are fitted for: of a bundle, a drop list, or ρ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_drop_runtime.bounds import Bounds
from lora_drop_runtime.errors import InputError, PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan, eligible_layers, spread_layers
from lora_drop_runtime.plan.policy import DEFAULT_POLICY, POLICIES
from lora_drop_runtime.plan.sites import half_of, injected, sorted_sites
from lora_drop_runtime.plan.sites import listed as listed_sites
from lora_drop_runtime.plan.surrogate import DEFAULT_SURROGATE

from .settings import FitSettings

if TYPE_CHECKING:
    from lora_drop_export.checkpoint.drop_list import DropList
    from lora_drop_export.decoder.loaded import LoadedModel

    from .given import Given


def _bare_sites(sites: Sequence[str], adapters_for: str) -> tuple[str, ...]:
    """Those that get no adapter."""
    if adapters_for == "all":
        return ()
    whole = [site for site in sites if not half_of(site)]
    if whole:
        raise PlanError(
            f"--adapters-for {adapters_for} chooses between halves.",
            note=f"Layer {whole[0]} is dropped whole.",
            hint="Use --injection attn_mlp, which drops both halves of each layer.",
        )
    bare = tuple(site for site in sites if half_of(site) != adapters_for)
    if len(bare) == len(sites):
        raise PlanError(
            "No dropped half would have an adapter, so there is nothing to fit.",
            note=f"--adapters-for is {adapters_for}, the drop list is {listed_sites(sites)}.",
            hint="Leave --adapters-for out.",
        )
    return bare


def _chosen_plan(
    windows: Sequence[int], settings: FitSettings, listed: DropList | None, given: Given | None
) -> DropPlan:
    """The plan that was asked for, of a model that brings none."""
    windowed = tuple(i for i, size in enumerate(windows) if size)
    first = settings.always_first if listed is None or settings.always_first is not None else listed.always_first
    last = settings.always_last if listed is None or settings.always_last is not None else listed.always_last
    first, last = 3 if first is None else first, 1 if last is None else last
    policy = settings.policies[0] if settings.policies else DEFAULT_POLICY
    eligible = eligible_layers(len(windows), first, last, windowed, policy)
    ratio = 0.5 if settings.drop_ratio is None else settings.drop_ratio
    sites = injected(spread_layers(eligible, ratio) if listed is None else listed.sites, settings.injection)
    return DropPlan(
        num_layers=len(windows),
        sites=sites,
        surrogate=settings.surrogate or (given and given.config.surrogate) or DEFAULT_SURROGATE,
        rank=settings.rank,
        bare_sites=given.config.bare_sites if given else _bare_sites(sites, settings.adapters_for or "all"),
        policy=policy,
        always_first=first,
        always_last=last,
        windowed_layers=windowed,
    )


def _check_nothing_chosen(loaded: LoadedModel, settings: FitSettings, listed: DropList | None) -> None:
    """Refuse options that would change the plan of a bundle."""
    given = {
        "a drop list": listed if listed is not None else settings.drop_ratio,
        "--always-first": settings.always_first,
        "--always-last": settings.always_last,
        "--surrogate": settings.surrogate,
        "--injection": settings.injection,
        "--adapters-for": settings.adapters_for,
    }
    odd = [name for name, value in given.items() if value is not None]
    if odd:
        raise InputError(
            "A bundle brings its own plan.",
            note=f"{loaded.name} is a bundle, and {odd[0]} was given.",
            hint="Leave it out, or give the model that the bundle was made from.",
        )


def _check_policies(plan: DropPlan, settings: FitSettings) -> None:
    for policy in settings.policies:
        plan.check_policy(POLICIES[policy])


def listed_layers(settings: FitSettings) -> DropList | None:
    """The drop list that was given, from a file or by its layers."""
    from lora_drop_export.checkpoint.drop_list import DropList, read_drop_list

    if settings.drop_list is not None:
        return read_drop_list(settings.drop_list)
    return None if settings.drop_layers is None else DropList(sorted_sites(settings.drop_layers))


def plan_to_fit(
    loaded: LoadedModel,
    windows: Sequence[int],
    settings: FitSettings,
    listed: DropList | None,
    given: Given | None = None,
) -> DropPlan:
    """The bundle's plan, or the one that was asked for, with the rank, window and policy to be fitted.

    Args:
        windows: each layer's sliding window in positions, 0 for none.
        listed: what is to be dropped of a model; with `given` its own list.
        given: adapters to go on from.

    Raises:
        InputError: the model brings a plan, and another one was asked for.
        PlanError: the plan drops nothing or leaves all bare, the rank is larger than the hidden size, or a bundle
            cannot be decoded under the policy.
    """
    width = loaded.model.get_input_embeddings().weight.shape[1]
    Bounds(1, width).whole("--rank", settings.rank, why="the model's hidden size", error=PlanError)
    if loaded.plan is None:
        plan = _chosen_plan(windows, settings, listed, given)
    else:
        _check_nothing_chosen(loaded, settings, None if given else listed)
        plan = loaded.plan
        _check_policies(plan, settings)
        policy = settings.policies[0] if settings.policies else plan.policy
        plan = dataclasses.replace(plan, rank=settings.rank, policy=policy)
    _check_policies(plan, settings)
    if not plan.sites:
        raise PlanError(
            "No layer is dropped, so there is nothing to fit.",
            note=f"The drop list of {loaded.name} is empty.",
            hint="Use --drop-ratio 0.5, --drop-layers or --drop-list."
            if loaded.plan is None
            else "Give the model that the bundle was made from, with --drop-ratio, --drop-layers or --drop-list.",
        )
    if settings.apart and plan.form.of_runs:
        raise PlanError(
            "These surrogates mean something with their neighbours alone, so they are not fitted apart.",
            note=f"--surrogate is {plan.surrogate}.",
            hint=f"Leave --apart out; for profile --adapters fit with --surrogate {DEFAULT_SURROGATE} --apart.",
        )
    return dataclasses.replace(plan, k=settings.k[0])
