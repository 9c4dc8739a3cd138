"""How the entries of a K/V cache are read and written in a neutral graph, whatever attends to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from lora_drop_runtime.dtypes import BY_NAME, CACHE_DTYPES

from .nodes import Ops

_LIMITS = {ir.DataType(BY_NAME[name].onnx): limits for name, limits in CACHE_DTYPES.items()}


@dataclass(frozen=True)
class CacheEntries:
    """Of one cache: as they are, or with a scale where they have 8 bits.

    Attributes:
        past: the cache, [B, Hkv, C, D].
        length: its valid slots, [B].
        activations: type of the values.
        scale: float32 [Hkv, 1, D or 1]; None where entries are the values.
    """

    past: ir.Value
    length: ir.Value
    activations: ir.TypeProtocol | None
    scale: ir.Value | None

    def write(self, ops: Ops, values: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(the cache after values [B, Hkv, S, D] are written, the entries that they are in it)."""
        entries = values
        if self.scale is not None:
            kind, wide = self.past.dtype, ir.DataType.FLOAT
            assert kind is not None
            steps = ops("Div", values if values.dtype == wide else ops("Cast", values, to=int(wide)), self.scale)
            if kind == ir.DataType.INT8:
                steps = ops("Round", steps)
            limits = (ops.constant(np.array(limit, np.float32)) for limit in _LIMITS[kind])
            entries = ops("Cast", ops("Clip", steps, *limits), to=int(kind))
        return ops("TensorScatter", self.past, entries, self.length, axis=2), entries

    def read(self, ops: Ops, entries: ir.Value, shape: ir.Shape | None = None) -> ir.Value:
        """The values that entries [.., D] have."""
        if self.scale is None:
            return entries
        wide = ir.DataType.FLOAT
        values = ops("Mul", ops("Cast", entries, to=int(wide)), self.scale)
        values.shape, values.type = shape, ir.TensorType(wide)
        if self.activations is not None and self.activations.dtype != wide:
            values = ops("Cast", values, to=int(self.activations.dtype))
            values.shape, values.type = shape, self.activations
        return values
