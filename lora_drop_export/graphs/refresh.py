"""The two neutral step graphs.

Enters: the traced graph, a drop plan, where each weight lies, adapters. Leaves: `refresh.onnx` and `lora.onnx` as
protos in plain ONNX (opset 24), with the inputs and outputs of lora_drop_runtime.graph_io. Knows no target.

    refresh_from_trace          CacheAttention → TensorScatter (K), TensorScatter (V), Attention with an explicit mask;
                                state outputs for dropped layers
    lora_step_from_refresh      each dropped layer is cut out and its surrogate put in; S = 1
    with_rows_chosen_early      the refresh graph's choice of rows, from before the head up to the last attention
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from lora_drop_runtime.bundle.graph_io import CacheShape, TensorSpec, graph_io
from lora_drop_runtime.errors import ModelError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import StepKind
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from lora_drop_export.decoder.trace import DOMAIN, TracedModel

from .match import SYMMETRIC, ZERO_POINTS, Ops, is_row_wise, rank

OPSET = 24  # the first with TensorScatter
IR_VERSION = 11


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in the bundle: file relative to its root, and bytes. `dtype` is a numpy/ONNX name.

    A quantized tensor has dtype `uint4` (two values a byte, the first in the low half) or `uint8`, the shape [N, K] of
    the values, and `blocks`: value = (q − zero_point) · scale for each block of `block_size` along K.
    """

    location: str
    offset_bytes: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]
    blocks: Blocks | None = None


@dataclass(frozen=True)
class Blocks:
    """Of a quantized tensor [N, K]: `scales` float32 and `zero_points` (the tensor's dtype), both [N, K / block_size].

    `symmetric`: every zero point is 2^(bits−1), which is what engines assume when they are given none.
    """

    block_size: int
    scales: StoredTensor
    zero_points: StoredTensor
    symmetric: bool


def refresh_from_trace(
    traced: TracedModel,
    plan: DropPlan,
    dtype: str,
    weights: Mapping[str, StoredTensor],
    kv_scales: Mapping[str, StoredTensor] | None = None,
) -> onnx.ModelProto:
    """The refresh graph of a plan. The traced graph is left as it was.

    Args:
        dtype: of activations, and of the caches unless `kv_scales` are given.
        weights: where each parameter lies.
        kv_scales: for int8 caches, `kv_scales.<layer>.key` and `.value`, float32 [Hkv, 1, D]: entry · scale = value.
    """
    model = ir.serde.deserialize_model(ir.serde.serialize_model(traced.graph))
    graph = model.graph
    model.opset_imports.clear()
    model.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    cache = CacheShape(traced.kv_heads, traced.head_dim, dtype, "int8" if kv_scales else None)
    io = graph_io(StepKind.REFRESH, plan, cache, traced.hidden_size, traced.vocab_size)
    inputs = {str(value.name): value for value in graph.inputs}
    for spec in io.inputs:
        if spec.name not in inputs:
            inputs[spec.name] = _value(spec)
    values = {value.name: value for node in graph for value in node.outputs}
    presents: dict[str, ir.Value] = {"logits": graph.outputs[0]}
    masks = _Masks(inputs, plan)
    for node in [n for n in graph if n.domain == DOMAIN and n.op_type == "CacheAttention"]:
        presents |= _expand_cache_attention(graph, node, inputs, masks, kv_scales or {})
    if plan.injection == "attn_mlp":
        for layer in plan.drop_layers:
            attention_residual(graph, values, layer)  # refuses halves that run in parallel
    if plan.has_state:
        presents |= _state_outputs(graph, plan, inputs["logits_index"], values)
    if masks.nodes:
        graph.insert_before(graph[0], masks.nodes)  # they read graph inputs only
    graph.inputs[:] = [inputs[spec.name] for spec in io.inputs]
    graph.outputs[:] = [_named(presents[spec.name], spec) for spec in io.outputs]
    for name in traced.parameters:
        value, stored = graph.initializers[name], weights[name]
        if stored.blocks is not None:
            _dequantize(graph, value, stored.blocks)
        value.const_value = _external(name, stored)
        value.dtype = value.const_value.dtype
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    graph.name = "refresh"
    return ir.serde.serialize_model(model)


