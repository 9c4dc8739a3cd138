"""Prompts as the caller has them → ids [B, T] and lengths [B] as the step graphs take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.engines.engine import Array

from .request import Ids

Prompts = Sequence[int] | Sequence[Sequence[int]] | Sequence[Array] | Array


def prompt_rows(prompts: Prompts) -> list[Ids]:
    """One row per prompt; a flat list is one prompt."""
    rows: Any = [prompts] if len(prompts) and np.ndim(prompts[0]) == 0 else prompts
    return [np.asarray(row, np.int64).reshape(-1) for row in rows]


def padded(rows: list[Ids], pad: int) -> tuple[Ids, Ids]:
    """Rows as ids [B, T], right-padded with `pad`, and their lengths [B]; T is at least 1."""
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.full((len(rows), max(1, int(lengths.max(initial=0)))), pad, np.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    return ids, lengths


def token_mask(ids: Ids, lengths: Ids) -> npt.NDArray[np.bool_]:
    """Which ids [B, T] are tokens and not padding."""
    mask: npt.NDArray[np.bool_] = np.arange(ids.shape[1]) < lengths[:, None]
    return mask


def harmless_padding(ids: Ids, lengths: Ids) -> Ids:
    """No more padding than the longest row needs, since the caches have no room for it, and 0 in its place.

    Padding is computed and thrown away, so any valid id will do.
    """
    ids = ids[:, : lengths.max()]
    return np.where(token_mask(ids, lengths), ids, 0)
