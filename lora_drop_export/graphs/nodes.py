"""Making onnx-ir nodes and putting them in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

HEADS_FIRST = (0, 2, 1, 3)  # the permutation that swaps heads and tokens


class Ops:
    """Makes nodes in order; a call returns the one output."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def __call__(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, domain=domain)
        self.nodes.append(node)
        return node.outputs[0]

    def ints(self, values: list[int]) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def constant(self, array: npt.NDArray[Any]) -> ir.Value:
        tensor = ir.Tensor(array)  # not ir.tensor and ir.node, which find out anew what it is: 40 µs
        node = ir.Node("", "Constant", (), (ir.AttrTensor("value", tensor),))
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        self.nodes.append(node)
        return node.outputs[0]


def rank(value: ir.Value) -> int | None:
    """Number of dimensions, None where they are not known."""
    return None if value.shape is None else len(value.shape)


def viewed(value: ir.Value) -> ir.Value:
    """What Reshapes have made a value of."""
    node = value.producer()
    while node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


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


def replace_named(graph: ir.Graph, node: ir.Node, ops: Ops, result: ir.Value) -> None:
    """`replace_node`, and `result` gets the name of the output, too: the residual stream's are looked up."""
    old = node.outputs[0]
    name, is_output = old.name, old.is_graph_output()
    replace_node(graph, node, ops, result)
    if not is_output:
        result.name, old.name = name, f"{name}.neutral"
