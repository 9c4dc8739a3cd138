"""What the lowerings of all targets share: making nodes, putting them in place, recognising what the trace left.

Works on neutral step graphs (surgery.py) as onnx-ir models, and on them alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir


class Ops:
    """Makes nodes in order; a call returns the one output."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def ints(self, values: list[int]) -> ir.Value:
        node = ir.node("Constant", [], {"value": ir.tensor(np.array(values, np.int64))})
        self.nodes.append(node)
        return node.outputs[0]


@dataclass(frozen=True)
class Linear:
    """`x Wᵀ + b` as traced: MatMul with a transposed initializer, its bias where one is added.

    `last` is the node whose output the whole is; `shape` is W's, [out, in].
    """

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    shape: tuple[int, int]
    last: ir.Node


def match_linear(node: ir.Node) -> Linear | None:
    """The linear layer that a MatMul node begins, None where it is something else."""
    x, transposed = node.inputs
    transpose = transposed.producer() if transposed is not None else None
    if x is None or transpose is None or transpose.op_type != "Transpose":
        return None
    weight = transpose.inputs[0]
    if weight is None or not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2:
        return None
    rows, columns = weight.shape.numpy()
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        bias = uses[0].node.inputs[1 - uses[0].idx]
        if bias is not None and bias.is_initializer() and bias.shape is not None and len(bias.shape) == 1:
            return Linear(x, weight, bias, (rows, columns), uses[0].node)
    return Linear(x, weight, None, (rows, columns), node)


def mask_window(attention: ir.Node) -> int:
    """The sliding window that the mask of an Attention node was made with, 0 for none."""
    mask = attention.inputs[3].producer()  # type: ignore[union-attr]
    if mask is None or mask.op_type != "And":
        return 0
    greater = mask.inputs[1].producer()  # type: ignore[union-attr]
    oldest = greater.inputs[1].producer()  # type: ignore[union-attr]
    size = ir.convenience.get_const_tensor(oldest.inputs[1])  # type: ignore[union-attr, arg-type]
    assert size is not None
    return int(size.numpy().reshape(-1)[0])


def float32_logits(graph: ir.Graph) -> ir.Value:
    """Make the graph's first output, the logits, float32; returns it."""
    logits = graph.outputs[0]
    assert logits.name == "logits"
    if logits.dtype == ir.DataType.FLOAT:
        return logits
    ops = Ops()
    logits.name = "logits.neutral"
    plain = ops("Cast", logits, to=int(ir.DataType.FLOAT))
    plain.name, plain.shape, plain.type = "logits", logits.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.extend(ops.nodes)
    graph.outputs[0] = plain
    return plain


def replace_node(graph: ir.Graph, node: ir.Node, ops: Ops, result: ir.Value) -> None:
    """Put the new nodes in the place of `node`, whose output `result` becomes."""
    old = node.outputs[0]
    result.shape, result.type = old.shape, old.type
    if old.is_graph_output():
        result.name, old.name = old.name, f"{old.name}.neutral"
        graph.outputs[:] = [result if output is old else output for output in graph.outputs]
    old.replace_all_uses_with(result)
    graph.insert_after(node, ops.nodes)
