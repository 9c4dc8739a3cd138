"""What the lowerings of all targets share: making nodes, putting them in place, recognising what the trace left.

Works on neutral step graphs (refresh.py, lora.py) as onnx-ir models, and on them alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lora_drop_export.decoder.experts import is_matrix_of_experts, is_mixture

from .nodes import rank, viewed
from .recurrences import is_recurrence

# Operators that treat every row [.., width] alike, given inputs of equal shape or of rank 1
_ROW_WISE = {
    *("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Sqrt", "Sigmoid", "Tanh", "Erf", "Gelu", "Relu", "Clip", "Cast"),
    *("Split", "RMSNormalization", "LayerNormalization"),
}
_HALVES: tuple[ir.DataType | None, ...] = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# How the zero points of a quantized weight are called: all in the middle, or each its own
SYMMETRIC, ZERO_POINTS = ".symmetric_zero_points", ".zero_points"


@dataclass(frozen=True)
class QuantizedBlocks:
    """How a quantized weight is read: initializers `scales` and `zero_points`; `symmetric`: all lie in the middle."""

    bits: int
    block_size: int
    scales: ir.Value
    zero_points: ir.Value
    symmetric: bool


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


def match_weight(value: ir.Value | None) -> tuple[ir.Value | None, QuantizedBlocks | None]:
    """The initializer that a value is, or is dequantized from; (None, None) for anything else.

    E4M3 is something else: targets that take it leave its DequantizeLinear as it is.
    """
    if value is None or value.is_initializer():
        return value, None
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
        return None, None
    weight, scales, zero_points = node.inputs
    assert weight is not None
    assert scales is not None
    assert zero_points is not None
    bits = 4 if weight.dtype == ir.DataType.UINT4 else 8
    block_size = node.attributes["block_size"].as_int()
    symmetric = str(zero_points.name).endswith(SYMMETRIC)
    return weight, QuantizedBlocks(bits, block_size, scales, zero_points, symmetric)


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


def is_row_wise(node: ir.Node) -> bool:
    """Whether each row [width] of the node's outputs [B, S, width] is computed from the same rows of its inputs."""
    if node.op_type not in _ROW_WISE or node.domain or any(rank(output) != 3 for output in node.outputs):
        return False
    if "axis" in node.attributes and node.attributes["axis"].as_int() not in (-1, 2):
        return False
    inputs = [value for value in node.inputs if value is not None]
    shapes = {str(value.shape) for value in inputs if rank(value) == 3}  # no broadcasting over tokens
    return len(shapes) == 1 and {rank(value) for value in inputs} <= {0, 1, 3}


def linear_groups(graph: ir.Graph) -> list[list[Linear]]:
    """Linear layers that read one tensor (q, k, v; gate, up): such with a bias, and such without; in float, or not."""
    groups: dict[tuple[ir.Value, bool, bool], list[Linear]] = {}
    for node in graph:
        linear = match_linear(node) if node.op_type == "MatMul" else None
        if linear is not None:
            groups.setdefault((linear.x, linear.bias is None, linear.blocks is None), []).append(linear)
    return [group for group in groups.values() if len(group) > 1]


def joined_name(names: list[str]) -> str:
    """layers.0.q_proj.weight, layers.0.k_proj.weight → layers.0.q_proj+k_proj.weight"""
    parts = [name.split(".") for name in names]
    same = [all(part == column[0] for part in column) for column in zip(*parts, strict=False)]
    shared = same.index(False)  # names differ somewhere: they are of different tensors
    inner = "+".join(".".join(name[shared:-1]) for name in parts)
    return ".".join([*parts[0][:shared], inner, parts[0][-1]])


def cache_write(read: ir.Value | None) -> tuple[ir.Node, ir.Value | None, ir.Value | None]:
    """The TensorScatter of a cache that attention reads, the new entries as floats, and the scale of 8-bit ones."""
    assert read is not None
    node = read.producer()
    assert node is not None
    if node.op_type == "TensorScatter":
        return node, node.inputs[1], None
    if node.op_type == "Cast":  # to activations in half precision
        node = node.inputs[0].producer()  # type: ignore[union-attr]
        assert node is not None
    cast, scale = node.inputs
    write = cast.producer().inputs[0].producer()  # type: ignore[union-attr]
    assert node.op_type == "Mul"
    assert write is not None
    assert write.op_type == "TensorScatter"
    steps = write.inputs[1]
    while steps is not None and steps.producer().op_type != "Div":  # type: ignore[union-attr]
        steps = steps.producer().inputs[0]  # type: ignore[union-attr]
    entries = steps.producer().inputs[0]  # type: ignore[union-attr]
    cast = entries.producer() if entries is not None else None
    narrow = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    if narrow is not None and narrow.dtype in _HALVES:
        entries = narrow
    return write, entries, scale


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


