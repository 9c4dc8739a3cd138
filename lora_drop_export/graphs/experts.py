"""A mixture of experts in plain ONNX, and the way back: what a lowering makes a kernel of.

Every expert computes every token there, and what the router did not choose counts nothing: ONNX has no operator that
reads the chosen matrices alone. So a graph is right wherever ONNX runs, and a target that has such a kernel puts it in
the place of what `match_experts` finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import numpy as np
import onnx_ir as ir

from lora_drop_export.decoder.gates import SILU, Gate

from .match import QuantizedBlocks, match_weight
from .nodes import Ops, replace_node

# Begins the name of the node that gives the sum over the experts; what their gate has of its own follows
_PREFIX = "experts."


@dataclass(frozen=True)
class Experts:
    """A mixture of experts, as decoder/experts.py says it: the chosen ones of a token, times their weights, summed.

    Attributes:
        x: [T, d].
        index: int64 [T, K], the chosen experts; `weights` [T, K] theirs, `dense` [T, E] the same beside zeros.
        gate_up: [E·2I, d], a row of gate and one of up in turns, or where the gate is GELU all gates and then all ups;
            `down` [E·d, I]; `blocks` of each where quantized.
        biases: of these, [E, 2I] and [E, d]; None where there are none.
        gate: how gate and up are joined.
        count: E.
    """

    x: ir.Value
    index: ir.Value
    weights: ir.Value
    dense: ir.Value
    gate_up: ir.Value
    down: ir.Value
    blocks: tuple[QuantizedBlocks | None, QuantizedBlocks | None]
    biases: tuple[ir.Value | None, ir.Value | None]
    gate: Gate
    count: int

    @property
    def per_token(self) -> int:
        """K."""
        return int(self.index.shape[1])  # type: ignore[index, arg-type]

    @property
    def sizes(self) -> tuple[int, int]:
        """d and I."""
        return tuple(int(weight.shape[1]) for weight in (self.gate_up, self.down))  # type: ignore[index, arg-type, return-value]


def _name(gate: Gate, down: str) -> str:
    own = {name: value for name, value in asdict(gate).items() if value != getattr(Gate(), name)}
    return f"{_PREFIX}{''.join(f'{name}={value};' for name, value in own.items())}{down}"


def _gate(name: str) -> Gate:
    """What `_name` was given."""
    *own, _ = name.removeprefix(_PREFIX).split(";")
    given = dict(one.split("=") for one in own)
    activation = given.pop("activation", SILU)
    return Gate(**{key: float(value) for key, value in given.items()}, activation=activation)


def _joined(ops: Ops, gate: Gate, g: ir.Value, u: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The gate's formula."""

    def number(value: float) -> ir.Value:
        return ops.constant(np.array(value, dtype.numpy()))

    if gate.approximate is not None:
        return ops("Mul", ops("Gelu", g, approximate=gate.approximate), u)
    if gate.limit:
        g, u = ops("Min", g, number(gate.limit)), ops("Clip", u, number(-gate.limit), number(gate.limit))
    steep = ops("Mul", g, number(gate.alpha)) if gate.alpha != 1 else g
    return ops("Mul", ops("Mul", g, ops("Sigmoid", steep)), ops("Add", u, number(gate.added)) if gate.added else u)


