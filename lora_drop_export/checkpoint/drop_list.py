"""A drop list as `lora-drop profile` writes it, or a user by hand.

Enters: a JSON file. Leaves: a `DropList`, refused for another model, with a warning for a bad base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_drop_runtime.errors import BundleError, InputError, PlanError
from lora_drop_runtime.files import read_bounded
from lora_drop_runtime.plan.policy import POLICIES
from lora_drop_runtime.plan.sites import half_of, layer_of, listed, sorted_sites

_MOST_BYTES = 64 << 20


def check_drop_list(chosen_for: str | None, name: str, fingerprint: str) -> None:
    """Refuse a drop list that was chosen for another model than `name`; without a fingerprint it fits any.

    Raises:
        PlanError: it was.
    """
    if chosen_for not in (None, fingerprint):
        raise PlanError(
            "The drop list was chosen for another model.",
            note=f"It was chosen for {str(chosen_for)[:12]}, {name} is {fingerprint[:12]}.",
            hint="Choose layers of this model with lora-drop profile, or name them with --drop-layers.",
        )


@dataclass(frozen=True)
class DropList:
    """What a drop list's file says.

    Attributes:
        sites: to be dropped.
        fingerprint: of the model that they were chosen for, None where the file does not say.
        always_first, always_last: layers that could not be chosen, None where the file does not say.
        policy: under which they were chosen, None where the file does not say.
        base_errors: surrogate → layer → mean distance of its base from the layer's output, over that of the outputs'
            mean; what was measured.
    """

    sites: tuple[str, ...]
    fingerprint: str | None = None
    base_errors: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    always_first: int | None = None
    always_last: int | None = None
    policy: str | None = None


def read_drop_list(path: Path) -> DropList:
    """A drop list from a JSON file: a list of sites, or an object as `lora-drop profile` writes it.

    The object has them as `sites`; one of version 0.1 has layers as `drop_layers`.

    Raises:
        InputError: the file cannot be read, or holds no drop list.
    """
    try:
        data = json.loads(read_bounded(path, _MOST_BYTES))
        facts = data if isinstance(data, dict) else {"sites": data}
        sites, fingerprint = facts["sites" if "sites" in facts else "drop_layers"], facts.get("fingerprint")
        if not isinstance(sites, list) or not all(type(site) in (int, str) for site in sites):
            raise TypeError
        always = facts.get("always_first"), facts.get("always_last")
        policy = facts.get("policy")
        if not isinstance(fingerprint, str | None) or policy not in (None, *POLICIES):
            raise TypeError
        if not all(count is None or type(count) is int for count in always):
            raise TypeError
        errors = {
            base: {int(layer): float(error) for layer, error in of_layers.items()}
            for base, of_layers in facts.get("base_errors", {}).items()
        }
        found = DropList(sorted_sites(sites), fingerprint, errors, *always, policy)
    except BundleError as error:
        raise InputError("The drop list cannot be read.", note=error.note, hint="Check the path.") from None
    except (InputError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise InputError(
            "The file holds no drop list.",
            note=f"{path} is neither a JSON list of sites nor what lora-drop profile writes into a drop-….json.",
            hint="Use a drop-….json that lora-drop profile wrote, or --drop-layers 4,6,9.",
        ) from None
    if len(set(found.sites)) < len(found.sites):
        raise InputError(
            "The drop list names a layer twice.",
            note=f"{path} says {listed(found.sites)}.",
            hint="Name each layer once.",
        )
    return found


def warn_of_base(drop_list: DropList, surrogate: str) -> None:
    """Say so when the surrogate would start farther from a layer's output than the mean of its outputs is."""
    from lora_drop_export.console import Console

    errors = drop_list.base_errors.get(surrogate, {})
    layers = sorted({layer_of(site) for site in drop_list.sites if not half_of(site)})
    bad = {layer: errors[layer] for layer in layers if errors.get(layer, 0.0) > 1.0}
    if bad:
        Console().say(
            f"warning: --surrogate {surrogate} starts from something worse than the mean of the layer's outputs in "
            f"layers {', '.join(map(str, bad))} (relative errors {min(bad.values()):.2f} to {max(bad.values()):.2f}); "
            "--surrogate residual starts from the layer's input"
        )
