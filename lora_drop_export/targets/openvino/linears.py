"""Linear layers → Linear, several that read one tensor → one; looked-up tables → Lookup."""

from __future__ import annotations

import onnx_ir as ir
from lora_drop_runtime.bundle.paged_io import DOMAIN

from lora_drop_export.graphs.initializers import joined_linear, seen_as
from lora_drop_export.graphs.match import Linear, QuantizedBlocks, linear_groups, match_linear, match_weight
from lora_drop_export.graphs.nodes import Ops, replace_named

_BLOCKS = ".blocks"


def weight_inputs(graph: ir.Graph, weight: ir.Value, blocks: QuantizedBlocks | None) -> tuple[list[ir.Value], int]:
    """What stands for a weight [N, K], and how it is quantized: [N, K / block, block], scales [N, K / block, 1] and
    zero points likewise."""
    if blocks is None:
        return [weight], 0
    rows, columns = (int(size) for size in weight.shape)  # type: ignore[union-attr, arg-type]
    count = columns // blocks.block_size
    assert weight.dtype is not None
    inputs = [seen_as(graph, weight, _BLOCKS, weight.dtype, [rows, count, blocks.block_size])]
    inputs.append(seen_as(graph, blocks.scales, _BLOCKS, ir.DataType.FLOAT, [rows, count, 1]))
    if blocks.symmetric:
        return inputs, 1
    return [*inputs, seen_as(graph, blocks.zero_points, _BLOCKS, weight.dtype, [rows, count, 1])], 2


def _product(graph: ir.Graph, ops: Ops, linear: Linear) -> ir.Value:
    weight, quantized = weight_inputs(graph, linear.weight, linear.blocks)
    bias = [] if linear.bias is None else [linear.bias]
    maker = linear.x.producer()
    attributes = {"quantized": quantized, "bias": len(bias), "gated": int(maker is not None and maker.op_type == "Mul")}
    result = ops("Linear", linear.x, *weight, *bias, domain=DOMAIN, **attributes)
    assert linear.x.shape is not None
    result.type, result.shape = linear.x.type, ir.Shape([*list(linear.x.shape)[:-1], linear.shape[0]])
    return result


def _fuse(graph: ir.Graph, group: list[Linear]) -> bool:
    """Make one of several; False where the weights do not allow it."""
    whole = joined_linear(graph, group)
    if whole is None:
        return False
    ops = Ops()
    product, widths = _product(graph, ops, whole), [linear.shape[0] for linear in group]
    split = ir.node("Split", [product, ops.ints(widths)], {"axis": -1}, num_outputs=len(group))
    ops.nodes.append(split)
    graph.insert_before(next(use.node for use in whole.x.uses() if use.node.op_type == "MatMul"), ops.nodes)
    for linear, part in zip(group, split.outputs, strict=True):
        part.type, part.shape = product.type, linear.last.outputs[0].shape
        linear.last.outputs[0].replace_all_uses_with(part)
    return True


def lower_linears(graph: ir.Graph) -> None:
    # Two (gate, up) stay apart: OpenVINO then makes activation and product part of them, a split is a copy
    groups = {group[0].weight: group for group in linear_groups(graph) if len(group) > 2}
    for node in list(graph):
        linear = match_linear(node) if node.op_type == "MatMul" else None
        if linear is None or (linear.weight in groups and _fuse(graph, groups[linear.weight])):
            continue
        if linear.last.outputs[0].uses() or linear.last.outputs[0].is_graph_output():  # else it was fused
            ops = Ops()
            replace_named(graph, linear.last, ops, _product(graph, ops, linear))


def lower_lookups(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "Gather":
            continue
        table, blocks = match_weight(node.inputs[0])
        if table is None or not isinstance(table.const_value, ir.ExternalTensor):
            continue
        inputs, quantized = weight_inputs(graph, table, blocks)
        ops = Ops()
        replace_named(graph, node, ops, ops("Lookup", node.inputs[1], *inputs, domain=DOMAIN, quantized=quantized))
