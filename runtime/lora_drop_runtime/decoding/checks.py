"""What a request must hold before anything is allocated for it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.errors import InputError
from lora_drop_runtime.plan.drop_plan import POLICIES

from .request import Ids


def token_mask(ids: Ids, lengths: Ids) -> npt.NDArray[np.bool_]:
    """Which ids [B, T] are tokens and not padding."""
    mask: npt.NDArray[np.bool_] = np.arange(ids.shape[1]) < lengths[:, None]
    return mask


def check_policy(policy: str) -> None:
    if policy not in POLICIES:
        raise InputError(
            "Unknown refresh policy.",
            note=f"{policy!r} was given, known is {', '.join(POLICIES)}.",
            hint=f"Use --policy {POLICIES[0]}.",
        )