_ONNX_DTYPE = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "int64": "INT64",
    "uint4": "UINT4",
    "uint8": "UINT8",
    "int8": "INT8",
}


def _external(name: str, stored: StoredTensor) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        stored.location,
        stored.offset_bytes,
        stored.size_bytes,
        ir.DataType[_ONNX_DTYPE[stored.dtype]],
        shape=ir.Shape(stored.shape),
        name=name,
    )


def _initializer(graph: ir.Graph, name: str, stored: StoredTensor) -> ir.Value:
    tensor = _external(name, stored)
    value = ir.Value(name=name, shape=ir.Shape(stored.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[name] = value
    return value


def _dequantize(graph: ir.Graph, weight: ir.Value, blocks: Blocks) -> None:
    """Put a DequantizeLinear between a quantized weight and its users."""
    suffix = SYMMETRIC if blocks.symmetric else ZERO_POINTS
    inputs = [
        weight,
        _initializer(graph, f"{weight.name}.scales", blocks.scales),
        _initializer(graph, f"{weight.name}{suffix}", blocks.zero_points),
    ]
    node = ir.node("DequantizeLinear", inputs, {"axis": 1, "block_size": blocks.block_size})
    node.outputs[0].name, node.outputs[0].shape = f"{weight.name}.values", weight.shape
    node.outputs[0].dtype = ir.DataType.FLOAT
    for use in list(weight.uses()):
        if use.node is not node:
            use.node.replace_input_with(use.idx, node.outputs[0])
    graph.insert_before(graph[0], [node])


def _value(spec: TensorSpec) -> ir.Value:
    return ir.Value(
        name=spec.name,
        shape=ir.Shape(spec.shape),
        type=ir.TensorType(ir.DataType[_ONNX_DTYPE[spec.dtype]]),
    )


def _named(value: ir.Value, spec: TensorSpec) -> ir.Value:
    value.name = spec.name
    value.shape = ir.Shape(spec.shape)
    value.dtype = ir.DataType[_ONNX_DTYPE[spec.dtype]]
    return value


@dataclass
class _Masks:
    """One boolean mask [B, 1, S, C] per length group and window, made when first asked for.

    Token s of a row goes to slot `len + s`; it sees slot c iff `c <= len + s`, and within a window W iff also
    `c > len + s − W`. Slots are in position order, so this is causality; what lies past the length is never seen.
    """

    inputs: Mapping[str, ir.Value]
    plan: DropPlan
    nodes: list[ir.Node] = field(default_factory=list)
    made: dict[tuple[str, int], ir.Value] = field(default_factory=dict)

    def length(self, layer: int) -> ir.Value:
        return self.inputs["len_dropped" if layer in self.plan.drop_layers else "len_kept"]

    def get(self, layer: int, window: int) -> ir.Value:
        length = self.length(layer)
        key = (str(length.name), window)
        if key not in self.made:
            slots = self._range(self.inputs[f"past_key.{layer}"], 2)  # [C]
            tokens = self._range(self.inputs["input_ids"], 1)  # [S]
            start = self._op("Unsqueeze", length, _ints([1, 2, 3]))  # [B, 1, 1, 1]
            own = self._op("Add", start, self._op("Unsqueeze", tokens, _ints([1])))  # [B, 1, S, 1]
            mask = self._op("LessOrEqual", slots, own)  # [B, 1, S, C]
            if window:
                oldest = self._op("Sub", own, _ints([window]))
                mask = self._op("And", mask, self._op("Greater", slots, oldest))
            self.made[key] = mask
        return self.made[key]

    def _range(self, value: ir.Value, axis: int) -> ir.Value:
        size = self._op("Squeeze", self._op("Shape", value, start=axis, end=axis + 1))
        return self._op("Range", _ints(0), size, _ints(1))

    def _op(self, op_type: str, *inputs: ir.Value | ir.Node, **attributes: int) -> ir.Value:
        values = []
        for item in inputs:
            if isinstance(item, ir.Node):
                self.nodes.append(item)
                item = item.outputs[0]
            values.append(item)
        node = ir.node(op_type, values, attributes)
        self.nodes.append(node)
        return node.outputs[0]


def _ints(value: int | list[int]) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(np.array(value, np.int64))})


