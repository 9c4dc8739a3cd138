"""Scales of int8 caches, found on the sample text."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from lora_drop_runtime.plan.drop_plan import DropPlan

from lora_drop_export.checkpoint.checkpoint import Checkpoint
from lora_drop_export.console import Console

from .reference import Reference
from .sample import PERPLEXITY_TOKENS, sample_ids


def calibrate_kv(checkpoint: Checkpoint, root: Path, vocab_size: int, context: int, console: Console) -> dict[str, Any]:
    """Scales for int8 caches: the largest magnitude of each channel of K and V over the sample text, over 127.

    Args:
        root: of the bundle, whose tokenizer is there already; random ids without one.

    Returns:
        `kv_scales.<layer>.key` and `.value`, float32 [Hkv, 1, D].
    """
    ids = sample_ids(root, vocab_size)
    if ids is None or len(ids) < 2:
        console.say("int8 caches: calibrated on random tokens, the model brings no tokenizer")
        ids = np.random.default_rng(0).integers(0, vocab_size, PERPLEXITY_TOKENS)
    ids = ids[: min(PERPLEXITY_TOKENS, context)]
    everything = DropPlan(checkpoint.config.num_hidden_layers, ())
    with console.progress("calibrating the caches") as progress:
        largest = Reference(checkpoint, everything, {}).largest_kv(
            ids, functools.partial(progress, "calibrating the caches")
        )
    return {name: np.maximum(value, 1e-6) / np.float32(127) for name, value in largest.items()}
