"""Neutral step graphs → the one graph that ONNX Runtime runs fast, on the CPU in float32, on a GPU in halves.

Enters: refresh.onnx and lora.onnx with external weights. Leaves: `steps.onnx`, whose input `lora_step` chooses between
them by an If: one session holds each weight once, also where ONNX Runtime packs it for its kernels.

    1. x Wᵀ [+ b]               → Gemm(transB=1) on [B·S, in] (the weight keeps its place on disk), or MatMulNBits
    2. linear layers that read  → one, and a Split, where their weights lie back to back in one file
       one tensor
    3. [B, S, ·] between Gemms  → [B·S, ·], so that no Reshape stands around each of them
    4. Add, RMSNormalization    → SkipSimplifiedLayerNormalization;  x · σ(x) → QuickGelu
    5. Gather of a quantized    → GatherBlockQuantized, on the same bytes under a second name: the rows that are looked
       table                      up are read from the file, the matrix product packs a copy of its own
    6. TensorScatter ×2 +       → com.microsoft.GroupQueryAttention: past and present share one buffer, the cost follows
       Attention                  the valid length, RoPE stays outside, so that cache slot ≠ position is exact
    7. the same for one token   → an If around it: TensorScatter ×2 + GroupQueryAttention over a sequence made of the
       of one row                 query heads that share K and V, which are then read once; where MIN_FOLD or more do,
                                  and once there are as many slots (the operator's own condition)
    8. RotaryEmbedding          → into the attention where q, k and v are one product, with tables over all positions;
                                  else on [B, S, H·D], without the transposes around it
    9. logits                   → float32, whatever the dtype

Requires: the form that surgery.py makes. Ensures: no Attention or mask remains, and a TensorScatter without an
attention only where that is dead: before a dropped layer that repeats its state (`recurrent`, `anchor`, rank 0).
GroupQueryAttention takes S > 1 with a past only at B = 1; the session runs longer prompts row by row.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from lora_drop_runtime.bundle.graph_io import LORA_STEP
from onnx import helper
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from lora_drop_export.graphs.match import (
    Linear,
    Ops,
    float32_logits,
    is_row_wise,
    joined_name,
    linear_groups,
    mask_window,
    match_linear,
    match_weight,
    rank,
    replace_node,
)

MICROSOFT = "com.microsoft"
# Query heads that share K and V, from which on folding them pays: 2× as fast with 7, 1.5× with 6, slower with 3
MIN_FOLD = 4
ROTARY_BYTES = 32 << 20  # of tables that are worth a node or two a layer
_HEADS_FIRST = (0, 2, 1, 3)
_TABLE = ".table"  # the second name of a weight that is looked up row by row


def ort_from_neutral(refresh: onnx.ModelProto, lora: onnx.ModelProto, max_positions: int) -> onnx.ModelProto:
    """Lower both steps and join them; the arguments are left as they were.

    Args:
        max_positions: tokens of the longest row.
    """
    return _joined(lower_step(lora, max_positions), lower_step(refresh, max_positions))


def lower_step(proto: onnx.ModelProto, max_positions: int) -> onnx.ModelProto:
    """One step alone, with its own inputs and outputs."""
    model = ir.serde.deserialize_model(proto)
    graph = model.graph
    model.opset_imports[MICROSOFT] = 1
    for node in list(graph):
        if node.op_type == "Gather":
            _lower_lookup(graph, node)
    rows = _Rows(graph)
    groups = {group[0].weight: group for group in linear_groups(graph)}
    for node in list(graph):  # in order, so that a layer finds the twins of the one before
        if node.op_type == "Reshape" and str(node.name).startswith("surrogate."):
            rows.take_in(node)
            continue
        linear = match_linear(node) if node.op_type == "MatMul" else None
        if linear is None or (linear.weight in groups and _fuse_linears(graph, groups[linear.weight], rows)):
            continue
        if linear.last.outputs[0].uses() or linear.last.outputs[0].is_graph_output():  # else it was fused
            ops = Ops()
            replace_node(graph, linear.last, ops, _product(graph, ops, linear, rows))
    rows.settle()
    lengths, rotations = _Lengths(graph), _Rotations(proto, graph, max_positions)
    for node in list(graph):
        if node.op_type == "Attention":
            _lower_attention(graph, node, lengths, rotations)
    graph.sort()
    RemoveUnusedNodesPass()(model)
    _fuse_elementwise(graph)
    float32_logits(graph)
    graph.sort()
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    assert not any(node.op_type in ("Attention", "DequantizeLinear") for node in graph)
    return ir.serde.serialize_model(model)


# ── linear layers and the embedding ────────────────────────────────────────────────────────────────────────────


class _Rows:
    """The [B·S, width] twins of [B, S, width] tensors, made where they are asked for."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: dict[ir.Value, ir.Value] = {}
        self.cloned: list[ir.Value] = []

    def settle(self) -> None:
        """What still reads a tensor whose operator has a twin reads the twin, so that one of the two goes."""
        for value in self.cloned:
            ops = Ops()
            assert value.shape is not None
            width = int(value.shape[2])  # type: ignore[arg-type]
            whole = ops("Reshape", self.made[value], _tokens_shape(self.graph, ops, value, width))
            whole.type, whole.shape = value.type, value.shape
            value.replace_all_uses_with(whole)
            self.graph.extend(ops.nodes)

    def get(self, value: ir.Value) -> ir.Value:
        # Case 3: of a row-wise operator's output the operator on the twins of its inputs, else a Reshape
        if value not in self.made:
            assert value.shape is not None
            node = value.producer()
            ops = Ops()
            if node is not None and is_row_wise(node):
                inputs = [self.get(i) if i is not None and rank(i) == 3 else i for i in node.inputs]
                attributes = dict(node.attributes)
                if "axis" in attributes:
                    attributes["axis"] = ir.AttrInt64("axis", -1)  # it may be counted from the front
                twin = ir.node(node.op_type, inputs, attributes, num_outputs=len(node.outputs))
                ops.nodes.append(twin)
                for old, new in zip(node.outputs, twin.outputs, strict=True):
                    self.register(old, new)
                    self.cloned.append(old)
            else:
                self.register(value, ops("Reshape", value, ops.ints([-1, int(value.shape[2])])))  # type: ignore[arg-type]
            self.graph.insert_after(node, ops.nodes) if node else self.graph.insert_before(self.graph[0], ops.nodes)
        return self.made[value]

    def take_in(self, reshape: ir.Node) -> None:
        """A Reshape between tokens and rows around a surrogate: what it makes is a twin, or has one."""
        before, after = reshape.inputs[0], reshape.outputs[0]
        assert before is not None
        if rank(before) == 3 and rank(after) == 2:
            after.replace_all_uses_with(self.get(before))
        elif rank(before) == 2 and rank(after) == 3:
            self.register(after, before)

    def register(self, value: ir.Value, twin: ir.Value) -> None:
        assert value.shape is not None
        twin.type, twin.shape = value.type, ir.Shape([None, value.shape[2]])
        self.made[value] = twin


