"""Texts that adapters are fitted on and judged by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from lora_drop_runtime.plan.schedule import PeriodicSchedule

from .settings import PROMPT, FitSettings

if TYPE_CHECKING:
    from lora_drop_tools.teacher_forcing.layout import Layout


class Texts:
    """Batches of windows by number; the same number gives the same batch.

    Windows are from random places, and how many of a window's tokens are its prompt is random too, so that every phase
    of the cycle occurs everywhere.

    Args:
        ids: token ids, int64 [N].
        salt: makes other batches of the same seed.
    """

    def __init__(self, ids: Any, settings: FitSettings, device: Any, salt: int) -> None:
        self._ids, self._settings, self._device, self._salt = ids, settings, device, salt

    def __call__(self, number: int) -> tuple[Any, Layout]:
        """Token ids [B, T] and their layout."""
        import torch

        from lora_drop_tools.teacher_forcing.layout import Layout

        of = self._settings
        random = np.random.default_rng([of.seed, self._salt, number])
        starts = random.integers(0, len(self._ids) - of.window_tokens + 1, of.batch)
        k = int(random.choice(of.k))
        prompt = PROMPT + int(random.integers(0, k + 1))
        ids = torch.stack([self._ids[start : start + of.window_tokens] for start in starts]).to(self._device)
        return ids, Layout.of(of.window_tokens, prompt, PeriodicSchedule(k), self._device)
