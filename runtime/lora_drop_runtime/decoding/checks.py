"""What a request must hold before anything is allocated for it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .request import Ids


def token_mask(ids: Ids, lengths: Ids) -> npt.NDArray[np.bool_]:
    """Which ids [B, T] are tokens and not padding."""
    mask: npt.NDArray[np.bool_] = np.arange(ids.shape[1]) < lengths[:, None]
    return mask
