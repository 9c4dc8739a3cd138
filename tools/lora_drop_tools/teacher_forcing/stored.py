"""Adapters of an earlier fit, as surrogates of a plan."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_drop_runtime.bundle.adapters import AdapterConfig, read_adapter_config, read_adapters
from lora_drop_runtime.errors import PlanError
from lora_drop_runtime.plan.drop_plan import DropPlan

from .surrogates import Surrogates

if TYPE_CHECKING:
    from lora_drop_export.decoder.loaded import LoadedModel


def config_with_sites(directory: Path) -> tuple[AdapterConfig, tuple[str, ...]]:
    """The header of adapters, and the sites that they stand in for.

    Raises:
        BundleError, PlanError: these are no adapters, or do not say their sites.
    """
    config = read_adapter_config(directory)
    if not config.sites:
        raise PlanError(
            "The adapters do not say what they stand in for.",
            note=f'{directory} names no sites under "lora_drop".',
            hint="Use adapters written by: lora-drop fit",
        )
    return config, config.sites


def stored_surrogates(directory: Path, plan: DropPlan, loaded: LoadedModel, device: Any) -> Surrogates:
    """A [r, d] (or [r, 2d]), s·B [d, r] and, where it is gated, G [r, d] of each adapted site, float32 on the device.

    Raises:
        PlanError, BundleError: they were fitted for another model or plan, or are damaged.
    """
    import torch

    width = loaded.model.get_input_embeddings().weight.shape[1]
    put = functools.partial(torch.tensor, device=device)
    found = read_adapters(directory, plan, width, loaded.fingerprint)
    return {site: tuple(map(put, matrices)) for site, matrices in found.items()}
