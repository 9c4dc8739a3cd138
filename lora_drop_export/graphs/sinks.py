"""Attention sinks in plain ONNX, and the way back: what a lowering gives a kernel that knows them.

A sink is a score of a head that takes its share of the softmax and has no value, so `softmax([s, σ])[:-1] V` is
`softmax(s) V · sigmoid(log Σ eˢ − σ)`: the Attention node stays, and what it gives is scaled.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .nodes import Ops

_PREFIX = "sinks."  # begins the name of the node that scales


def masked_scores(ops: Ops, attention: ir.Node, kv_heads: int) -> ir.Value:
    """The scores of an Attention node, float32 [B, G, H/G, S, C], next to −∞ where its mask hides a slot."""
    query, key, _, mask = attention.inputs
    assert query is not None
    heads, head_dim = int(query.shape[1]), int(query.shape[3])  # type: ignore[index, arg-type]

    def number(value: float) -> ir.Value:
        return ops.constant(np.array(value, np.float32))

    rows = ops("Reshape", query, ops.ints([0, kv_heads, heads // kv_heads, -1, head_dim]))  # [B, G, H/G, S, D]
    keys = ops("Unsqueeze", ops("Transpose", key, perm=[0, 1, 3, 2]), ops.ints([2]))  # [B, G, 1, D, C]
    scores = ops("Cast", ops("MatMul", rows, keys), to=int(ir.DataType.FLOAT))
    softcap = attention.attributes["softcap"].as_float() if "softcap" in attention.attributes else 0.0
    scores = ops("Mul", scores, number(attention.attributes["scale"].as_float() / (softcap or 1.0)))
    if softcap:
        scores = ops("Mul", ops("Tanh", scores), number(softcap))
    return ops("Where", ops("Unsqueeze", mask, ops.ints([2])), scores, number(float(np.finfo(np.float32).min)))


def scaled_by_sinks(ops: Ops, attention: ir.Node, sinks: ir.Value, kv_heads: int) -> ir.Value:
    """What an Attention gives, [B, H, S, D], less the share of the sinks [H]; computed in float32."""
    query, attended = attention.inputs[0], attention.outputs[0]
    assert query is not None
    heads = int(query.shape[1])  # type: ignore[index, arg-type]
    scores = masked_scores(ops, attention, kv_heads)
    largest = ops("ReduceMax", scores, ops.ints([-1]), keepdims=1)
    total = ops("ReduceSum", ops("Exp", ops("Sub", scores, largest)), ops.ints([-1]), keepdims=1)
    logarithm = ops("Reshape", ops("Add", largest, ops("Log", total)), ops.ints([0, heads, -1, 1]))  # [B, H, S, 1]
    each = ops("Reshape", ops("Cast", sinks, to=int(ir.DataType.FLOAT)), ops.ints([1, heads, 1, 1]))
    share = ops("Cast", ops("Sigmoid", ops("Sub", logarithm, each)), to=int(query.dtype))  # type: ignore[arg-type]
    result = ops("Mul", attended, share)
    ops.nodes[-1].name = f"{_PREFIX}{sinks.name}"
    result.type = attended.type
    return result


def _remove_unread(graph: ir.Graph, node: ir.Node) -> None:
    """A node, and what nothing but it read."""
    todo: list[ir.Node | None] = [node]
    while todo:
        one = todo.pop()
        if one is None or one.graph is None or any(value.uses() or value.is_graph_output() for value in one.outputs):
            continue
        makers = [value.producer() for value in one.inputs if value is not None]
        graph.remove(one, safe=True)
        todo += makers


def take_sinks(graph: ir.Graph) -> dict[ir.Node, ir.Value]:
    """Leave the sinks out of a graph.

    Returns: of each Attention that had some, these [H], as they are stored.
    """
    found = {}
    for node in [one for one in graph if one.op_type == "Mul" and str(one.name).startswith(_PREFIX)]:
        attended, share = node.inputs
        assert attended is not None
        assert share is not None
        less = share.producer().inputs[0].producer().inputs[0].producer()  # type: ignore[union-attr]
        each = less.inputs[1].producer()  # type: ignore[union-attr]
        sinks = each.inputs[0]  # type: ignore[union-attr]
        while sinks is not None and sinks.producer() is not None:  # widened, in bundles in halves
            sinks = sinks.producer().inputs[0]  # type: ignore[union-attr]
        attention = attended.producer()
        assert attention is not None
        assert sinks is not None
        found[attention] = sinks
        node.outputs[0].replace_all_uses_with(attended)
        _remove_unread(graph, node)
    return found
