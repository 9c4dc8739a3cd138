"""Adapters in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lora_drop_runtime.plan.drop_plan import DropPlan

from .settings import FitSettings

if TYPE_CHECKING:
    from lora_drop_export.decoder.loaded import LoadedModel
    from lora_drop_tools.teacher_forcing.surrogates import Surrogates

CONFIG_NAME = "adapter_config.json"
_HALVES = {"": "", "attn": "self_attn.", "mlp": "mlp."}


def save_adapters(
    directory: Path, pairs: Surrogates, plan: DropPlan, loaded: LoadedModel, settings: FitSettings, layers: str
) -> None:
    """PEFT's two files; `layers` is the name of the model's list of decoder layers."""
    from safetensors.numpy import save_file

    tensors = {}
    for site, (a, b) in pairs.items():
        layer, _, half = site.partition(".")
        prefix = f"base_model.model.{layers}.{layer}.{_HALVES[half]}"
        tensors[f"{prefix}lora_A.weight"] = np.ascontiguousarray(a.detach().cpu().float().numpy())
        scaled = b.detach().cpu().float().numpy() * (plan.rank / settings.lora_alpha)
        tensors[f"{prefix}lora_B.weight"] = np.ascontiguousarray(scaled)
    path = directory / "adapter_model.safetensors"
    save_file(tensors, path)
    path.chmod(0o644)  # the library leaves it to its owner alone
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": loaded.name,
        "r": plan.rank,
        "lora_alpha": settings.lora_alpha,
        "lora_drop": {
            "drop_layers": list(plan.drop_layers),
            "surrogate": plan.surrogate,
            "injection": plan.injection,
            "base_fingerprint": loaded.fingerprint,
            "k": list(settings.k),
            "policy": plan.policy,
            "always_first": plan.always_first,
            "always_last": plan.always_last,
        },
    }
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n")
