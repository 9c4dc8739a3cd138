"""Neutral step graph → the graph that TensorRT and TensorRT-RTX build an engine from.

Enters: refresh.onnx or lora.onnx, the capacities, the form. Leaves: the very ONNX that the parser gets, plain opset 24
in the native form, so that ONNX Runtime can run it too; and the table of the weights that became inputs.

    1. capacity           the caches' slots become numbers: TensorRT's cache layer wants a static capacity
    2. outputs            logits as float32; next_token = argmax, −1 in a row with NaN or +∞, so that greedy decoding
                          copies one number
    3. fused linears      linear layers that read one tensor (q, k, v; gate, up) → one MatMul and a Split; with weights
                          as inputs only, where a loader lays the parts side by side
    4. weights as inputs  every initializer → a network input, to be bound to one device buffer by both engines; int4
                          weights packed, for Int4Gemm (plugins/tensorrt), which computes the linear layers then
    5. softcap, sinks     Attention with what TensorRT's attention layer lacks → matrix products and softmax
    6. plugin form        TensorScatter ×2, Attention and what feeds them (RoPE, the norms of q and k, transposes)
                          → one SkipWriteKVAttention (plugins/tensorrt); by onnx-graphsurgeon
    7. last position      the last of a row's places is the largest: TensorRT's Gather has no index −1 on an axis whose
                          length is not fixed

The native form keeps the explicit mask that graphs/refresh.py made, which ONNX Runtime needs: TensorRT's parser ignores
nonpad_kv_seqlen, and its causal flag counts from the upper left corner, so that one new token would see only slot 0.
build.py sets lengths and another causality on the network instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
from lora_drop_runtime.bundle.bundle import WeightInput
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from lora_drop_export.graphs.match import cache_write, mask_window
from lora_drop_export.graphs.nodes import Ops, float32_logits, replace_node
from lora_drop_export.graphs.sinks import masked_scores, take_sinks

from .packed_weights import look_up_packed, multiply_packed, see_as_bytes
from .plugin_form import plugin_from_native
from .weight_inputs import Fusion, fuse, fused_weights, linear_layers, planned_fusions, weights_as_inputs


@dataclass(frozen=True)
class TrtGraph:
    """What the parser gets, the engine inputs that are weights, and the bytes of weights left in the graph."""

    proto: onnx.ModelProto
    weights: dict[str, WeightInput]
    constant_bytes: int
    fusions: tuple[Fusion, ...] = ()


def _set_capacity(graph: ir.Graph, sizes: dict[str, int]) -> None:
    # Case 1
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            dims: list[Any] = [
                sizes.get(str(dim.value), dim) if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape
            ]
            value.shape = ir.Shape(dims)


def _add_outputs(graph: ir.Graph) -> None:
    # Case 2
    plain = float32_logits(graph)
    assert plain.shape is not None
    ops = Ops()
    wrong = ops("Or", ops("IsNaN", plain), ops("IsInf", plain, detect_negative=0))  # [B, rows, V]
    counted = ops("ReduceMax", ops("Cast", wrong, to=int(ir.DataType.INT32)), ops.ints([-1]), keepdims=0)
    largest = ops("ArgMax", plain, axis=-1, keepdims=0)  # [B, rows]
    token = ops("Where", ops("Cast", counted, to=int(ir.DataType.BOOL)), ops.ints([-1]), largest)
    token.name, token.shape, token.type = "next_token", ir.Shape(plain.shape[:2]), ir.TensorType(ir.DataType.INT64)
    graph.extend(ops.nodes)
    graph.outputs.insert(1, token)


def _take_largest(graph: ir.Graph) -> None:
    # Case 7
    uses = [use for value in graph.inputs if value.name == "logits_index" for use in value.uses()]
    for node in [use.node for use in uses if use.node.op_type == "Gather"]:
        ops = Ops()
        replace_node(graph, node, ops, ops("ReduceMax", node.inputs[0], ops.ints([1])))  # [B, 1]
        graph.remove(node, safe=True)


def _let_plugin_round(graph: ir.Graph) -> None:
    """Case 6, of caches of 8 bits: what is written is not rounded in the graph, nor what is read made wide.

    Ensures: an Attention node has the scales, float32 [Hkv], after its mask, as no standard one has.
    """
    for node in [node for node in graph if node.op_type == "Attention"]:
        found = [cache_write(value) for value in node.inputs[1:3]]
        if found[0][2] is None:
            continue
        for index, (write, entries, _) in enumerate(found, 1):
            write.replace_input_with(1, entries)
            node.replace_input_with(index, write.outputs[0])
        node.resize_inputs(len(node.inputs) + 2)
        for place, (_, _, scale) in enumerate(found, len(node.inputs) - 2):
            assert scale is not None
            tensor = scale.const_value
            assert isinstance(tensor, ir.ExternalTensor)
            scale.shape = ir.Shape([int(scale.shape[0])])  # type: ignore[index, arg-type]
            scale.const_value = ir.ExternalTensor(
                tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=scale.shape, name=str(scale.name)
            )
            node.replace_input_with(place, scale)


def _give_sinks(graph: ir.Graph, node: ir.Node, sinks: ir.Value) -> None:
    """Case 6: an Attention node has its sinks at the end, float32 [N], as no standard one has."""
    if sinks.dtype != ir.DataType.FLOAT:
        cast = ir.node("Cast", [sinks], {"to": int(ir.DataType.FLOAT)})
        graph.insert_before(node, cast)
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), sinks.shape
        sinks = cast.outputs[0]
    node.resize_inputs(len(node.inputs) + 1)
    node.replace_input_with(len(node.inputs) - 1, sinks)


def _expand_attention(graph: ir.Graph, node: ir.Node, sinks: ir.Value | None) -> None:
    # Case 5
    query, key, value, _ = node.inputs
    assert query is not None
    assert key is not None
    heads, head_dim = int(query.shape[1]), int(query.shape[3])  # type: ignore[index, arg-type]
    groups, ops = int(key.shape[1]), Ops()  # type: ignore[index, arg-type]
    seen = masked_scores(ops, node, groups)
    if sinks is None:
        shares = ops("Softmax", seen, axis=-1)
    else:
        each = ops("Reshape", ops("Cast", sinks, to=int(ir.DataType.FLOAT)), ops.ints([1, groups, -1, 1, 1]))
        rows_like = ops("Concat", ops("Shape", seen, start=0, end=4), ops.ints([1]), axis=0)
        both = ops("Softmax", ops("Concat", seen, ops("Expand", each, rows_like), axis=-1), axis=-1)
        shares = ops("Slice", both, ops.ints([0]), ops.ints([-1]), ops.ints([-1]))
    weights = ops("Cast", shares, to=int(query.dtype))  # type: ignore[arg-type]
    mixed = ops("MatMul", weights, ops("Unsqueeze", value, ops.ints([2])))  # [B, G, H/G, S, D]
    replace_node(graph, node, ops, ops("Reshape", mixed, ops.ints([0, heads, -1, head_dim])))  # [B, H, S, D]


def trt_from_neutral(
    neutral: onnx.ModelProto,
    slots: dict[str, int],
    *,
    weight_sharing: str = "inputs",
    form: str = "native",
    alias: bool = False,
    refresh: TrtGraph | None = None,
) -> TrtGraph:
    """Lower one step graph.

    Args:
        neutral: refresh or LoRA step as graphs/ makes them; left as it was.
        slots: capacity of the cache groups, {"kept": n, "dropped": m}.
        weight_sharing: `inputs` or `constants`; quantized weights are inputs in the plugin form alone.
        form: `native` or `plugin`.
        alias: whether the plugin says that it updates its caches in place; see `BuilderOptions`.
        refresh: for the LoRA step, the lowered refresh step, whose fused weights it shares.
    """
    model = ir.serde.deserialize_model(neutral)
    graph = model.graph
    _set_capacity(graph, {f"slots_{group}": size for group, size in slots.items()})
    _add_outputs(graph)
    _take_largest(graph)
    if form == "plugin":
        _let_plugin_round(graph)
    weights: dict[str, WeightInput] = {}
    fusions: tuple[Fusion, ...] = ()
    if weight_sharing == "inputs":
        linears = linear_layers(graph)
        fusions = planned_fusions(graph) if refresh is None else refresh.fusions
        see_as_bytes(graph)
        table = fused_weights(graph, fusions) if refresh is None else refresh.weights
        for fusion in fusions:
            fuse(graph, fusion, linears, table)
        multiply_packed(graph)
        look_up_packed(graph)
        RemoveUnusedNodesPass()(model)  # and with them the weights that were fused
        weights = weights_as_inputs(graph, table)
    sinks = take_sinks(graph)
    windows = {node.outputs[0].name or "": mask_window(node) for node in graph if node.op_type == "Attention"}
    if form == "native":
        for node in [n for n in graph if n.op_type == "Attention" and ("softcap" in n.attributes or n in sinks)]:
            _expand_attention(graph, node, sinks.get(node))
    else:
        for node, each in sinks.items():
            _give_sinks(graph, node, each)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    proto = ir.serde.serialize_model(model)
    if form == "plugin":
        proto = plugin_from_native(proto, windows, alias)
    left = (entry for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "length")
    return TrtGraph(proto, weights, sum(int(entry.value) for entry in left), fusions)