def _expand_cache_attention(
    graph: ir.Graph,
    node: ir.Node,
    inputs: Mapping[str, ir.Value],
    masks: _Masks,
    kv_scales: Mapping[str, StoredTensor],
) -> dict[str, ir.Value]:
    """One CacheAttention node becomes the cache write and the attention; returns the present_* values."""
    layer = node.attributes["layer"].as_int()
    window = node.attributes["sliding_window"].as_int()
    softcap = node.attributes["softcap"].as_float()
    presents, caches = {}, []
    ops = Ops()
    for part, tensor in zip(("key", "value"), node.inputs[1:], strict=True):
        past = inputs[f"past_{part}.{layer}"]
        stored = kv_scales.get(f"kv_scales.{layer}.{part}")
        if stored is None:
            present = cache = ops("TensorScatter", past, tensor, masks.length(layer), axis=2)
        else:
            scale = _initializer(graph, f"kv_scales.{layer}.{part}", stored)
            limits = (ops.constant(np.array(limit, np.float32)) for limit in (-128, 127))
            entry = ops("Cast", ops("Clip", ops("Round", ops("Div", tensor, scale)), *limits), to=int(ir.DataType.INT8))
            present = ops("TensorScatter", past, entry, masks.length(layer), axis=2)
            cache = ops("Mul", ops("Cast", present, to=int(ir.DataType.FLOAT)), scale)
            cache.shape, cache.type = past.shape, ir.TensorType(ir.DataType.FLOAT)
        presents[f"present_{part}.{layer}"] = present
        caches.append(cache)
    query = node.inputs[0]
    assert query is not None
    attributes: dict[str, float] = {"scale": node.attributes["scale"].as_float()}
    if softcap:
        attributes["softcap"] = softcap
    attention = ir.node("Attention", [query, *caches, masks.get(layer, window)], attributes)  # [B, H, S, D]
    heads_last = ir.node("Transpose", [attention.outputs[0]], {"perm": [0, 2, 1, 3]})  # [B, S, H, D]
    for made in (attention, heads_last):
        made.outputs[0].type = query.type
    heads_last.outputs[0].shape = node.outputs[0].shape
    node.outputs[0].replace_all_uses_with(heads_last.outputs[0])
    graph.insert_after(node, [*ops.nodes, attention, heads_last])
    graph.remove(node, safe=True)
    return presents


def _state_outputs(
    graph: ir.Graph, plan: DropPlan, logits_index: ir.Value, values: Mapping[str | None, ir.Value]
) -> dict[str, ir.Value]:
    """present_state: each surrogate's output [B, d] at the last position whose logits are asked for."""
    last = ir.node("Gather", [logits_index, (end := _ints([-1])).outputs[0]], {"axis": 1})  # [B, 1]
    graph.extend([end, last])
    outputs = {}
    for site in plan.sites:
        layer, _, half = site.partition(".")
        source = (
            attention_residual(graph, values, int(layer))
            if half == "attn"
            else values[f"hidden_states.{int(layer) + 1}"]
        )
        state = ir.node("GatherND", [source, last.outputs[0]], {"batch_dims": 1})  # [B, d]
        graph.append(state)
        outputs[f"present_state.{site}"] = state.outputs[0]
    return outputs


def attention_residual(graph: ir.Graph, values: Mapping[str | None, ir.Value], layer: int) -> ir.Value:
    """The residual stream between a layer's halves: the Add that joins its input with its attention's output."""
    x = values.get(f"hidden_states.{layer}")
    y = values[f"hidden_states.{layer + 1}"]
    for node, _ in x.uses() if x is not None else ():
        # Read again by the MLP, not only by the next addition: else the halves run in parallel
        if node.op_type == "Add" and node.outputs[0] is not y and len(node.outputs[0].uses()) > 1:
            return node.outputs[0]
    raise ModelError(
        "The model's layers have no residual stream between attention and MLP.",
        note=f"No addition of hidden_states.{layer} inside layer {layer}: its halves run in parallel.",
        hint="Use --injection block.",
    )


