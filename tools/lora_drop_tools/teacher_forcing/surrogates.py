"""The surrogates of a drop list over all tokens at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_drop_runtime.plan.surrogate import GATE_EPSILON, SurrogateForm

from .layout import Layout

# Site → A [r, d] or [r, 2d], s·B [d, r] and, where it is gated, G [r, d]; a missing one has only its base
Surrogates = Mapping[str, tuple[Any, ...]]


def features(x: Any, state: Any, layout: Layout, form: SurrogateForm) -> tuple[Any, Any]:
    """What a surrogate's product is of, [B, S, d] or [B, S, 2d], and what it is added to, [B, S, d].

    `y_t = base + s·B·A·feature`. Where LoRA steps update the state, `y_t = y_{t−1} + s·B·A·x_t` unrolled
    to the anchor a is `y_a + s·B·A·Σ x` over the LoRA steps since a.

    Args:
        x: the layer's (or half's) input at LoRA steps, [B, S, d].
        state: its output at full tokens, or the change of its run there, [B, T − S, d].
    """
    import torch

    if form.with_change:
        return torch.cat([x, state[:, layout.segment]], dim=-1), x
    if not form.base_is_state:
        return x, x
    base = state[:, layout.segment]
    if not form.updates_state:
        return x, base
    own = torch.arange(x.shape[1], device=x.device)
    length = own - layout.segment_begin  # of the segment before each token
    total = x
    for back in range(1, int(length.max()) + 1 if len(length) else 0):
        total = total + x[:, (own - back).clamp(min=0)] * (length >= back)[:, None]
    return total, base


def opening(x: Any, gate: Any) -> Any:
    """What a gate G [r, d] multiplies what A makes of the stream x [..., d] by: `1 + silu(G n)`, [..., r]."""
    from torch.nn.functional import rms_norm, silu

    return 1 + silu(rms_norm(x, x.shape[-1:], eps=GATE_EPSILON) @ gate.T)


def product(feature: Any, matrices: tuple[Any, ...] | None) -> Any:
    """`s·B·A·x`, gated or not, computed in the adapters' dtype; 0 without an adapter.

    A gate is of the stream, the first d of the features.
    """
    if matrices is None:
        return 0
    a, b, *gates = matrices
    made = feature.to(a.dtype) @ a.T
    for gate in gates:
        made = made * opening(feature[..., : gate.shape[1]].to(gate.dtype), gate)
    return (made @ b.T).to(feature.dtype)
