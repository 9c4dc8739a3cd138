"""A layer of the exact stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExactLayer:
    """What the decoded stream needs of the exact one at a layer.

    Attributes:
        keys, values: [B, Hkv, T, D], RoPE applied.
        input, output: [B, T, d].
        middle: the residual stream between attention and MLP, [B, T, d].
    """

    keys: Any
    values: Any
    output: Any
    middle: Any
    input: Any