def lora_step_from_refresh(
    refresh: onnx.ModelProto,
    plan: DropPlan,
    cache: CacheShape,
    adapters: Mapping[str, tuple[StoredTensor, StoredTensor]],
) -> onnx.ModelProto:
    """The LoRA step: the refresh graph with its dropped layers cut out and their surrogates put in.

    Args:
        refresh: the refresh graph; its external weights are neither read nor needed.
        adapters: site → (A [r, d], s·B [d, r]); absent sites leave only the base.

    Ensures: no node, weight, cache input or output of a dropped layer remains; S = 1; logits [B, 1, V].
    """
    graph = gs.import_onnx(refresh)
    tensors = graph.tensors()
    hidden_size = tensors["hidden_states.0"].shape[2]
    vocab_size = tensors["logits"].shape[2]
    outputs = {tensor.name: tensor for tensor in graph.outputs}
    for name in [name for name in outputs if name.startswith("present_state.")]:
        outputs.pop(name).name = f"{name}.refresh"  # the surrogate makes its own
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    builder = _SurrogateBuilder(graph, plan, cache, hidden_size, adapters)
    for layer in plan.drop_layers:
        x, y = tensors[f"hidden_states.{layer}"], tensors[f"hidden_states.{layer + 1}"]
        if plan.injection == "block":
            new = builder.surrogate(str(layer), x)
        else:
            new = builder.surrogate(f"{layer}.mlp", builder.surrogate(f"{layer}.attn", x))
        _replace_uses(y, new)
        tensors[f"hidden_states.{layer + 1}"] = new
    # Case 2: one token per row, so the gather of the rows that want logits is the identity
    for node in [n for n in graph.nodes if n.op == "GatherND" and "logits_index" in _ancestors(n.inputs[1])]:
        _replace_uses(node.outputs[0], node.inputs[0])
    io = graph_io(StepKind.LORA, plan, cache, hidden_size, vocab_size)
    outputs |= builder.states_out
    inputs |= builder.states_in
    inputs["input_ids"].shape = ["batch", 1]
    graph.inputs = [inputs[spec.name] for spec in io.inputs]
    graph.outputs = [outputs[spec.name] for spec in io.outputs]
    outputs["logits"].shape = ["batch", 1, vocab_size]
    graph.name = "lora"
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    proto = gs.export_onnx(graph)
    proto.ir_version = IR_VERSION
    return proto


def with_rows_chosen_early(refresh: onnx.ModelProto) -> onnx.ModelProto:
    """The refresh graph where what follows the last attention computes only the rows whose logits are asked for.

    `f(x)[rows] = f(x[rows])` for every operator that treats rows alike, so the choice moves up through them: a prefill
    spares the last layer's output projection and MLP for all tokens but one. Tensors that others read whole stay whole
    (a state's source may be among them); the argument is left as it was.
    """
    model = ir.serde.deserialize_model(refresh)
    graph = model.graph
    (index,) = (value for value in graph.inputs if value.name == "logits_index")
    choices = {use.node for unsqueeze, _ in index.uses() for use in unsqueeze.outputs[0].uses()}
    choices = {node for node in choices if node.op_type == "GatherND" and rank(node.outputs[0]) == 3}

    def rows_of(value: ir.Value) -> ir.Shape:
        assert index.shape is not None
        assert value.shape is not None
        return ir.Shape([*index.shape, value.shape[2]])

    moved: dict[ir.Node, None] = {}
    for node in reversed(list(graph)):
        readers = {use.node for value in node.outputs for use in value.uses()}
        leaves = any(value.is_graph_output() for value in node.outputs)
        if readers and not leaves and readers <= choices | moved.keys() and (is_row_wise(node) or _is_product(node)):
            moved[node] = None
    made = {node.outputs[0] for node in choices} | {value for node in moved for value in node.outputs}
    chosen: dict[ir.Value, ir.Value] = {}
    for node in reversed(moved):
        for place, value in enumerate(node.inputs):
            if value is None or rank(value) != 3 or value in made:
                continue
            if value not in chosen:
                like = next(iter(choices))
                gather = ir.node("GatherND", [value, like.inputs[1]], {"batch_dims": 1})
                chosen[value] = gather.outputs[0]
                gather.outputs[0].type = value.type
                gather.outputs[0].shape = rows_of(value)
                graph.insert_before(node, gather)
            node.replace_input_with(place, chosen[value])
        for value in node.outputs:
            value.shape = rows_of(value)
    for node in choices:
        source = node.inputs[0]
        if source in made:
            node.outputs[0].replace_all_uses_with(source)
    graph.sort()  # the index is made late
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    return ir.serde.serialize_model(model)