def _is_linear(node: ir.Node) -> bool:
    if node.op_type != "Transpose":
        return False
    return all(use.node.op_type == "MatMul" and use.idx == 1 for use in node.outputs[0].uses())


def _is_lookup(node: ir.Node, position: int) -> bool:
    if node.op_type != "Gather" or position != 0 or ("axis" in node.attributes and node.attributes["axis"].as_int()):
        return False
    return node.inputs[1] is not None and node.inputs[1].name == "input_ids"


def _router_matrices(graph: ir.Graph) -> frozenset[str]:
    """Names of the matrices [E, ·] that decide which experts a token goes to."""
    found = set()
    for node in filter(is_mixture, graph):
        tokens, *chosen = (viewed(value) for value in node.inputs[:3] if value is not None)
        count, seen, todo = node.attributes["experts"].as_int(), {tokens}, chosen
        while todo:
            value = viewed(todo.pop())
            if value in seen:
                continue
            seen.add(value)
            if value.is_initializer() and rank(value) == 2 and value.shape[0] == count:  # type: ignore[index]
                found.add(str(value.name))
            elif (producer := value.producer()) is not None:
                todo.extend(one for one in producer.inputs if one is not None)
    return frozenset(found)


def _change_matrices(graph: ir.Graph) -> frozenset[str]:
    """Names of the small matrices that decide how far a token changes a recurrent state, and how fast that is
    forgotten: [H, ·], or [H·Dk, Dk] behind one that comes down to the width of a head."""
    found, seen = set(), set[ir.Value]()
    nodes = list(filter(is_recurrence, graph))
    decays, heads = (
        max((int(node.inputs[place].shape[2]) for node in nodes), default=1)  # type: ignore[union-attr, index, arg-type]
        for place in (1, 2)
    )
    todo = [value for node in nodes for value in node.inputs[1:3]]
    while todo:
        value = todo.pop()
        node = None if value is None or value in seen else value.producer()
        if node is None or value is None:
            continue
        seen.add(value)
        if node.op_type != "MatMul":
            todo.extend(node.inputs)
        elif (weight := viewed(node.inputs[1])).producer() is not None:  # type: ignore[arg-type]
            weights = [one for one in weight.producer().inputs if one is not None]  # type: ignore[union-attr]
            for one in weights:
                rows, columns = map(int, one.shape if one.shape and len(one.shape) == 2 else (0, 0))
                # Not Mamba's, which makes all that its state is given
                if 0 < rows <= 2 * heads or 1 < columns <= decays // heads:
                    found.add(str(one.name))
    return frozenset(found)


def quantizable(graph: ir.Graph) -> frozenset[str]:
    """Names of the parameters that are weights of linear layers or of experts, or the table that token ids are looked
    up in. Not those of a router, or of what changes a recurrent state: they are small, and what they decide is not a
    matter of rounding.

    Args:
        graph: as traced (decoder/trace.py): a linear layer is MatMul with a transposed initializer.
    """

    def is_weight(value: ir.Value) -> bool:
        uses = list(value.uses())
        return bool(uses) and all(
            _is_linear(use.node) or _is_lookup(use.node, use.idx) or is_matrix_of_experts(use.node, use.idx)
            for use in uses
        )

    found = frozenset(name for name, value in graph.initializers.items() if is_weight(value))
    return found - _router_matrices(graph) - _change_matrices(graph)


def fusable_groups(model: ir.Model) -> list[tuple[str, ...]]:
    """Names of weights, and of biases, that a lowering makes one of when they lie back to back in one file; those that
    stay in float whatever becomes of the others stand last."""
    names, may_be = list[tuple[str, ...]](), quantizable(model.graph)
    for linears in linear_groups(model.graph):
        group = sorted(linears, key=lambda linear: linear.weight.name not in may_be)
        names.append(tuple(str(linear.weight.name) for linear in group))
        if group[0].bias is not None:
            names.append(tuple(str(linear.bias.name) for linear in group if linear.bias is not None))
    return names
