"""Add and RMSNormalization → SkipSimplifiedLayerNormalization; x · σ(x) → QuickGelu; comparisons in float32."""

from __future__ import annotations

import onnx_ir as ir

from lora_drop_export.graphs.nodes import Ops, replace_node

from .linears import MICROSOFT

_COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")


def _fuse_silu(graph: ir.Graph, node: ir.Node) -> None:
    for x, gate in (node.inputs, node.inputs[::-1]):
        sigmoid = gate.producer() if gate is not None else None
        if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is x:
            ops = Ops()
            replace_node(graph, node, ops, ops("QuickGelu", x, domain=MICROSOFT, alpha=1.0))
            return


def _fuse_skip_norm(graph: ir.Graph, node: ir.Node) -> None:
    x, scale = node.inputs
    assert x is not None
    add = x.producer()
    if add is None or add.op_type != "Add" or x.is_graph_output() or node.attributes["axis"].as_int() != -1:
        return
    a, b = add.inputs
    assert a is not None
    assert b is not None
    if a.shape is None or len(a.shape) not in (2, 3) or str(a.shape) != str(b.shape):
        return
    attributes = {"epsilon": node.attributes["epsilon"].as_float()}
    fused = ir.node("SkipSimplifiedLayerNormalization", [a, b, scale], attributes, domain=MICROSOFT, num_outputs=4)
    norm, mean, deviation, total = fused.outputs
    mean.name = deviation.name = ""
    for new, old in ((norm, node.outputs[0]), (total, x)):
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new)
    graph.insert_after(node, [fused])


def compare_in_float32(graph: ir.Graph) -> None:
    """Of bfloat16 the CUDA provider has no comparison, such as that in Apertus' softplus."""
    # Case 15
    for node in list(graph):
        if node.op_type not in _COMPARISONS or node.inputs[0].dtype != ir.DataType.BFLOAT16:  # type: ignore[union-attr]
            continue
        for place, value in enumerate(node.inputs):
            ops = Ops()
            wide = ops("Cast", value, to=int(ir.DataType.FLOAT))
            graph.insert_before(node, ops.nodes)
            node.replace_input_with(place, wide)


def fuse_elementwise(graph: ir.Graph) -> None:
    # Case 4
    for node in list(graph):
        if node.op_type == "Mul":
            _fuse_silu(graph, node)
        if node.op_type == "RMSNormalization" and node.inputs[0].dtype == ir.DataType.FLOAT:  # type: ignore[union-attr]
            _fuse_skip_norm(graph, node)
