"""Neutral step graph → the graph that ONNX Runtime runs fast, on the CPU in float32, on a GPU in halves.

Enters: refresh.onnx or lora.onnx as an onnx-ir model with external weights. Leaves: the same inputs, outputs, weights.

    1. MatMul(x, Transpose(W)) [+ b]      → Reshape, Gemm(transB=1), Reshape: the weight keeps its place on disk,
                                            whereas ONNX Runtime would fold the Transpose into a private copy
    2. TensorScatter ×2 + Attention       → com.microsoft.GroupQueryAttention: past and present share one buffer, the
                                            cost follows the valid length, RoPE stays outside, so that cache slot ≠
                                            position is exact
    3. RotaryEmbedding on [B, H, S, D]    → on [B, S, H·D], without the transposes around it
    4. logits                             → float32, whatever the dtype

Requires: the form that surgery.py makes. Ensures: no Attention or mask remains, and a TensorScatter only where the
attention that would read it is dead: before a dropped layer that repeats its state (`recurrent`, `anchor`, rank 0).
GroupQueryAttention takes S > 1 with a past only at B = 1; the session runs longer prompts row by row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from .rewrite import Ops, float32_logits, mask_window, match_linear, replace_node

MICROSOFT = "com.microsoft"
_HEADS_FIRST = (0, 2, 1, 3)


def ort_from_neutral(model: ir.Model) -> ir.Model:
    """Apply the rules in place and return the model."""
    graph = model.graph
    model.opset_imports[MICROSOFT] = 1
    for node in list(graph):
        if node.op_type == "MatMul":
            _lower_linear(graph, node)
    lengths = _Lengths(graph)
    for node in list(graph):
        if node.op_type == "Attention":
            _lower_attention(graph, node, lengths)
    float32_logits(graph)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    assert not any(node.op_type == "Attention" for node in graph)
    return model


def _lower_linear(graph: ir.Graph, node: ir.Node) -> None:
    # Case 1
    linear = match_linear(node)
    if linear is None:
        return
    x, weight = linear.x, linear.weight
    out_features, in_features = linear.shape
    ops = Ops()
    rows = ops("Reshape", x, ops.ints([-1, in_features]))  # [B·S, in]
    bias = () if linear.bias is None else (linear.bias,)
    product = ops("Gemm", rows, weight, *bias, transB=1)  # [B·S, out]
    result = ops("Reshape", product, _tokens_shape(graph, ops, x, out_features))  # [B, S, out]
    replace_node(graph, linear.last, ops, result)


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


def _lower_attention(graph: ir.Graph, node: ir.Node, lengths: _Lengths) -> None:
    # Case 2
    query, present_key, present_value = node.inputs[:3]
    assert query is not None
    assert present_key is not None
    assert present_value is not None
    heads, head_dim = int(query.shape[1]), int(query.shape[3])  # type: ignore[index, arg-type]
    writes = [present_key.producer(), present_value.producer()]
    assert all(w is not None and w.op_type == "TensorScatter" for w in writes)
    past_key, key, length = writes[0].inputs  # type: ignore[union-attr]
    past_value, value, _ = writes[1].inputs  # type: ignore[union-attr]
    kv_heads = int(past_key.shape[1])  # type: ignore[union-attr, index, arg-type]
    ops = Ops()
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": node.attributes["scale"].as_float(),
    }
    if "softcap" in node.attributes:
        attributes["softcap"] = node.attributes["softcap"].as_float()
    if window := mask_window(node):
        attributes["local_window_size"] = window
    last_slot, total = lengths.get(length)
    attention = ir.node(
        "GroupQueryAttention",
        [_tokens_first(ops, t) for t in (query, key, value)] + [past_key, past_value, last_slot, total],
        attributes,
        domain=MICROSOFT,
        num_outputs=3,
    )
    ops.nodes.append(attention)
    for new, old in zip(attention.outputs[1:], (present_key, present_value), strict=True):
        new.name, new.shape, new.type = old.name, old.shape, old.type
        old.name = f"{old.name}.neutral"
        graph.outputs[:] = [new if output is old else output for output in graph.outputs]
    (heads_last,) = (use.node for use in node.outputs[0].uses())
    assert heads_last.op_type == "Transpose"
    merged = attention.outputs[0]  # [B, S, H·D]
    merged.type = query.type
    for use in list(heads_last.outputs[0].uses()):
        shape = use.node.outputs[0].shape
        if use.node.op_type == "Reshape" and shape is not None and len(shape) == 3 and shape[2] == heads * head_dim:
            use.node.outputs[0].replace_all_uses_with(merged)
    split = ops("Reshape", merged, ops.ints([0, 0, heads, head_dim]))
    replace_node(graph, heads_last, ops, split)


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
        # Case 3
        x = _tokens_first(ops, node.inputs[0])
        return ops("RotaryEmbedding", x, *node.inputs[1:], num_heads=heads, interleaved=0)
    tokens = ops("Transpose", value, perm=list(_HEADS_FIRST))
    return ops("Reshape", tokens, ops.ints([0, 0, heads * head_dim]))


class _Lengths:
    """GroupQueryAttention's two length inputs for each length group: last valid slot [B] and total, both int32."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: dict[str, tuple[ir.Value, ir.Value]] = {}

    def get(self, length: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        assert length is not None
        assert length.name is not None
        if length.name not in self.made:
            ops = Ops()
            input_ids = next(i for i in self.graph.inputs if i.name == "input_ids")
            new_tokens = ops("Shape", input_ids, start=1, end=2)
            total = ops("Cast", ops("Add", length, new_tokens), to=int(ir.DataType.INT32))  # [B]
            one = ir.node("Constant", [], {"value": ir.tensor(np.array(1, np.int32))})
            ops.nodes.append(one)
            last_slot = ops("Sub", total, one.outputs[0])
            longest = ops("ReduceMax", total, keepdims=0)
            self.graph.insert_before(self.graph[0], ops.nodes)
            self.made[length.name] = last_slot, longest
        return self.made[length.name]
