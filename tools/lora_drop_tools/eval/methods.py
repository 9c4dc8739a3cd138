"""Methods of the literature that a plan may be, so that a table can name them beside LoRA-Drop.

    Unified Layer Skipping   layers spread evenly, nothing in their place
    FlexiDepth, static       under `fill`, attentions left out and MLPs replaced by adapters, in the same layers

FlexiDepth itself routes each token; a plan is fixed, hence static.
"""

from __future__ import annotations

from lora_drop_runtime.plan.drop_plan import DropPlan, spread_layers
from lora_drop_runtime.plan.sites import ATTENTION, half_of
from lora_drop_runtime.plan.surrogate import DEFAULT_SURROGATE

LORA_DROP = "LoRA-Drop"


def _is_layer_skipping(plan: DropPlan) -> bool:
    return (
        plan.surrogate == DEFAULT_SURROGATE
        and not plan.rank
        and plan.sites == tuple(map(str, spread_layers(plan.eligible_layers, plan.rho)))
    )


def _is_flexidepth(plan: DropPlan) -> bool:
    attentions = tuple(site for site in plan.sites if half_of(site) == ATTENTION)
    return (
        plan.surrogate == DEFAULT_SURROGATE
        and plan.refresh_policy.fills
        and not plan.halves_alone
        and bool(attentions)
        and 2 * len(attentions) == len(plan.sites)
        and plan.bare_sites == attentions
    )


def method_of(plan: DropPlan) -> str:
    """What the literature calls such a plan; `LoRA-Drop` where it has no other name."""
    if not plan.sites:
        return LORA_DROP
    if _is_layer_skipping(plan):
        return "Unified Layer Skipping"
    return "FlexiDepth, static" if _is_flexidepth(plan) else LORA_DROP
