"""Adapters in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lora_drop_runtime.plan.drop_plan import DropPlan

from lora_drop_export.staging.owned import Kind

from .settings import FitSettings

if TYPE_CHECKING:
    from lora_drop_export.decoder.loaded import LoadedModel
    from lora_drop_tools.teacher_forcing.surrogates import Surrogates

CONFIG_NAME, WEIGHTS_NAME, RESULT_NAME = "adapter_config.json", "adapter_model.safetensors", "fit.json"
_HALVES = {"": "", "attn": "self_attn.", "mlp": "mlp."}


def _files(root: Path) -> frozenset[str] | None:
    """The files that a fit writes; None where it did not write these, such as other adapters of PEFT's."""
    try:
        plan = json.loads((root / CONFIG_NAME).read_bytes())["lora_drop"]
        result = json.loads((root / RESULT_NAME).read_bytes())
        sites = plan["sites" if "sites" in plan else "drop_layers"]  # version 0.1 wrote the latter
        known = isinstance(sites, list) and plan["base_fingerprint"] == result["fingerprint"]
        known = known and isinstance(result["stages"], dict) and isinstance(result["losses"], list)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return frozenset((CONFIG_NAME, WEIGHTS_NAME, RESULT_NAME)) if known else None


ADAPTERS = Kind("directory of fitted adapters", CONFIG_NAME, _files)


def save_adapters(
    directory: Path, pairs: Surrogates, plan: DropPlan, loaded: LoadedModel, settings: FitSettings, layers: str
) -> None:
    """PEFT's two files; `layers` is the name of the model's list of decoder layers."""
    from safetensors.numpy import save

    tensors = {}
    for site, matrices in pairs.items():
        layer, _, half = site.partition(".")
        prefix = f"base_model.model.{layers}.{layer}.{_HALVES[half]}"
        for part, matrix in zip(plan.form.matrices, matrices, strict=True):
            scale = plan.rank / settings.lora_alpha if part == "B" else 1.0
            values = matrix.detach().cpu().float().numpy() * np.float32(scale)
            tensors[f"{prefix}lora_{part}.weight"] = np.ascontiguousarray(values)
    (directory / WEIGHTS_NAME).write_bytes(save(tensors))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": loaded.name,
        "r": plan.rank,
        "lora_alpha": settings.lora_alpha,
        "lora_drop": {
            "sites": list(plan.sites),
            "bare_sites": list(plan.bare_sites),
            "surrogate": plan.surrogate,
            "base_fingerprint": loaded.fingerprint,
            "k": list(settings.k),
            "policy": plan.policy,
            "apart": settings.apart,
            "always_first": plan.always_first,
            "always_last": plan.always_last,
        },
    }
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