def _is_product(node: ir.Node) -> bool:
    """Whether a node multiplies rows [B, S, in] by one matrix [in, out]."""
    x, matrix = node.inputs if node.op_type == "MatMul" else (None, None)
    return x is not None and matrix is not None and (rank(x), rank(matrix)) == (3, 2)


@dataclass
class _SurrogateBuilder:
    """Puts in `y = base + x Aᵀ (sB)ᵀ`: Reshape, Gemm, Gemm, Add, Reshape (docs/algorithm.md)."""

    graph: gs.Graph
    plan: DropPlan
    cache: CacheShape
    hidden_size: int
    adapters: Mapping[str, tuple[StoredTensor, StoredTensor]]
    states_in: dict[str, gs.Variable] = field(default_factory=dict)
    states_out: dict[str, gs.Variable] = field(default_factory=dict)

    def surrogate(self, site: str, x: gs.Variable) -> gs.Variable:
        """Nodes of one surrogate; `x` [B, 1, d] → y [B, 1, d]."""
        dtype = x.dtype
        if site not in self.adapters and self.plan.surrogate == "residual":
            return x  # plain layer skipping: the base alone is no node at all
        rows: list[int | str] = ["batch", self.hidden_size]

        def variable(name: str, shape: list[int | str]) -> gs.Variable:
            return gs.Variable(f"surrogate.{site}.{name}", dtype, shape)

        def add(op: str, inputs: list[gs.Tensor], output: gs.Variable, **attrs: object) -> gs.Variable:
            name = f"surrogate.{site}.{output.name.rsplit('.', 1)[1]}"
            self.graph.nodes.append(gs.Node(op, name=name, attrs=attrs, inputs=inputs, outputs=[output]))
            return output

        base: gs.Variable | None = None
        if self.plan.has_state:
            base = gs.Variable(f"past_state.{site}", dtype, rows)
            self.states_in[base.name] = base
        result = base
        if site in self.adapters:
            rank = self.adapters[site][0].shape[0]
            to_rows = gs.Constant(f"surrogate.{site}.rows_shape", np.array([-1, self.hidden_size], np.int64))
            x_rows = add("Reshape", [x, to_rows], variable("x", rows))  # [B, d]
            down = add("Gemm", [x_rows, self._weight(site, 0)], variable("down", ["batch", rank]), transB=1)
            up = add("Gemm", [down, self._weight(site, 1)], variable("up", rows), transB=1)
            result = add("Add", [up, x_rows if base is None else base], variable("sum", rows))
            if self.plan.surrogate == "recurrent":
                result.name = f"present_state.{site}"
                self.states_out[result.name] = result
        assert result is not None
        to_tokens = gs.Constant(f"surrogate.{site}.tokens_shape", np.array([-1, 1, self.hidden_size], np.int64))
        return add("Reshape", [result, to_tokens], variable("y", ["batch", 1, self.hidden_size]))

    def _weight(self, site: str, which: int) -> gs.Constant:
        stored = self.adapters[site][which]
        proto = onnx.TensorProto(
            name=f"surrogate.{site}.lora_{'AB'[which]}",
            data_type=onnx.TensorProto.DataType.Value(_ONNX_DTYPE[stored.dtype]),
            dims=stored.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (
            ("location", stored.location),
            ("offset", stored.offset_bytes),
            ("length", stored.size_bytes),
        ):
            proto.external_data.add(key=key, value=str(value))
        return gs.Constant(proto.name, LazyValues(proto))


def _replace_uses(old: gs.Tensor, new: gs.Tensor) -> None:
    for node in list(old.outputs):
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                node.inputs[index] = new


def _ancestors(tensor: gs.Tensor, depth: int = 4) -> set[str]:
    """Names of the tensors a tensor is made from, a few nodes back."""
    names = {tensor.name}
    if depth:
        for producer in tensor.inputs:
            for source in producer.inputs:
                names |= _ancestors(source, depth - 1)
    return names