def _product(graph: ir.Graph, ops: Ops, linear: Linear, rows: _Rows) -> ir.Value:
    # Case 1; [B, S, out]
    x, blocks = linear.x, linear.blocks
    out_features, in_features = linear.shape
    assert x.shape is not None
    if blocks is None:
        bias = () if linear.bias is None else (linear.bias,)
        product = ops("Gemm", rows.get(x), linear.weight, *bias, transB=1)  # [B·S, out]
        result = ops("Reshape", product, _tokens_shape(graph, ops, x, out_features))
    else:
        count, block_bytes = in_features // blocks.block_size, blocks.block_size * blocks.bits // 8
        weight = _alias(graph, linear.weight, ".blocks", ir.DataType.UINT8, [out_features, count, block_bytes])
        zero_points = blocks.zero_points
        if zero_points is not None:
            shape = [out_features, count * blocks.bits // 8]
            zero_points = _alias(graph, zero_points, ".blocks", ir.DataType.UINT8, shape)
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
    result.type, result.shape = x.type, ir.Shape([*x.shape[:2], out_features])
    if product is not result:
        rows.register(result, product)
    return result


def _tokens_shape(graph: ir.Graph, ops: Ops, x: ir.Value, width: int) -> ir.Value:
    """The shape [B, S, width] for a tensor with the leading sizes of `x`; a constant where S = 1."""
    inputs = {value.name: value for value in graph.inputs}
    if inputs["input_ids"].shape[1] == 1:  # type: ignore[index]
        return ops.ints([-1, 1, width])
    lead = x
    for name in ("input_ids", "logits_index"):  # graph inputs of the same size, so that all layers share one node
        if name in inputs and x.shape is not None and x.shape[:2] == inputs[name].shape[:2]:  # type: ignore[index]
            lead = inputs[name]
    return ops("Concat", ops("Shape", lead, start=0, end=2), ops.ints([width]), axis=0)


def _fuse_linears(graph: ir.Graph, group: list[Linear], rows: _Rows) -> bool:
    # Case 2; False where the weights do not allow it
    first = group[0]
    blocks = [linear.blocks for linear in group if linear.blocks is not None]
    forms = {(b.bits, b.block_size, b.zero_points is None) for b in blocks}
    if len(blocks) not in (0, len(group)) or len(forms) > 1:
        return False
    parts: list[list[ir.Value | None]] = [[linear.weight for linear in group], [linear.bias for linear in group]]
    parts += [[b.scales for b in blocks], [b.zero_points for b in blocks]]
    named = [[value for value in part if value is not None] for part in parts]
    if not all(_lie_back_to_back(part) for part in named):
        return False
    weight, bias, scales, zero_points = (_join(graph, part) for part in named)
    assert weight is not None
    whole = dataclasses.replace(
        first, weight=weight, bias=bias, shape=(sum(linear.shape[0] for linear in group), first.shape[1])
    )
    if scales is not None:
        new = dataclasses.replace(blocks[0], scales=scales, zero_points=zero_points)
        whole = dataclasses.replace(whole, blocks=new)
    ops = Ops()
    widths = [linear.shape[0] for linear in group]
    product = _product(graph, ops, whole, rows)
    split = ir.node("Split", [product, ops.ints(widths)], {"axis": -1}, num_outputs=len(group))
    ops.nodes.append(split)
    graph.insert_before(next(use.node for use in first.x.uses() if use.node.op_type == "MatMul"), ops.nodes)
    for linear, part in zip(group, split.outputs, strict=True):
        part.type, part.shape = product.type, ir.Shape([*product.shape[:2], linear.shape[0]])  # type: ignore[index]
        linear.last.outputs[0].replace_all_uses_with(part)
    return True


def _lie_back_to_back(values: list[ir.Value]) -> bool:
    tensors = [value.const_value for value in values]
    ends = []
    for tensor in tensors:
        if not isinstance(tensor, ir.ExternalTensor):
            return False
        ends.append((tensor.location, int(tensor.offset or 0), int(tensor.offset or 0) + int(tensor.length or 0)))
    return all(a[0] == b[0] and a[2] == b[1] for a, b in itertools.pairwise(ends))


def _join(graph: ir.Graph, values: list[ir.Value]) -> ir.Value | None:
    """One initializer over the bytes of several, along the first axis."""
    if not values:
        return None
    length = rows = 0
    for value in values:
        assert isinstance(value.const_value, ir.ExternalTensor)
        assert value.shape is not None
        length += int(value.const_value.length or 0)
        rows += int(value.shape[0])  # type: ignore[arg-type]
    name = joined_name([str(value.name) for value in values])
    first = values[0]
    return _initializer(graph, name, first.const_value, length, first.dtype, [rows, *first.shape[1:]])  # type: ignore[index]


def _alias(graph: ir.Graph, value: ir.Value, suffix: str, dtype: Any, shape: list[Any]) -> ir.Value:
    """The bytes of an initializer under a second name, seen as another type."""
    tensor = value.const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return _initializer(graph, f"{value.name}{suffix}", tensor, int(tensor.length or 0), dtype, shape)


def _initializer(graph: ir.Graph, name: str, like: Any, length: int, dtype: Any, shape: list[Any]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.ExternalTensor(like.location, like.offset, length, dtype, shape=ir.Shape(shape), name=name)
        graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor
        )
    return graph.initializers[name]


def _lower_lookup(graph: ir.Graph, node: ir.Node) -> None:
    # Case 5
    table, blocks = match_weight(node.inputs[0])
    if table is None or not isinstance(table.const_value, ir.ExternalTensor):
        return
    assert table.shape is not None
    assert table.dtype is not None
    alias = _alias(graph, table, _TABLE, table.dtype, list(table.shape))
    if blocks is None:
        node.replace_input_with(0, alias)
        return
    ops = Ops()
    rows = ops(
        "GatherBlockQuantized",
        *(alias, node.inputs[1], blocks.scales, blocks.zero_points),
        domain=MICROSOFT,
        gather_axis=0,
        quantize_axis=1,
        block_size=blocks.block_size,
        bits=blocks.bits,
    )
    replace_node(graph, node, ops, rows)


# ── attention ──────────────────────────────────────────────────────────────────────────────────────────────────


def _lower_attention(graph: ir.Graph, node: ir.Node, lengths: _Lengths, rotations: _Rotations) -> None:
    # Cases 6 to 8
    query = node.inputs[0]
    assert query is not None
    heads, head_dim = int(query.shape[1]), int(query.shape[3])  # type: ignore[index, arg-type]
    (key_write, key, key_scale), (value_write, value, value_scale) = (_cache_write(v) for v in node.inputs[1:3])
    past_key, _, length = key_write.inputs
    past_value = value_write.inputs[0]
    present_key, present_value = key_write.outputs[0], value_write.outputs[0]
    kv_heads = int(past_key.shape[1])  # type: ignore[union-attr, index, arg-type]
    ops = Ops()
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
    attributes["scale"] = node.attributes["scale"].as_float()
    if "softcap" in node.attributes:
        attributes["softcap"] = node.attributes["softcap"].as_float()
    if window := mask_window(node):
        attributes["local_window_size"] = window
    quantized: list[ir.Value | None] = []
    if key_scale is not None and value_scale is not None:
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        scales = (
            _alias(graph, scale, ".channels", scale.dtype, [kv_heads * head_dim]) for scale in (key_scale, value_scale)
        )
        quantized = [*scales]
    folds = heads // kv_heads >= MIN_FOLD and query.dtype == ir.DataType.FLOAT and not quantized and not window
    rows: list[ir.Value | None] = [None, None, None]
    rotary: list[ir.Value | None] = [None] * 5
    rotated = None if folds or query.dtype != ir.DataType.FLOAT else rotations.joined(query, key, value)
    if rotated is not None:
        rows[0], cos, sin = rotated  # [B, S, (H + 2 Hkv)·D]
        rotary = [cos, sin, lengths.positions(), None, None]
        attributes["do_rotary"] = 1
    else:
        rows = [_tokens_first(ops, t) for t in (query, key, value)]  # [B, S, H·D] or [B, S, Hkv·D]
    inputs = [*rows, past_key, past_value, *lengths.get(length), *rotary, *quantized]
    while inputs[-1] is None:
        inputs.pop()
    attention = ir.node("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, num_outputs=3)
    if folds:
        folded = _folded(inputs, length, attributes, head_dim)
        condition = lengths.folds(length, heads // kv_heads)
        attention = _either(condition, folded, attention, f"layer_{past_key.name}")  # type: ignore[union-attr]
    ops.nodes.append(attention)
    merged = attention.outputs[0]  # [B, S, H·D]
    merged.type = query.type
    for made, old in zip(attention.outputs[1:], (present_key, present_value), strict=True):
        made.name, made.shape, made.type = old.name, old.shape, old.type
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


def _folded(
    inputs: list[ir.Value | None], length: ir.Value | None, attributes: dict[str, Any], head_dim: int
) -> list[ir.Node]:
    # Case 7; the TensorScatters make the caches, the last node makes what attention makes
    query, key, value, past_key, past_value, last_slot, total = inputs
    kv_heads, group = attributes["kv_num_heads"], attributes["num_heads"] // attributes["kv_num_heads"]
    ops = Ops()
    split = ops("Reshape", query, ops.ints([1, kv_heads, group, head_dim]))
    queries = ops(
        "Reshape", ops("Transpose", split, perm=list(_HEADS_FIRST)), ops.ints([1, group, kv_heads * head_dim])
    )
    caches = [
        ops("TensorScatter", past, ops("Reshape", rows, ops.ints([1, kv_heads, 1, head_dim])), length, axis=2)
        for past, rows in ((past_key, key), (past_value, value))
    ]
    none = ops.constant(np.zeros((1, 0, kv_heads * head_dim), np.float32))  # K and V are in the cache already
    changed = attributes | {"num_heads": kv_heads, "causal": 0}
    mixed = ops("GroupQueryAttention", *(queries, none, none, *caches, last_slot, total), domain=MICROSOFT, **changed)
    heads_last = ops(
        "Transpose", ops("Reshape", mixed, ops.ints([1, group, kv_heads, head_dim])), perm=list(_HEADS_FIRST)
    )
    ops("Reshape", heads_last, ops.ints([1, 1, attributes["num_heads"] * head_dim]))
    return ops.nodes


def _either(condition: ir.Value, folded: list[ir.Node], attention: ir.Node, name: str) -> ir.Node:
    """If: the folded form, else the other; outputs like GroupQueryAttention."""
    for number, value in enumerate(value for node in (*folded, attention) for value in node.outputs):
        value.name = f"{name}.{number}"  # a name given later could be one of the graph around it
    writes = [node.outputs[0] for node in folded if node.op_type == "TensorScatter"]
    then = ir.Graph([], [folded[-1].outputs[0], *writes], nodes=folded, name=f"{name}.folded")
    other = ir.Graph([], list(attention.outputs), nodes=[attention], name=f"{name}.any")
    return ir.node("If", [condition], {"then_branch": then, "else_branch": other}, num_outputs=3)


def _cache_write(read: ir.Value | None) -> tuple[ir.Node, ir.Value | None, ir.Value | None]:
    """The TensorScatter of a cache that attention reads, the new entries as floats, and the scale of int8 entries."""
    assert read is not None
    node = read.producer()
    assert node is not None
    if node.op_type == "TensorScatter":
        return node, node.inputs[1], None
    cast, scale = node.inputs
    write = cast.producer().inputs[0].producer()  # type: ignore[union-attr]
    assert node.op_type == "Mul"
    assert write is not None
    assert write.op_type == "TensorScatter"
    steps = write.inputs[1]
    while steps is not None and steps.producer().op_type != "Div":  # type: ignore[union-attr]
        steps = steps.producer().inputs[0]  # type: ignore[union-attr]
    return write, steps.producer().inputs[0], scale  # type: ignore[union-attr]


def _tokens_first(ops: Ops, value: ir.Value | None) -> ir.Value:
    """[B, H, S, D] as [B, S, H·D], reusing what the heads were split from."""
    assert value is not None
    assert value.shape is not None
    heads, head_dim = int(value.shape[1]), int(value.shape[3])  # type: ignore[arg-type]
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == _HEADS_FIRST:
        split = node.inputs[0]
        source = split.producer() if split is not None else None
        if source is not None and source.op_type == "Reshape":
            whole = source.inputs[0]
            if whole is not None and whole.shape is not None and len(whole.shape) == 3:
                return whole
        assert split is not None
        return ops("Reshape", split, ops.ints([0, 0, heads * head_dim]))
    if node is not None and node.op_type == "RotaryEmbedding" and "rotary_embedding_dim" not in node.attributes:
        # Case 8
        x = _tokens_first(ops, node.inputs[0])
        return ops("RotaryEmbedding", x, *node.inputs[1:], num_heads=heads, interleaved=0)
    tokens = ops("Transpose", value, perm=list(_HEADS_FIRST))
    return ops("Reshape", tokens, ops.ints([0, 0, heads * head_dim]))


class _Rotations:
    """RoPE inside GroupQueryAttention: tables over all positions, as the traced graph computes them."""

    def __init__(self, proto: onnx.ModelProto, graph: ir.Graph, max_positions: int) -> None:
        self.proto, self.graph, self.max_positions = proto, graph, max_positions
        self.made: dict[tuple[ir.Value | None, ...], list[ir.Value]] = {}

    def joined(
        self, query: ir.Value, key: ir.Value | None, value: ir.Value | None
    ) -> tuple[ir.Value, ir.Value, ir.Value] | None:
        """The one product that q, k and v are split from, and the two tables; None where they are not."""
        assert key is not None
        if 4 * self.max_positions * int(query.shape[3]) > ROTARY_BYTES:  # type: ignore[index, arg-type]
            return None
        turned, tables = [query.producer(), key.producer()], []
        for node in turned:
            if node is None or node.op_type != "RotaryEmbedding" or "rotary_embedding_dim" in node.attributes:
                return None
            if "interleaved" in node.attributes and node.attributes["interleaved"].as_int():
                return None
            tables.append(tuple(node.inputs[1:3]))
        q, k = (node.inputs[0] for node in turned if node is not None)
        parts = [_tokens_first(Ops(), t) for t in (q, k, value)]
        split = parts[0].producer()
        if tables[0] != tables[1] or split is None or split.op_type != "Split" or list(split.outputs) != parts:
            return None
        whole = split.inputs[0]
        assert whole is not None
        cos, sin = self._tables(tables[0])
        return whole, cos, sin

    def _tables(self, values: tuple[ir.Value | None, ...]) -> list[ir.Value]:
        """[max_positions, D/2] each: what the graph computes as [B, S, D/2], once for all positions."""
        import onnxruntime

        if values not in self.made:
            model = ir.serde.deserialize_model(self.proto)
            graph = model.graph
            found = {v.name: v for node in graph for v in node.outputs}
            graph.outputs[:] = [found[value.name] for value in values if value is not None]
            RemoveUnusedNodesPass()(model)
            needed = {use for node in graph for use in node.inputs}
            graph.inputs[:] = [v for v in graph.inputs if v in needed]
            for v in graph.inputs:  # the LoRA step's holds one token a row
                if v.name == "input_ids":
                    v.shape = ir.Shape(["batch", "sequence"])
            feeds = {"input_ids": np.zeros((1, self.max_positions), np.int64), "len_kept": np.zeros(1, np.int64)}
            session = onnxruntime.InferenceSession(
                ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
            )
            tables = session.run(None, {v.name: feeds[v.name] for v in session.get_inputs()})
            self.made[values] = [self._initializer(np.ascontiguousarray(table[0])) for table in tables]
        return self.made[values]

    def _initializer(self, table: npt.NDArray[np.float32]) -> ir.Value:
        name = f"rotary.{sum(name.startswith('rotary.') for name in self.graph.initializers)}"
        tensor = ir.tensor(table, name=name)
        made = ir.Value(name=name, shape=ir.Shape(table.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.initializers[name] = made
        return made


class _Lengths:
    """What attention needs to know of lengths and positions, made once for each length group."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.inputs = {value.name: value for value in graph.inputs}
        self.made: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.conditions: dict[tuple[str, int], ir.Value] = {}
        self.each: ir.Value | None = None

    def positions(self) -> ir.Value:
        """The position of each new token, int64 [B, S]."""
        if self.each is None:
            ops = Ops()
            count = ops("Squeeze", ops("Shape", self.inputs["input_ids"], start=1, end=2))
            zero, one = (ops.constant(np.array(n, np.int64)) for n in (0, 1))
            begin = ops("Unsqueeze", self.inputs["len_kept"], ops.ints([1]))
            self.each = ops("Add", begin, ops("Range", zero, count, one))
            self.graph.insert_before(self.graph[0], ops.nodes)
        return self.each

    def folds(self, length: ir.Value | None, group: int) -> ir.Value:
        """Whether a step may fold `group` query heads, bool []: one token of one row, and as many slots as heads."""
        assert length is not None
        key = str(length.name), group
        if key not in self.conditions:
            ops = Ops()
            single = ops("Equal", ops("Size", self.inputs["input_ids"]), ops.constant(np.array(1, np.int64)))
            shortest = ops("ReduceMin", length, keepdims=0)
            enough = ops("GreaterOrEqual", shortest, ops.constant(np.array(group - 1, np.int64)))
            self.conditions[key] = ops("And", single, enough)
            self.graph.insert_before(self.graph[0], ops.nodes)
        return self.conditions[key]

    def get(self, length: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """GroupQueryAttention's two length inputs: last valid slot [B] and total [], both int32."""
        assert length is not None
        assert length.name is not None
        if length.name not in self.made:
            ops = Ops()
            new_tokens = ops("Shape", self.inputs["input_ids"], start=1, end=2)
            total = ops("Cast", ops("Add", length, new_tokens), to=int(ir.DataType.INT32))  # [B]
            last_slot = ops("Sub", total, ops.constant(np.array(1, np.int32)))
            longest = ops("ReduceMax", total, keepdims=0)
            self.graph.insert_before(self.graph[0], ops.nodes)
            self.made[length.name] = last_slot, longest
        return self.made[length.name]


# ── what lies between ──────────────────────────────────────────────────────────────────────────────────────────


def _fuse_elementwise(graph: ir.Graph) -> None:
    # Case 4
    for node in list(graph):
        if node.op_type == "Mul":
            _fuse_silu(graph, node)
        if node.op_type == "RMSNormalization" and node.inputs[0].dtype == ir.DataType.FLOAT:  # type: ignore[union-attr]
            _fuse_skip_norm(graph, node)


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


# ── one graph of both steps ────────────────────────────────────────────────────────────────────────────────────


def _joined(lora: onnx.ModelProto, refresh: onnx.ModelProto) -> onnx.ModelProto:
    """If(lora_step): the LoRA step, else the refresh."""
    inputs = {value.name: value for value in refresh.graph.input}
    inputs |= {value.name: value for value in lora.graph.input if value.name not in inputs}
    outputs = {value.name: value for value in refresh.graph.output}
    weights: dict[str, onnx.TensorProto] = {}
    for form in (refresh, lora):
        for tensor in form.graph.initializer:
            assert weights.setdefault(tensor.name, tensor) == tensor, tensor.name
    choice = helper.make_node(
        "If",
        [LORA_STEP],
        list(outputs),
        then_branch=_branch(lora.graph, "lora/", outputs),
        else_branch=_branch(refresh.graph, "refresh/", outputs),
    )
    which = helper.make_tensor_value_info(LORA_STEP, onnx.TensorProto.BOOL, [])
    graph = helper.make_graph(
        [choice], "steps", [which, *inputs.values()], list(outputs.values()), list(weights.values())
    )
    return helper.make_model(graph, opset_imports=refresh.opset_import, ir_version=refresh.ir_version)


def _branch(step: onnx.GraphProto, prefix: str, outputs: Mapping[str, onnx.ValueInfoProto]) -> onnx.GraphProto:
    """A step as a branch: its own names get the prefix; a cache or state that it leaves alone is its own output."""
    names = {name: f"{prefix}{name}" for node in step.node for name in node.output if name}
    nodes = [_renamed(node, names, prefix) for node in step.node]
    made = {value.name for value in step.output}
    for output in outputs:
        if output not in made:
            nodes.append(helper.make_node("Identity", [output.replace("present_", "past_")], [f"{prefix}{output}"]))
    results = [onnx.ValueInfoProto(name=f"{prefix}{output}", type=value.type) for output, value in outputs.items()]
    return helper.make_graph(nodes, step.name, [], results)


def _renamed(node: onnx.NodeProto, names: Mapping[str, str], prefix: str) -> onnx.NodeProto:
    """A copy with other names for what its graph, or one around it, makes; the graphs in it get names of their own."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = f"{prefix}{node.name}"
    for values in (copy.input, copy.output):
        values[:] = [names.get(value, value) for value in values]
    for attribute in copy.attribute:
        if attribute.HasField("g"):
            graph = attribute.g
            inner = f"{prefix}{graph.name}/"
            own = {**names, **{name: f"{inner}{name}" for n in graph.node for name in n.output if name}}
            nodes = [_renamed(n, own, inner) for n in graph.node]
            outputs = [onnx.ValueInfoProto(name=own[v.name], type=v.type) for v in graph.output]
            graph.CopyFrom(helper.make_graph(nodes, graph.name, [], outputs))
    return copy
