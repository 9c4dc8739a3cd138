"""What the lowerings of all targets share: making nodes, putting them in place, recognising what the trace left.

Works on neutral step graphs (surgery.py) as onnx-ir models, and on them alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

# Operators that treat every row [.., width] alike, given inputs of equal shape or of rank 1
_ROW_WISE = {"Add", "Sub", "Mul", "Div", "Pow", "Neg", "Sqrt", "Sigmoid", "Tanh", "Erf", "Gelu", "Relu", "Clip", "Cast"}
_ROW_WISE |= {"Split", "RMSNormalization", "LayerNormalization"}
# How the zero points of a quantized weight are called: all in the middle, or each its own
SYMMETRIC, ZERO_POINTS = ".symmetric_zero_points", ".zero_points"


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
        tensor = ir.tensor(array)
        node = ir.node("Constant", [], {"value": tensor})
        node.outputs[0].shape, node.outputs[0].type = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        self.nodes.append(node)
        return node.outputs[0]


@dataclass(frozen=True)
class QuantizedBlocks:
    """How a quantized weight is read: initializers `scales` and, unless all lie in the middle, `zero_points`."""

    bits: int
    block_size: int
    scales: ir.Value
    zero_points: ir.Value | None


@dataclass(frozen=True)
class Linear:
    """`x Wᵀ + b` as traced: MatMul with a transposed initializer, its bias where one is added.

    `last` is the node whose output the whole is; `shape` is W's, [out, in]; `blocks` where W is quantized.
    """

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    shape: tuple[int, int]
    last: ir.Node
    blocks: QuantizedBlocks | None = None


def match_linear(node: ir.Node) -> Linear | None:
    """The linear layer that a MatMul node begins, None where it is something else."""
    x, transposed = node.inputs
    transpose = transposed.producer() if transposed is not None else None
    if x is None or transpose is None or transpose.op_type != "Transpose":
        return None
    weight, blocks = match_weight(transpose.inputs[0])
    if weight is None or weight.shape is None or len(weight.shape) != 2:
        return None
    rows, columns = weight.shape.numpy()
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        bias = uses[0].node.inputs[1 - uses[0].idx]
        if bias is not None and bias.is_initializer() and bias.shape is not None and len(bias.shape) == 1:
            return Linear(x, weight, bias, (rows, columns), uses[0].node, blocks)
    return Linear(x, weight, None, (rows, columns), node, blocks)


def match_weight(value: ir.Value | None) -> tuple[ir.Value | None, QuantizedBlocks | None]:
    """The initializer that a value is, or is dequantized from; (None, None) for anything else."""
    if value is None or value.is_initializer():
        return value, None
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None, None
    weight, scales, zero_points = node.inputs
    assert weight is not None
    assert scales is not None
    assert zero_points is not None
    symmetric = str(zero_points.name).endswith(SYMMETRIC)
    bits = 4 if weight.dtype == ir.DataType.UINT4 else 8
    block_size = node.attributes["block_size"].as_int()
    return weight, QuantizedBlocks(bits, block_size, scales, None if symmetric else zero_points)


def is_row_wise(node: ir.Node) -> bool:
    """Whether each row [width] of the node's outputs [B, S, width] is computed from the same rows of its inputs."""
    if node.op_type not in _ROW_WISE or node.domain or any(rank(output) != 3 for output in node.outputs):
        return False
    if "axis" in node.attributes and node.attributes["axis"].as_int() not in (-1, 2):
        return False
    inputs = [value for value in node.inputs if value is not None]
    shapes = {str(value.shape) for value in inputs if rank(value) == 3}  # no broadcasting over tokens
    return len(shapes) == 1 and {rank(value) for value in inputs} <= {0, 1, 3}


def rank(value: ir.Value) -> int | None:
    """Number of dimensions, None where they are not known."""
    return None if value.shape is None else len(value.shape)


def linear_groups(graph: ir.Graph) -> list[list[Linear]]:
    """Linear layers that read one tensor (q, k, v; gate, up), where all of them or none have a bias."""
    groups: dict[ir.Value, list[Linear]] = {}
    for node in graph:
        linear = match_linear(node) if node.op_type == "MatMul" else None
        if linear is not None:
            groups.setdefault(linear.x, []).append(linear)
    return [g for g in groups.values() if len(g) > 1 and len({linear.bias is None for linear in g}) == 1]


def fusable_groups(model: ir.Model) -> list[tuple[str, ...]]:
    """Names of weights, and of biases, that a lowering makes one of when they lie back to back in one file."""
    names: list[tuple[str, ...]] = []
    for group in linear_groups(model.graph):
        names.append(tuple(str(linear.weight.name) for linear in group))
        if group[0].bias is not None:
            names.append(tuple(str(linear.bias.name) for linear in group if linear.bias is not None))
    return names


def joined_name(names: list[str]) -> str:
    """layers.0.q_proj.weight, layers.0.k_proj.weight → layers.0.q_proj+k_proj.weight"""
    parts = [name.split(".") for name in names]
    same = [all(part == column[0] for part in column) for column in zip(*parts, strict=False)]
    shared = same.index(False)  # names differ somewhere: they are of different tensors
    inner = "+".join(".".join(name[shared:-1]) for name in parts)
    return ".".join([*parts[0][:shared], inner, parts[0][-1]])


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
