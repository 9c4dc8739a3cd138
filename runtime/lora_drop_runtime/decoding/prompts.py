"""Prompts as the caller has them → ids [B, T] and lengths [B] as the step graphs take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lora_drop_runtime.engines.engine import Array
from lora_drop_runtime.errors import wrong_type

from .sampling import Ids

_MOST_ID = 2**63 - 1
Prompts = Sequence[int] | Sequence[Sequence[int] | Array] | Array


def integers(what: str, value: Any, hint: str) -> Ids:
    """An argument as int64, of any shape; an empty one has no type.

    Args:
        what: begins the message: `The prompt`.

    Raises:
        InputError: it is no array or nested list of whole numbers.
    """
    if type(value) is np.ndarray and value.dtype == np.int64:
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError):  # lists of different lengths in a list, or anything
        array = np.asarray(None)
    mixed = isinstance(value, list | tuple) and any(type(item) is bool for item in value)
    if (array.dtype.kind not in "iu" and (array.size or array.dtype.kind == "O")) or mixed:
        raise wrong_type(what, value, "whole numbers", hint)
    if array.dtype.kind == "u" and array.size and array.max() > _MOST_ID:
        array = np.minimum(array, _MOST_ID)  # which no vocabulary has either
    return array.astype(np.int64)


def prompt_rows(prompts: Prompts) -> list[Ids]:
    """One row per prompt; a flat list is one prompt.

    Raises:
        InputError: they are not token ids.
    """
    hint = "Give token ids such as [[1, 2], [3]]; TextCodec turns text into them."
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Sequence | np.ndarray):
        raise wrong_type("The prompt", prompts, "a list of token ids, or a list of such lists", hint)
    if isinstance(prompts, np.ndarray) and prompts.ndim == 0:
        raise wrong_type("The prompt", prompts, "a list of token ids, or a list of such lists", hint)
    flat = len(prompts) and not isinstance(prompts[0], Sequence | np.ndarray)
    rows = [integers("The prompt", row, hint) for row in ([prompts] if flat else prompts)]
    if any(row.ndim != 1 for row in rows):
        raise wrong_type("The prompt", prompts, "one list of token ids for each row", hint)
    return rows


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
