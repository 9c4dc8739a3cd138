"""Forced steps on the TensorRT engine over a fake CUDA, and the same steps elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
from lora_drop_runtime import Session, StepKind
from lora_drop_runtime.bundle.bundle import Bundle

LORA, REFRESH = StepKind.LORA, StepKind.REFRESH
# Chunks of 4: several runs, rows of one, of less than one and of exactly two chunks
RAGGED = [[7, 3, 11, 19, 2, 40, 41, 42, 43, 44, 45], [5], [23, 29, 31, 2, 3, 4, 99, 98]]
FORCED = [[3, 5, 7], [100, 9, 2], [8, 8, 8], [1, 2, 3], [30, 31, 32], [77, 6, 5], [4, 4, 90], [60, 2, 9], [1, 1, 1]]
PLANS: dict[str, dict[str, Any]] = {
    "residual": {"rank": 2},
    "recurrent": {"surrogate": "recurrent", "rank": 2},
    "recurrent, rank 0": {"surrogate": "recurrent", "sharing": "constants"},
    "anchor, attn_mlp": {"surrogate": "anchor", "injection": "attn_mlp", "rank": 2},
    "recurrent, attn_mlp": {"surrogate": "recurrent", "injection": "attn_mlp", "rank": 2},
    "change": {"surrogate": "residual-delta", "rank": 2, "drop_layers": (3, 4, 6)},
    "gated": {"surrogate": "residual-gated", "rank": 2, "drop_layers": (3, 4, 6)},
    "nothing dropped": {"drop_layers": ()},
    "fill": {"rank": 2, "policy": "fill"},
}


def padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return ids, np.array([len(prompt) for prompt in prompts])


def steps(session: Session, k: int | None = None, prompts: list[list[int]] = RAGGED) -> list[np.ndarray]:
    """Logits of the prefill and of all forced steps."""
    logits = [session.prefill(*padded(prompts), max_new_tokens=len(FORCED) + 1, k=k).copy()]
    return logits + [session.step(tokens[: len(prompts)]).copy() for tokens in FORCED]


def assert_close(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    """Float32 on both sides, summed in another order: 1e-6 of the largest logit was seen."""
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert np.isfinite(a).all(), f"step {step}"
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), f"step {step}"


def ort_steps(bundle: Bundle, k: int) -> list[np.ndarray]:
    with Session.open(bundle.root, target="ort", threads=1) as session:
        return steps(session, k)