def expand_experts(graph: ir.Graph, node: ir.Node) -> None:
    """One Experts node of a trace becomes plain ONNX."""
    x, index, weights, gate_up, down, *biases = node.inputs
    assert x is not None
    assert x.dtype is not None
    assert down is not None
    form = Gate(**{field.name: node.attributes[field.name].value for field in fields(Gate)})
    count, ops = node.attributes["experts"].as_int(), Ops()
    if weights is not None and weights.dtype != x.dtype:  # of a router that computes in float32
        sizes, weights = weights.shape, ops("Cast", weights, to=int(x.dtype))
        weights.shape, weights.type = sizes, x.type

    def product(value: ir.Value, rows: ir.Value | None, bias: list[ir.Value | None], number: int) -> ir.Value:
        """Of [·, T, K] and so many matrices, [E, T, N]."""
        assert rows is not None
        assert rows.shape is not None
        height, columns = int(rows.shape[0]) // number, int(rows.shape[1])  # type: ignore[arg-type]
        matrices = ops("Reshape", rows, ops.ints([number, height, columns]))
        made = ops("MatMul", value, ops("Transpose", matrices, perm=[0, 2, 1]))
        return ops("Add", made, ops("Unsqueeze", bias[0], ops.ints([1]))) if bias else made

    tokens = ops("Unsqueeze", x, ops.ints([0]))
    if form.activation == SILU:
        both, end = product(tokens, gate_up, biases[:1], count), ops.ints([2**31 - 1])  # [E, T, 2I]
        gate, up = (ops("Slice", both, ops.ints([turn]), end, ops.ints([2]), ops.ints([2])) for turn in (0, 1))
    else:
        both = product(tokens, gate_up, biases[:1], 2 * count)  # [2E, T, I]
        places = [ops.ints([place]) for place in (0, count, 2 * count)]
        gate, up = (ops("Slice", both, *places[turn : turn + 2], ops.ints([0])) for turn in (0, 1))
    each = product(_joined(ops, form, gate, up, x.dtype), down, biases[1:], count)  # [E, T, d]
    shape = ops("Concat", ops("Shape", x, start=0, end=1), ops.ints([count]), axis=0)
    zero = ops.constant(np.zeros(1, x.dtype.numpy()))
    dense = ops("ScatterElements", ops("Expand", zero, shape), index, weights, axis=1)  # [T, E]
    dense.shape, dense.type = ir.Shape([x.shape[0], count]), x.type  # type: ignore[index]
    shares = ops("Unsqueeze", ops("Transpose", dense, perm=[1, 0]), ops.ints([2]))  # [E, T, 1]
    each = ops("Where", ops("Equal", shares, zero), zero, each)  # what was not chosen may be infinite
    result = ops("ReduceSum", ops("Mul", each, shares), ops.ints([0]), keepdims=0)
    ops.nodes[-1].name = _name(form, str(down.name))
    replace_node(graph, node, ops, result)
    graph.remove(node, safe=True)


def _made_by(value: ir.Value | None, *way: int) -> ir.Node:
    """The node that makes a value, or what it reads at these places, one after the other."""
    assert value is not None
    node = value.producer()
    for place in way:
        node = node.inputs[place].producer()  # type: ignore[union-attr]
    assert node is not None
    return node


def _product(node: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The MatMul that a node is or adds a bias to, and that bias."""
    if node.op_type != "Add":
        return node, None
    return _made_by(node.inputs[0]), _made_by(node.inputs[1]).inputs[0]


def match_experts(node: ir.Node) -> Experts | None:
    """The mixture of experts whose sum a node gives, as `expand_experts` wrote it; None of any other node."""
    if node.op_type != "ReduceSum" or not str(node.name).startswith(_PREFIX):
        return None
    each, shares = _made_by(node.inputs[0]).inputs
    scatter, (down, down_bias) = _made_by(shares, 0, 0), _product(_made_by(each, 2))
    up = _made_by(down.inputs[0], 1)
    while up.op_type != "Slice":
        up = _made_by(up.inputs[0])
    both, bias = _product(_made_by(up.inputs[0]))
    matrices = [_made_by(product.inputs[1], 0) for product in (both, down)]
    (gate_up, first), (rows, second) = (match_weight(reshape.inputs[0]) for reshape in matrices)
    x, (_, index, weights) = _made_by(both.inputs[0]).inputs[0], scatter.inputs
    count = ir.convenience.get_const_tensor(matrices[1].inputs[1])  # type: ignore[arg-type]
    assert x is not None
    assert index is not None
    assert weights is not None
    assert gate_up is not None
    assert rows is not None
    assert count is not None
    return Experts(
        x=x,
        index=index,
        weights=weights,
        dense=scatter.outputs[0],
        gate_up=gate_up,
        down=rows,
        blocks=(first, second),
        biases=(bias, down_bias),
        gate=_gate(str(node.name)),
        count=int(count.numpy()[0]),
    )


def replace_experts(graph: ir.Graph, lower: Callable[[Ops, Experts], ir.Value]) -> None:
    """Put what `lower` makes of each mixture into its place."""
    for node in list(graph):
        experts = match_experts(node)
        if experts is not None:
            ops = Ops()
            replace_node(graph, node, ops, lower(ops, experts))
            graph.remove(node, safe=True)
