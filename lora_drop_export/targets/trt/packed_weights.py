"""int4 weights as inputs: products by the Int4Gemm plugin, rows of the embedding unpacked where they are looked up.

Enters: a step graph whose DequantizeLinear nodes read UINT4 blocks, as the bundle stores them. Leaves: the same graph
over the same bytes, seen as INT8, since no engine has an input of 4 bits; no block is dequantized but by the plugin.
TensorRT itself dequantizes constants alone.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from lora_drop_export.graphs.match import QuantizedBlocks, match_linear, match_weight
from lora_drop_export.graphs.nodes import Ops, replace_node

from .plugin_form import PLUGIN_NAMESPACE, PLUGIN_VERSION

GEMM_OP = "Int4Gemm"
_MULTIPLE = 32  # of which the kernel takes inputs (plugins/kernels/int4_gemm.h); it takes every block of the bundle


def unfit_weight(model: onnx.ModelProto) -> str:
    """What the kernel does not take of a step graph's quantized weights; empty where it takes them all."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        weight = tensors[node.input[0]] if node.op_type == "DequantizeLinear" else None
        if weight is not None and (weight.data_type != onnx.TensorProto.UINT4 or weight.dims[1] % _MULTIPLE):
            bits = 4 if weight.data_type == onnx.TensorProto.UINT4 else 8
            return (
                f"the plugin Int4Gemm takes 4 bits and a multiple of {_MULTIPLE} inputs, and {weight.name} has {bits} "
                f"bits and {weight.dims[1]} inputs"
            )
    return ""


def _seen_as_bytes(value: ir.Value) -> None:
    """Let an initializer of packed nibbles [N, n] be INT8 [N, n / 2] over the same bytes."""
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    rows, columns = tensor.shape.numpy()
    shape = ir.Shape([rows, columns // 2])
    value.const_value = ir.ExternalTensor(
        tensor.location, tensor.offset, tensor.length, ir.DataType.INT8, shape=shape, name=str(value.name)
    )
    value.shape, value.type = shape, ir.TensorType(ir.DataType.INT8)


def see_as_bytes(graph: ir.Graph) -> None:
    """Of all quantized weights, and of zero points that are not all alike.

    Ensures: what is dequantized now is of another type than its node says; every such node loses its readers next.
    """
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        weight, blocks = match_weight(node.outputs[0])
        assert weight is not None
        assert blocks is not None
        assert blocks.bits == 4, weight.name
        _seen_as_bytes(weight)
        if not blocks.symmetric:
            _seen_as_bytes(blocks.zero_points)


def product(ops: Ops, x: ir.Value, weight: ir.Value, scales: ir.Value, points: ir.Value | None, block: int) -> ir.Value:
    """x [B, S, K] times weights [N, K / 2], packed: [B, S, N]."""
    return ops(
        GEMM_OP,
        *(x, weight, scales, *(() if points is None else (points,))),
        domain=PLUGIN_NAMESPACE,
        plugin_version=PLUGIN_VERSION,
        plugin_namespace=PLUGIN_NAMESPACE,
        block=block,
        has_zero_points=int(points is not None),
    )


def zero_points_of(blocks: QuantizedBlocks) -> ir.Value | None:
    """None where all lie in the middle, which the kernel knows."""
    return None if blocks.symmetric else blocks.zero_points


def multiply_packed(graph: ir.Graph) -> None:
    """Let the plugin compute the linear layers whose weights are quantized; a bias stays an Add after it."""
    for matmul in [node for node in graph if node.op_type == "MatMul"]:
        linear = match_linear(matmul)
        if linear is not None and linear.blocks is not None:
            blocks, ops = linear.blocks, Ops()
            made = product(ops, linear.x, linear.weight, blocks.scales, zero_points_of(blocks), blocks.block_size)
            replace_node(graph, matmul, ops, made)
            graph.remove(matmul, safe=True)


def _nibbles(ops: Ops, packed: ir.Value) -> ir.Value:
    """INT8 [B, S, n] as INT32 [B, S, n, 2], 0 … 15; the lower one of a byte first."""
    sixteen, whole, zero = (ops.constant(np.array(value, np.int32)) for value in (16, 256, 0))
    signed = ops("Cast", packed, to=int(ir.DataType.INT32))
    byte = ops("Where", ops("Less", signed, zero), ops("Add", signed, whole), signed)
    high = ops("Div", byte, sixteen)
    low = ops("Sub", byte, ops("Mul", high, sixteen))
    last = ops.ints([-1])
    return ops("Concat", ops("Unsqueeze", low, last), ops("Unsqueeze", high, last), axis=-1)


def look_up_packed(graph: ir.Graph) -> None:
    """Unpack the rows of a quantized table after they are looked up by token, [B, S], in the table's own arithmetic."""
    for gather in [node for node in graph if node.op_type == "Gather"]:
        table, blocks = match_weight(gather.inputs[0])
        if table is None or blocks is None:
            continue
        ids, size, ops = gather.inputs[1], blocks.block_size, Ops()
        width = 2 * int(table.shape[1])  # type: ignore[index, arg-type]
        shape = ops.ints([0, 0, width // size, size])
        values = ops("Reshape", _nibbles(ops, ops("Gather", table, ids)), shape)
        if blocks.symmetric:
            points = ops.constant(np.array(8, np.int32))
        else:
            grid = ops.ints([0, 0, width // size, 1])
            points = ops("Reshape", _nibbles(ops, ops("Gather", blocks.zero_points, ids)), grid)
        whole = ops("Cast", ops("Sub", values, points), to=int(blocks.scales.dtype))  # type: ignore[arg-type]
        scales = ops("Unsqueeze", ops("Gather", blocks.scales, ids), ops.ints([-1]))  # [B, S, K / size, 1]
        rows = ops("Reshape", ops("Mul", whole, scales), ops.ints([0, 0, width]))
        rows.name, gather.outputs[0].name = gather.outputs[0].name, None
        replace_node(graph, gather, ops, rows)
        graph.remove(gather, safe=True)
