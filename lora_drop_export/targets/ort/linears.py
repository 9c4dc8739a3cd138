"""Linear layers → Gemm or MatMulNBits, several that read one tensor → one; looked-up tables."""

from __future__ import annotations

import onnx_ir as ir

from lora_drop_export.graphs.initializers import TABLE, in_file_order, joined_linear, seen_as
from lora_drop_export.graphs.match import Linear, match_weight
from lora_drop_export.graphs.nodes import Ops, replace_node

from .rows import Rows

MICROSOFT = "com.microsoft"


def linear_product(graph: ir.Graph, ops: Ops, linear: Linear, rows: Rows) -> ir.Value:
    # Case 1; [B, S, out], or [T, out]
    x, blocks = linear.x, linear.blocks
    out_features, in_features = linear.shape
    assert x.shape is not None
    if blocks is None:
        bias = () if linear.bias is None else (linear.bias,)
        if len(x.shape) == 2:  # [T, in], beside experts
            result = ops("Gemm", x, linear.weight, *bias, transB=1)
            result.type, result.shape = x.type, ir.Shape([x.shape[0], out_features])
            return result
        product = ops("Gemm", rows.get(x), linear.weight, *bias, transB=1)  # [B·S, out]
        result = ops("Reshape", product, rows.tokens_shape(ops, x, out_features))
    else:
        count, block_bytes = in_features // blocks.block_size, blocks.block_size * blocks.bits // 8
        weight = seen_as(graph, linear.weight, ".blocks", ir.DataType.UINT8, [out_features, count, block_bytes])
        zero_points = None  # the operator's own are in the middle
        if not blocks.symmetric:
            shape = [out_features, count * blocks.bits // 8]
            zero_points = seen_as(graph, blocks.zero_points, ".blocks", ir.DataType.UINT8, shape)
        product = result = ops(
            "MatMulNBits",
            *(x, weight, blocks.scales, zero_points, None, linear.bias),
            domain=MICROSOFT,
            K=in_features,
            N=out_features,
            bits=blocks.bits,
            block_size=blocks.block_size,
            accuracy_level=4,  # activations as int8: without it the kernels are 2 to 50 times as slow
        )
    result.type, result.shape = x.type, ir.Shape([*x.shape[:-1], out_features])
    if product is not result:
        rows.register(result, product)
    return result


def fuse_linears(graph: ir.Graph, group: list[Linear], rows: Rows) -> bool:
    # Case 2; False where the weights do not allow it
    group = in_file_order(group)
    whole = joined_linear(graph, group)
    if whole is None:
        return False
    ops = Ops()
    widths = [linear.shape[0] for linear in group]
    product = linear_product(graph, ops, whole, rows)
    split = ir.node("Split", [product, ops.ints(widths)], {"axis": -1}, num_outputs=len(group))
    ops.nodes.append(split)
    graph.insert_before(next(use.node for use in whole.x.uses() if use.node.op_type == "MatMul"), ops.nodes)
    for linear, part in zip(group, split.outputs, strict=True):
        part.type, part.shape = product.type, ir.Shape([*product.shape[:-1], linear.shape[0]])  # type: ignore[index]
        linear.last.outputs[0].replace_all_uses_with(part)
    return True


def lower_lookup(graph: ir.Graph, node: ir.Node) -> None:
    # Case 5
    table, blocks = match_weight(node.inputs[0])
    if table is None or not isinstance(table.const_value, ir.ExternalTensor):
        return
    assert table.shape is not None
    assert table.dtype is not None
    alias = seen_as(graph, table, TABLE, table.dtype, list(table.shape))
    if blocks is None:
        node.replace_input_with(0, alias)
        return
    ops = Ops()
    rows = ops(  # zero points are always given: over UINT4 its own are 0, over UINT8 128
        "GatherBlockQuantized",
        *(alias, node.inputs[1], blocks.scales, blocks.zero_points),
        domain=MICROSOFT,
        gather_axis=0,
        quantize_axis=1,
        block_size=blocks.block_size,
        bits=blocks.bits,
    )
    replace_node(graph, node, ops, rows)
