"""Scales of 8-bit caches, found on the sample text."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from lora_drop_runtime.dtypes import CACHE_DTYPES
from lora_drop_runtime.plan.drop_plan import DropPlan

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.console import Console

from .reference import Reference
from .sample import PERPLEXITY_TOKENS, sample_ids

SMALLEST_SCALE = np.float32(2.0**-14)  # of float16's normal numbers: graphs in halves divide by it


def calibrate_kv(
    checkpoint: Checkpoint,
    root: Path,
    vocab_size: int,
    context: int,
    kv_dtype: str,
    per_head: bool,
    console: Console,
) -> dict[str, Any]:
    """Scales for 8-bit caches: the largest magnitude of each channel, or head, of K and V over the sample text, over
    the largest that an entry can be.

    Args:
        root: of the bundle, whose tokenizer is there already; random ids without one.

    Returns:
        `kv_scales.<layer>.key` and `.value`, float32 [Hkv, 1, D], or [Hkv, 1, 1] per head.
    """
    ids = sample_ids(root, vocab_size)
    if ids is None or len(ids) < 2:
        console.say("8-bit caches: calibrated on random tokens, the model brings no tokenizer")
        ids = np.random.default_rng(0).integers(0, vocab_size, PERPLEXITY_TOKENS)
    ids = ids[: min(PERPLEXITY_TOKENS, context)]
    everything = DropPlan(checkpoint.config.num_hidden_layers, ())
    with console.progress("calibrating the caches") as progress:
        largest = Reference(checkpoint, everything, {}).largest_kv(
            ids, functools.partial(progress, "calibrating the caches")
        )
    if per_head:
        largest = {name: value.max(axis=2, keepdims=True) for name, value in largest.items()}
    return {
        name: np.maximum(value / np.float32(CACHE_DTYPES[kv_dtype][1]), SMALLEST_SCALE)
        for name, value in largest.items()
    }
