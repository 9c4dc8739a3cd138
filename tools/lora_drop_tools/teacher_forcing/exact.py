"""A layer of the exact stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .attention import Entries


@dataclass(frozen=True)
class ExactLayer:
    """What the decoded stream needs of the exact one at a layer.

    Attributes:
        entries: by the kind of call (attention.py), K and V [B, Hkv, T, D], RoPE applied, or a state's entries.
        input, output: [B, T, d].
        middle: the residual stream between attention and MLP, [B, T, d].
    """

    entries: Entries
    output: Any
    middle: Any
    input: Any

    @property
    def tensors(self) -> list[Any]:
        """All of them."""
        return [self.output, self.middle, self.input, *(one for pair in self.entries.values() for one in pair)]
