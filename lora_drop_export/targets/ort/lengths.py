"""The lengths that GroupQueryAttention takes, made once a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from lora_drop_runtime.bundle.graph_io import LAST_SLOTS, NEW_TOKENS, TOTALS

from lora_drop_export.graphs.nodes import Ops


class Lengths:
    """What attention needs to know of lengths and positions, made once for each length group.

    Adds totals and last slots to the graph's inputs. GroupQueryAttention reads the totals on the host before it
    launches anything. The last slots would be computed of a shape, on the host, and copied to a GPU in every step.

    Args:
        ragged: whether rows may have different numbers of new tokens; they are an input then.
    """

    def __init__(self, graph: ir.Graph, ragged: bool) -> None:
        self.graph = graph
        self.inputs = {str(value.name): value for value in graph.inputs}
        self.conditions: dict[tuple[str, int], ir.Value] = {}
        self.each: ir.Value | None = None
        self.new_tokens = self._input(NEW_TOKENS, ["batch"]) if ragged else None  # int32 [B]
        for length in [name for name in TOTALS if name in self.inputs]:  # in order: a graph is the same each time
            self._input(TOTALS[length], [])
            self._input(LAST_SLOTS[length], ["batch"])

    def _input(self, name: str, shape: list[str]) -> ir.Value:
        value = self.inputs[name] = ir.val(name, ir.DataType.INT32, shape)
        self.graph.inputs.append(value)
        return value

    def positions(self) -> ir.Value:
        """The position of each new token, int64 [B, S]."""
        if self.each is None:
            ops = Ops()
            count = ops("Squeeze", ops("Shape", self.inputs["input_ids"], start=1, end=2))
            zero, one = (ops.constant(np.array(n, np.int64)) for n in (0, 1))
            begin = ops("Unsqueeze", self.inputs["len_kept"], ops.ints([1]))
            self.each = ops("Add", begin, ops("Range", zero, count, one))
            self.graph.insert_before(self.graph[0], ops.nodes)
        return self.each

    def folds(self, length: ir.Value | None, group: int) -> ir.Value:
        """Whether a step may fold `group` query heads, bool []: one token of one row, and as many slots as heads."""
        assert length is not None
        key = str(length.name), group
        if key not in self.conditions:
            ops = Ops()
            single = ops("Equal", ops("Size", self.inputs["input_ids"]), ops.constant(np.array(1, np.int64)))
            shortest = ops("ReduceMin", length, keepdims=0)
            enough = ops("GreaterOrEqual", shortest, ops.constant(np.array(group - 1, np.int64)))
            self.conditions[key] = ops("And", single, enough)
            self.graph.insert_before(self.graph[0], ops.nodes)
        return self.conditions[key]

    def get(self, length: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """GroupQueryAttention's two length inputs: last valid slot [B] and the longest row's total [], both int32."""
        assert length is not None
        assert length.name is not None
        return self.inputs[LAST_SLOTS[length.name]], self.inputs[TOTALS[length.name]]
