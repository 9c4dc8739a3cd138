"""Cache writes and Attention → GroupQueryAttention, folded where query heads share K and V."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from lora_drop_runtime.bundle.manifest import OrtEntry

from lora_drop_export.graphs.initializers import seen_as
from lora_drop_export.graphs.match import cache_write, mask_window
from lora_drop_export.graphs.nodes import HEADS_FIRST, Ops, replace_node

from .lengths import Lengths
from .linears import MICROSOFT
from .packing import Packing, choice
from .rotations import Rotations
from .rows import tokens_first

# Query heads that share K and V, from which on folding them pays: 2× as fast with 7, 1.5× with 6, slower with 3
MIN_FOLD = 4


def _resized_heads(ops: Ops, rows: ir.Value, heads: int, before: int, after: int) -> ir.Value:
    # Case 8; [B, S, H·before] with zeros added to each head, or cut off, as [B, S, H·after]
    if before == after:
        return rows
    split = ops("Reshape", rows, ops.ints([0, 0, heads, before]))
    if before < after:
        changed = ops("Pad", split, ops.ints([0] * 7 + [after - before]))
    else:
        changed = ops("Slice", split, *(ops.ints([n]) for n in (0, after, 3)))
    return ops("Reshape", changed, ops.ints([0, 0, heads * after]))


def _channel_scales(graph: ir.Graph, ops: Ops, scale: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """Of int8 caches, float32 [1, H, 1, D], from [H, 1, D], or from [H, 1, 1] where a head has one."""
    if int(scale.shape[2]) == head_dim:  # type: ignore[index, arg-type]
        return seen_as(graph, scale, ".channels", scale.dtype, [1, heads, 1, head_dim])
    return ops("Expand", scale, ops.ints([1, heads, 1, head_dim]))


def _padded_scales(ops: Ops, scales: ir.Value, before: int, after: int) -> ir.Value:
    # Case 8; of the channels of int8 caches, float32 [1, H, 1, before] as [1, H, 1, after]
    if before == after:
        return scales
    return ops("Pad", scales, ops.ints([0] * 7 + [after - before]), ops.constant(np.array(1, np.float32)))


def _head_factors(
    ops: Ops, scales: ir.Value | None, kv_heads: int, group: int, head_dim: int, like: ir.Value
) -> ir.Value:
    # Case 12; the scales of int8 caches, float32 [1, Hkv, 1, D], for Hkv·group heads of activations, [H·D]
    split = ops("Reshape", scales, ops.ints([kv_heads, 1, head_dim]))
    each = ops("Expand", split, ops.ints([kv_heads, group, head_dim]))
    return ops("Cast", ops("Reshape", each, ops.ints([kv_heads * group * head_dim])), to=int(like.dtype))  # type: ignore[arg-type]


def _folded(
    inputs: list[ir.Value | None], length: ir.Value | None, attributes: dict[str, Any], head_dim: int
) -> tuple[Ops, list[ir.Value]]:
    # Case 7; outputs like GroupQueryAttention
    query, key, value, past_key, past_value, last_slot, total = inputs[:7]  # of one row, which has its token
    kv_heads, group = attributes["kv_num_heads"], attributes["num_heads"] // attributes["kv_num_heads"]
    ops = Ops()
    split = ops("Reshape", query, ops.ints([1, kv_heads, group, head_dim]))
    queries = ops("Reshape", ops("Transpose", split, perm=list(HEADS_FIRST)), ops.ints([1, group, kv_heads * head_dim]))
    caches = [
        ops("TensorScatter", past, ops("Reshape", rows, ops.ints([1, kv_heads, 1, head_dim])), length, axis=2)
        for past, rows in ((past_key, key), (past_value, value))
    ]
    none = ops.constant(np.zeros((1, 0, kv_heads * head_dim), np.float32))  # K and V are in the cache already
    changed = attributes | {"num_heads": kv_heads, "causal": 0}
    mixed = ops("GroupQueryAttention", *(queries, none, none, *caches, last_slot, total), domain=MICROSOFT, **changed)
    heads_last = ops(
        "Transpose", ops("Reshape", mixed, ops.ints([1, group, kv_heads, head_dim])), perm=list(HEADS_FIRST)
    )
    rows = ops("Reshape", heads_last, ops.ints([1, 1, attributes["num_heads"] * head_dim]))
    return ops, [rows, *caches]


def pad_cache_write(graph: ir.Graph, node: ir.Node) -> None:
    # Case 8, where a cache is written and nothing attends to it
    past, rows = node.inputs[:2]
    head_dim = int(past.shape[3])  # type: ignore[union-attr, index, arg-type]
    padded = OrtEntry.lowered.padded(head_dim)
    if padded == head_dim or not node.outputs[0].is_graph_output():
        return
    ops = Ops()
    wide = ops("Pad", rows, ops.ints([0] * 7 + [padded - head_dim]))
    graph.insert_before(node, ops.nodes)
    node.replace_input_with(1, wide)
    for value in (past, node.outputs[0]):
        value.shape = ir.Shape([*value.shape[:3], padded])  # type: ignore[union-attr, index]


def lower_attention(
    graph: ir.Graph,
    node: ir.Node,
    lengths: Lengths,
    rotations: Rotations,
    packing: Packing | None,
    sinks: ir.Value | None,
) -> None:
    # Cases 6 to 9, 11 and 14
    query = node.inputs[0]
    assert query is not None
    heads, head_dim = int(query.shape[1]), int(query.shape[3])  # type: ignore[index, arg-type]
    (key_write, key, key_scale), (value_write, value, value_scale) = (cache_write(v) for v in node.inputs[1:3])
    past_key, _, length = key_write.inputs
    past_value = value_write.inputs[0]
    present_key, present_value = key_write.outputs[0], value_write.outputs[0]
    kv_heads, padded = int(past_key.shape[1]), OrtEntry.lowered.padded(head_dim)  # type: ignore[union-attr, index, arg-type]
    ops = Ops()
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
    attributes["scale"] = node.attributes["scale"].as_float()
    if "softcap" in node.attributes:
        attributes["softcap"] = node.attributes["softcap"].as_float()
    if window := mask_window(node):
        attributes["local_window_size"] = window
    scales: list[ir.Value | None] = [None, None]
    if key_scale is not None and value_scale is not None:
        channels = (_channel_scales(graph, ops, scale, kv_heads, head_dim) for scale in (key_scale, value_scale))
        scales = [_padded_scales(ops, scale, head_dim, padded) for scale in channels]
        kind = "PER_CHANNEL" if query.dtype == ir.DataType.FLOAT else "PER_TENSOR"
        attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": 8}
    plain = key_scale is None and sinks is None and not window
    folds = heads // kv_heads >= MIN_FOLD and query.dtype == ir.DataType.FLOAT and plain
    rows: list[ir.Value | None] = [None, None, None]
    rotary: list[ir.Value | None] = [None] * 3
    biases: list[ir.Value | None] = [None, None]  # of the scores, and the sinks
    if sinks is not None:
        biases[1] = sinks if sinks.dtype == query.dtype else ops("Cast", sinks, to=int(query.dtype))  # type: ignore[arg-type]
    rotated = None if folds or query.dtype != ir.DataType.FLOAT else rotations.joined(query, key, value)
    if rotated is not None:
        rows[0], cos, sin = rotated  # [B, S, (H + 2 Hkv)·D]
        rotary = [cos, sin, lengths.positions()]
        attributes["do_rotary"] = 1
    else:
        rows = [  # [B, S, H·D] or [B, S, Hkv·D]
            _resized_heads(ops, tokens_first(ops, tensor), count, head_dim, padded)
            for tensor, count in ((query, heads), (key, kv_heads), (value, kv_heads))
        ]
    factor = None  # of the output
    if key_scale is not None and query.dtype != ir.DataType.FLOAT:  # case 12
        of_keys, of_values = scales
        group = heads // kv_heads
        rows = [
            ops("Mul", rows[0], _head_factors(ops, of_keys, kv_heads, group, padded, query)),
            ops("Div", rows[1], _head_factors(ops, of_keys, kv_heads, 1, padded, query)),
            ops("Div", rows[2], _head_factors(ops, of_values, kv_heads, 1, padded, query)),
        ]
        factor = _head_factors(ops, of_values, kv_heads, group, padded, query)
        scales = [ops.constant(np.ones(1, np.float32))] * 2
    for past in (past_key, past_value):
        past.shape = ir.Shape([*past.shape[:3], padded])  # type: ignore[union-attr, index]
    inputs = [*rows, past_key, past_value, *lengths.get(length), *rotary, *biases, *scales]
    inputs += [None, None, lengths.new_tokens]
    while inputs[-1] is None:
        inputs.pop()
    any_rows, given = Ops(), list(inputs)
    if packing is not None:
        given[:3] = [packing.chunks(any_rows, row) for row in rows]
    attention = ir.node("GroupQueryAttention", given, attributes, domain=MICROSOFT, num_outputs=3)
    any_rows.nodes.append(attention)
    mixed, *presents = attention.outputs
    if packing is not None:
        mixed = packing.tokens(any_rows, mixed)
    if folds:
        one_row = _folded(inputs, length, attributes, padded)
        condition, name = lengths.folds(length, heads // kv_heads), f"layer_{past_key.name}"  # type: ignore[union-attr]
        chosen = choice(condition, one_row, (any_rows, [mixed, *presents]), name)
        ops.nodes.append(chosen)
        mixed, *presents = chosen.outputs
    else:
        ops.nodes += any_rows.nodes
    mixed.type = query.type
    scaled = mixed if factor is None else ops("Mul", mixed, factor)
    merged = _resized_heads(ops, scaled, heads, padded, head_dim)  # [B, S, H·D]
    merged.type = query.type
    for made, old in zip(presents, (present_key, present_value), strict=True):
        made.name, made.shape, made.type = old.name, ir.Shape([*old.shape[:3], padded]), old.type  # type: ignore[index]
        old.name = f"{old.name}.neutral"
        graph.outputs[:] = [made if output is old else output for output in graph.outputs]
    (heads_last,) = (use.node for use in node.outputs[0].uses())
    assert heads_last.op_type == "Transpose"
    for use in list(heads_last.outputs[0].uses()):
        shape = use.node.outputs[0].shape
        if use.node.op_type == "Reshape" and shape is not None and len(shape) == 3 and shape[2] == heads * head_dim:
            merged.shape = shape
            use.node.outputs[0].replace_all_uses_with(merged)
    split = ops("Reshape", merged, ops.ints([0, 0, heads, head_dim]))
    replace_node(graph, heads_last, ops, split)
