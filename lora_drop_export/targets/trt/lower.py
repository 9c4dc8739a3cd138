"""Neutral step graph → the graph that TensorRT and TensorRT-RTX build an engine from.

Enters: refresh.onnx or lora.onnx, the capacities, the form. Leaves: the very ONNX that the parser gets, plain opset 24
in the native form, so that ONNX Runtime can run it too; and the table of the weights that became inputs.

    1. capacity           the caches' slots become numbers: TensorRT's cache layer wants a static capacity
    2. outputs            logits as float32; next_token = argmax, −1 in a row with NaN or +∞, so that greedy decoding
                          copies one number
    3. fused linears      linear layers that read one tensor (q, k, v; gate, up) → one MatMul and a Split; with weights
                          as inputs only, where a loader lays the parts side by side
    4. weights as inputs  every initializer → a network input, to be bound to one device buffer by both engines
    5. softcap            Attention with softcap, which TensorRT's attention layer lacks → matrix products and softmax
    6. plugin form        TensorScatter ×2, Attention and what feeds them (RoPE, the norms of q and k, transposes)
                          → one SkipWriteKVAttention (plugins/tensorrt); by onnx-graphsurgeon

The native form needs the explicit mask that surgery.py made: TensorRT's parser ignores nonpad_kv_seqlen, and its
causal flag counts from the upper left corner, so that one new token would see only slot 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from lora_drop_runtime.bundle.bundle import WeightInput
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from lora_drop_export.graphs.match import (
    Linear,
    Ops,
    float32_logits,
    joined_name,
    linear_groups,
    mask_window,
    match_linear,
    replace_node,
)
from lora_drop_export.graphs.refresh import IR_VERSION

PLUGIN_OP, PLUGIN_VERSION, PLUGIN_NAMESPACE = "SkipWriteKVAttention", "1", "lora_drop"


@dataclass(frozen=True)
class Fusion:
    """Linear layers that read one tensor and become one. `members` are (weight, bias, output width), in order."""

    weight: str
    bias: str | None
    members: tuple[tuple[str, str | None, int], ...]


@dataclass(frozen=True)
class TrtGraph:
    """What the parser gets, the engine inputs that are weights, and the bytes of weights left in the graph."""

    proto: onnx.ModelProto
    weights: dict[str, WeightInput]
    constant_bytes: int
    fusions: tuple[Fusion, ...] = ()


def trt_from_neutral(
    neutral: onnx.ModelProto,
    slots: dict[str, int],
    *,
    weight_sharing: str = "inputs",
    form: str = "native",
    alias: bool = True,
    refresh: TrtGraph | None = None,
) -> TrtGraph:
    """Lower one step graph.

    Args:
        neutral: refresh or LoRA step as surgery.py makes them; left as it was.
        slots: capacity of the cache groups, {"kept": n, "dropped": m}.
        weight_sharing: `inputs` or `constants`.
        form: `native` or `plugin`.
        alias: of the plugin, see build_trt.BuilderOptions.
        refresh: for the LoRA step, the lowered refresh step, whose fused weights it shares.
    """
    model = ir.serde.deserialize_model(neutral)
    graph = model.graph
    _set_capacity(graph, {f"slots_{group}": size for group, size in slots.items()})
    _add_outputs(graph)
    weights: dict[str, WeightInput] = {}
    fusions: tuple[Fusion, ...] = ()
    if weight_sharing == "inputs":
        linears = _linears(graph)
        fusions = _fusions(graph) if refresh is None else refresh.fusions
        table = _fused_weights(graph, fusions) if refresh is None else refresh.weights
        for fusion in fusions:
            _fuse(graph, fusion, linears, table)
        RemoveUnusedNodesPass()(model)  # and with them the weights that were fused
        weights = _weights_as_inputs(graph, table)
    windows = {node.outputs[0].name or "": mask_window(node) for node in graph if node.op_type == "Attention"}
    if form == "native":
        for node in [n for n in graph if n.op_type == "Attention" and "softcap" in n.attributes]:
            _expand_softcap(graph, node)
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    proto = ir.serde.serialize_model(model)
    if form == "plugin":
        proto = _plugin_from_native(proto, windows, alias)
    left = (entry for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "length")
    return TrtGraph(proto, weights, sum(int(entry.value) for entry in left), fusions)


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


def _linears(graph: ir.Graph) -> dict[str, Linear]:
    """All linear layers by the name of their weight."""
    found = (match_linear(node) for node in graph if node.op_type == "MatMul")
    return {str(linear.weight.name): linear for linear in found if linear is not None}


def _fusions(graph: ir.Graph) -> tuple[Fusion, ...]:
    # Case 3
    made = []
    for group in linear_groups(graph):
        weights = [str(linear.weight.name) for linear in group]
        biases = [None if linear.bias is None else str(linear.bias.name) for linear in group]
        named = [bias for bias in biases if bias is not None]
        members = zip(weights, biases, (linear.shape[0] for linear in group), strict=True)
        made.append(Fusion(joined_name(weights), joined_name(named) if named else None, tuple(members)))
    return tuple(made)


def _fused_weights(graph: ir.Graph, fusions: Iterable[Fusion]) -> dict[str, WeightInput]:
    table = {}
    for fusion in fusions:
        for name, members in (
            (fusion.weight, [weight for weight, _, _ in fusion.members]),
            (fusion.bias, [bias for _, bias, _ in fusion.members if bias is not None]),
        ):
            if name is not None:
                table[name] = _weight_input([graph.initializers[member] for member in members])
    return table


def _fuse(graph: ir.Graph, fusion: Fusion, linears: Mapping[str, Linear], table: Mapping[str, WeightInput]) -> None:
    """One MatMul and a Split for the members that the graph has.

    The LoRA step lacks some where a layer's attention is dead; it computes them all the same, since half of a fused
    weight would be another input, and another copy.
    """
    present = {weight: linears[weight] for weight, _, _ in fusion.members if weight in linears}
    if not present:
        return
    first = next(iter(present.values()))

    def weight_input(name: str) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(table[name].shape), type=first.weight.type)
        graph.inputs.append(value)
        return value

    ops = Ops()
    product = ops("MatMul", first.x, ops("Transpose", weight_input(fusion.weight), perm=[1, 0]))  # [B, S, sum of out]
    if fusion.bias is not None:
        product = ops("Add", product, weight_input(fusion.bias))
    widths = [width for _, _, width in fusion.members]
    split = ir.node("Split", [product, ops.ints(widths)], {"axis": -1}, num_outputs=len(widths))
    graph.insert_before(next(use.node for use in first.x.uses() if use.node.op_type == "MatMul"), [*ops.nodes, split])
    for (weight, _, width), new in zip(fusion.members, split.outputs, strict=True):
        new.type = first.weight.type
        new.shape = ir.Shape([*first.last.outputs[0].shape[:2], width])  # type: ignore[index]
        if weight in present:
            present[weight].last.outputs[0].replace_all_uses_with(new)


def _weights_as_inputs(graph: ir.Graph, fused: Mapping[str, WeightInput]) -> dict[str, WeightInput]:
    # Case 4
    weights = {str(value.name): fused[str(value.name)] for value in graph.inputs if value.name in fused}
    for name, value in list(graph.initializers.items()):
        if isinstance(value.const_value, ir.ExternalTensor) and value.uses():
            weights[name] = _weight_input([value])
            value.const_value = None
            graph.inputs.append(value)
            del graph.initializers[name]
    return weights


def _weight_input(members: list[ir.Value]) -> WeightInput:
    tensors = [member.const_value for member in members]
    places = []
    for tensor in tensors:
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.offset is not None
        assert tensor.length is not None
        places.append((str(tensor.location), int(tensor.offset), int(tensor.length)))
    first = tensors[0]
    assert first is not None
    rows = sum(int(tensor.shape[0]) for tensor in tensors)  # type: ignore[union-attr, arg-type, misc]
    shape = (rows, *(int(dim) for dim in first.shape[1:]))  # type: ignore[arg-type]
    return WeightInput(first.dtype.numpy().name, shape, tuple(places))


def _expand_softcap(graph: ir.Graph, node: ir.Node) -> None:
    # Case 5
    query, key, value, mask = node.inputs
    assert query is not None
    assert key is not None
    heads, head_dim = int(query.shape[1]), int(query.shape[3])  # type: ignore[index, arg-type]
    groups = int(key.shape[1])  # type: ignore[index, arg-type]
    softcap = node.attributes["softcap"].as_float()
    ops = Ops()

    def number(value: float) -> ir.Value:
        made = ir.node("Constant", [], {"value": ir.tensor(np.array(value, np.float32))})
        ops.nodes.append(made)
        return made.outputs[0]

    rows = ops("Reshape", query, ops.ints([0, groups, heads // groups, -1, head_dim]))  # [B, G, H/G, S, D]
    keys = ops("Unsqueeze", ops("Transpose", key, perm=[0, 1, 3, 2]), ops.ints([2]))  # [B, G, 1, D, C]
    scores = ops("Cast", ops("MatMul", rows, keys), to=int(ir.DataType.FLOAT))  # [B, G, H/G, S, C]
    scores = ops("Mul", scores, number(node.attributes["scale"].as_float() / softcap))
    scores = ops("Mul", ops("Tanh", scores), number(softcap))
    seen = ops("Where", ops("Unsqueeze", mask, ops.ints([2])), scores, number(float(np.finfo(np.float32).min)))
    weights = ops("Cast", ops("Softmax", seen, axis=-1), to=int(query.dtype))  # type: ignore[arg-type]
    mixed = ops("MatMul", weights, ops("Unsqueeze", value, ops.ints([2])))  # [B, G, H/G, S, D]
    replace_node(graph, node, ops, ops("Reshape", mixed, ops.ints([0, heads, -1, head_dim])))  # [B, H, S, D]


def check_one_copy(tables: Iterable[dict[str, WeightInput]]) -> dict[str, WeightInput]:
    """The union of the step graphs' tables.

    Requires: they agree. Ensures: no byte of a weight file is in two inputs, so that the device holds one copy.
    """
    union: dict[str, WeightInput] = {}
    for table in tables:
        for name, weight in table.items():
            assert union.setdefault(name, weight) == weight, name
    places = [(location, offset) for weight in union.values() for location, offset, _ in weight.parts]
    assert len(set(places)) == len(places)
    return union


def _plugin_from_native(proto: onnx.ModelProto, windows: dict[str, int], alias: bool) -> onnx.ModelProto:
    # Case 6
    graph = gs.import_onnx(proto)
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    is_refresh = "logits_index" in inputs
    count = _count(graph, inputs["logits_index"]) if is_refresh else None
    for node in [n for n in graph.nodes if n.op == "Attention"]:
        query, present_key, present_value, _ = node.inputs
        writes = [present_key.inputs[0], present_value.inputs[0]]
        (past_key, key, length), (past_value, value, _) = writes[0].inputs, writes[1].inputs
        heads, head_dim, kv_heads = query.shape[1], query.shape[3], past_key.shape[1]
        attrs: dict[str, Any] = {
            "plugin_version": PLUGIN_VERSION,
            "plugin_namespace": PLUGIN_NAMESPACE,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "rotary_dim": 0,
            "interleaved": 0,
            "window": windows[node.outputs[0].name],
            "has_count": int(is_refresh),
            "has_norm": 0,
            "has_kv_scale": 0,
            "scale": float(node.attrs["scale"]),
            "softcap": float(node.attrs.get("softcap", 0.0)),
            "norm_epsilon": 0.0,
            "alias": int(alias),
        }
        extra = [] if count is None else [count]
        q, k, v = (_head_source(t) for t in (query, key, value))
        if q is not None and k is not None and q.matches(k):
            query, key = q.rows, k.rows
            if q.rotary is not None:
                attrs["rotary_dim"] = int(q.rotary.attrs.get("rotary_embedding_dim", 0)) or head_dim
                attrs["interleaved"] = int(q.rotary.attrs.get("interleaved", 0))
                extra += q.rotary.inputs[1:3]  # tables of each token, made for its true position
            if q.norm is not None and k.norm is not None:
                attrs["has_norm"] = 1
                attrs["norm_epsilon"] = float(q.norm.attrs.get("epsilon", 1e-5))
                extra += [q.norm.inputs[1], k.norm.inputs[1]]
        if v is not None and v.rotary is None and v.norm is None:
            value = v.rows
        rows = [_as_rows(graph, t, n * head_dim) for t, n in ((query, heads), (key, kv_heads), (value, kv_heads))]
        (heads_last,) = node.outputs[0].outputs
        assert heads_last.op == "Transpose"
        merged = gs.Variable(f"{node.outputs[0].name}.rows", query.dtype, ["batch", "sequence", heads * head_dim])
        graph.nodes.append(
            gs.Node(
                PLUGIN_OP,
                name=f"{PLUGIN_OP}.{present_key.name.removeprefix('present_key.')}",
                domain=PLUGIN_NAMESPACE,
                attrs=attrs,
                inputs=[*rows, past_key, past_value, length, *extra],
                outputs=[merged, present_key, present_value],
            )
        )
        for write in writes:
            write.outputs.clear()
        y = heads_last.outputs[0]  # [B, S, H, D]
        for use in list(y.outputs):
            if use.op == "Reshape" and list(use.outputs[0].shape or ())[2:] == [heads * head_dim]:
                for reader in list(use.outputs[0].outputs):
                    reader.inputs = [merged if t is use.outputs[0] else t for t in reader.inputs]
        split = gs.Constant(f"{merged.name}.split", np.array([0, 0, heads, head_dim], np.int64))
        heads_last.outputs.clear()
        graph.nodes.append(gs.Node("Reshape", inputs=[merged, split], outputs=[y]))
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    result = gs.export_onnx(graph)
    result.ir_version = IR_VERSION
    del result.opset_import[:]
    result.opset_import.extend([onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid(PLUGIN_NAMESPACE, 1)])
    return result


@dataclass(frozen=True)
class _HeadSource:
    """What the heads [B, H, S, D] of a query or key are made from: rows [B, S, H·D], then norm, then RoPE."""

    rows: gs.Tensor
    norm: gs.Node | None
    rotary: gs.Node | None

    def matches(self, other: _HeadSource) -> bool:
        """Whether one plugin call can do both: norms alike, the same RoPE tables."""
        same_norm = _attribute(self.norm, "epsilon") == _attribute(other.norm, "epsilon")
        tables = [[t.name for t in s.rotary.inputs[1:]] if s.rotary is not None else [] for s in (self, other)]
        return (self.norm is None) == (other.norm is None) and same_norm and tables[0] == tables[1]


def _head_source(heads: gs.Tensor) -> _HeadSource | None:
    rotary = _producer(heads, "RotaryEmbedding")
    transpose = _producer(heads if rotary is None else rotary.inputs[0], "Transpose")
    if transpose is None or list(transpose.attrs["perm"]) != [0, 2, 1, 3]:
        return None
    split = transpose.inputs[0]  # [B, S, H, D]
    norm = _producer(split, "RMSNormalization")
    reshape = _producer(split if norm is None else norm.inputs[0], "Reshape")
    if reshape is None or reshape.inputs[0].shape is None or len(reshape.inputs[0].shape) != 3:
        return None
    return _HeadSource(reshape.inputs[0], norm, rotary)


def _producer(tensor: gs.Tensor, op: str) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs and tensor.inputs[0].op == op else None


def _attribute(node: gs.Node | None, name: str) -> Any:
    return None if node is None else node.attrs.get(name)


def _as_rows(graph: gs.Graph, tensor: gs.Tensor, width: int) -> gs.Tensor:
    """[B, H, S, D] as [B, S, H·D]; what is in rows already stays."""
    if len(tensor.shape) == 3:
        return tensor
    batch, heads, tokens, head_dim = tensor.shape
    swapped = gs.Variable(f"{tensor.name}.tokens_first", tensor.dtype, [batch, tokens, heads, head_dim])
    rows = gs.Variable(f"{tensor.name}.rows", tensor.dtype, [batch, tokens, width])
    shape = gs.Constant(f"{rows.name}.shape", np.array([0, 0, width], np.int64))
    graph.nodes.append(gs.Node("Transpose", attrs={"perm": [0, 2, 1, 3]}, inputs=[tensor], outputs=[swapped]))
    graph.nodes.append(gs.Node("Reshape", inputs=[swapped, shape], outputs=[rows]))
    return rows


def _count(graph: gs.Graph, logits_index: gs.Tensor) -> gs.Tensor:
    """Tokens of each row that are no padding: one more than the last position whose logits are wanted."""
    last = gs.Variable("count.last", np.int64, ["batch"])
    count = gs.Variable("count", np.int64, ["batch"])
    end, one = (gs.Constant(f"count.{name}", np.array(value, np.int64)) for name, value in (("end", -1), ("one", 1)))
    graph.nodes.append(gs.Node("Gather", attrs={"axis": 1}, inputs=[logits_index, end], outputs=[last]))
    graph.nodes.append(gs.Node("Add", inputs=[last, one], outputs=[count]))
    return count


def ep_context_model(proto: onnx.ModelProto, engine: str, source: str, version: str) -> onnx.ModelProto:
    """An engine as one EPContext node, the form in which ONNX Runtime's providers take one.

    Args:
        proto: what the engine was built from; its inputs and outputs are the node's.
        engine: the engine's file name, beside the model.
        source: the execution provider that it is for.
    """
    graph = proto.graph
    node = onnx.helper.make_node(
        "EPContext",
        [value.name for value in graph.input],
        [value.name for value in graph.output],
        name=graph.name,
        domain="com.microsoft",
        main_context=1,
        embed_mode=0,
        ep_cache_context=engine,
        source=source,
        partition_name=graph.name,
        ep_sdk_version=version,
    )
    made = onnx.helper.make_graph([node], graph.name, graph.input, graph.output)
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(made, opset_imports=opsets, ir_version=IR_VERSION)
