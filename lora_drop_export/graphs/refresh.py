"""The two neutral step graphs.

Enters: the traced graph, a drop plan, where each weight lies, adapters. Leaves: `refresh.onnx` and `lora.onnx` as
protos in plain ONNX (opset 24), with the inputs and outputs of lora_drop_runtime.graph_io. Knows no target.

    refresh_from_trace          CacheAttention → TensorScatter (K), TensorScatter (V), Attention with an explicit mask,
                                scaled where it has sinks (sinks.py); CacheConvolution → the same writes, and a sum of
                                products (convolutions.py); CacheRecurrence → LinearAttention from a state, over the
                                tokens that are not in it (recurrences.py); state outputs for dropped layers; Experts →
                                all of them (experts.py)
    lora_step_from_refresh      each dropped layer is cut out and its surrogate put in; S = 1
    with_rows_chosen_early      the refresh graph's choice of rows, from before the head up to the last attention
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from lora_drop_runtime.bundle.graph_io import graph_io
from lora_drop_runtime.bundle.safetensors_file import Blocks, TensorPlace
from lora_drop_runtime.errors import ModelError
from lora_drop_runtime.plan.drop_plan import DropPlan
from lora_drop_runtime.plan.schedule import StepKind
from lora_drop_runtime.plan.sites import half_of, layer_of
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from lora_drop_export.decoder.attention_interface import DOMAIN
from lora_drop_export.decoder.experts import is_mixture
from lora_drop_export.decoder.trace import TracedModel

from .cache_entries import CacheEntries
from .convolutions import expand_convolution, is_convolution
from .experts import expand_experts
from .match import SYMMETRIC, ZERO_POINTS
from .nodes import Ops
from .recurrences import OPSET as RECURRENT_OPSET
from .recurrences import Recurrences, is_recurrence
from .sinks import scaled_by_sinks
from .values import IR_VERSION, OPSET, external, initializer, middle_name, named, stream_names, typed_value


def _keeps_tokens(node: ir.Node) -> bool:
    """Whether it is an attention, a convolution or a recurrent state as traced."""
    return is_convolution(node) or is_recurrence(node) or (node.domain == DOMAIN and node.op_type == "CacheAttention")


def _ints(value: int | list[int]) -> ir.Node:
    return ir.Node("", "Constant", (), (ir.AttrTensor("value", ir.Tensor(np.array(value, np.int64))),))


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
        return self.inputs["len_dropped" if layer in self.plan.dropped_attentions else "len_kept"]

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


_PARTS = ("key", "value")


def _entries(
    graph: ir.Graph,
    layer: int,
    inputs: Mapping[str, ir.Value],
    masks: _Masks,
    kv_scales: Mapping[str, TensorPlace],
    activations: ir.TypeProtocol | None,
) -> list[CacheEntries]:
    """Of a layer's K and V."""
    found = []
    for part in _PARTS:
        stored = kv_scales.get(f"kv_scales.{layer}.{part}")
        scale = None if stored is None else initializer(graph, f"kv_scales.{layer}.{part}", stored)
        found.append(CacheEntries(inputs[f"past_{part}.{layer}"], masks.length(layer), activations, scale))
    return found


def _expand_cache_attention(
    graph: ir.Graph, node: ir.Node, caches: Sequence[CacheEntries], masks: _Masks
) -> list[ir.Value]:
    """One CacheAttention node becomes the cache writes and the attention; returns the presents."""
    layer = node.attributes["layer"].as_int()
    window = node.attributes["sliding_window"].as_int()
    softcap = node.attributes["softcap"].as_float()
    presents, read = [], []
    ops = Ops()
    for cache, tensor in zip(caches, node.inputs[1:3], strict=True):
        assert tensor is not None
        present, _ = cache.write(ops, tensor)
        presents.append(present)
        read.append(cache.read(ops, present, cache.past.shape))
    query = node.inputs[0]
    assert query is not None
    attributes: dict[str, Any] = {"scale": node.attributes["scale"].as_float()}
    if softcap:
        attributes["softcap"] = softcap
    attended = ops("Attention", query, *read, masks.get(layer, window), **attributes)  # [B, H, S, D]
    attended.type = query.type
    if len(node.inputs) > 3:
        sinks = node.inputs[3]
        assert sinks is not None
        kv_heads = int(caches[0].past.shape[1])  # type: ignore[index, arg-type]
        attended = scaled_by_sinks(ops, ops.nodes[-1], sinks, kv_heads)
    heads_last = ops("Transpose", attended, perm=[0, 2, 1, 3])  # [B, S, H, D]
    heads_last.type, heads_last.shape = query.type, node.outputs[0].shape
    node.outputs[0].replace_all_uses_with(heads_last)
    graph.insert_after(node, ops.nodes)
    graph.remove(node, safe=True)
    return presents


def attention_residual(values: Mapping[str | None, ir.Value], layer: int) -> ir.Value:
    """The residual stream between a layer's halves: the Add that joins its input with its attention's output."""
    x = values.get(f"hidden_states.{layer}")
    y = values[f"hidden_states.{layer + 1}"]
    for node, _ in x.uses() if x is not None else ():
        # Read again by the MLP, not only by the next addition: else the halves run in parallel
        if node.op_type == "Add" and node.outputs[0] is not y and len(node.outputs[0].uses()) > 1:
            return node.outputs[0]
    raise ModelError(
        "No residual stream is found between the attention and the MLP of the model's layers.",
        note=f"In layer {layer} its MLP, and what adds to that, read no sum with hidden_states.{layer} itself: it is "
        "one half alone, its halves run in parallel, or the sum is reshaped or normalized first.",
        hint="Use --injection block, and drop whole layers.",
    )


def _streams_between_halves(graph: ir.Graph, plan: DropPlan) -> dict[int, ir.Value]:
    """`attention_residual` of each layer of which a plan drops a half alone."""
    values: dict[str | None, ir.Value] = {value.name: value for node in graph for value in node.outputs}
    layers = sorted({layer_of(site) for site in plan.sites if half_of(site)})
    return {layer: attention_residual(values, layer) for layer in layers}


def check_halves(traced: TracedModel, plan: DropPlan) -> None:
    """Refuse a plan that drops halves of layers that have none. Raises ModelError."""
    _streams_between_halves(traced.graph.graph, plan)


def half_parameters(traced: TracedModel) -> list[tuple[frozenset[str], frozenset[str]]]:
    """For each layer the names of its attention half's parameters, and of those that K and V are made with.

    Nothing is in the first where a layer has no halves, since they run in parallel.
    """
    graph = traced.graph.graph
    values: dict[str | None, ir.Value] = {value.name: value for node in graph for value in node.outputs}
    made_of = {  # of each layer what becomes K and V
        node.attributes["layer"].as_int(): (
            node.inputs[:1] if is_convolution(node) else node.inputs[:3] if is_recurrence(node) else node.inputs[1:3]
        )
        for node in filter(_keeps_tokens, graph)
    }

    def parameters(ends: Sequence[ir.Value | None], layer: int) -> frozenset[str]:
        begin, own = f"hidden_states.{layer}", f"{traced.layers_prefix}.{layer}."  # K and V may be another layer's
        found, seen, todo = set(), set(), list(ends)
        while todo:
            value = todo.pop()
            if value is None or value.name == begin or value in seen:
                continue
            seen.add(value)
            if value.is_initializer():
                found.add(str(value.name))
            elif (node := value.producer()) is not None:
                todo.extend(node.inputs)
        return frozenset(name for name in found & set(traced.parameters) if name.startswith(own))

    halves = []
    for layer in range(len(traced.windows)):
        made = parameters(made_of.get(layer, ()), layer)
        try:
            halves.append((parameters([attention_residual(values, layer)], layer), made))
        except ModelError:
            halves.append((frozenset(), frozenset()))
    return halves


def _state_outputs(
    graph: ir.Graph, plan: DropPlan, logits_index: ir.Value, values: Mapping[str | None, ir.Value]
) -> dict[str, ir.Value]:
    """present_state: a surrogate's output, or the change of a run, [B, d] at the last position that has logits."""
    last = ir.node("Gather", [logits_index, (end := _ints([-1])).outputs[0]], {"axis": 1})  # [B, 1]
    graph.extend([end, last])

    def row(name: str) -> ir.Value:
        chosen = ir.node("GatherND", [values[name], last.outputs[0]], {"batch_dims": 1})
        graph.append(chosen)
        return chosen.outputs[0]

    outputs = {}
    for first, after in plan.states.items():
        state = row(stream_names(after)[1])
        if plan.form.with_change:
            change = ir.node("Sub", [state, row(stream_names(first)[0])])
            graph.append(change)
            state = change.outputs[0]
        outputs[f"present_state.{first}"] = state
    return outputs


def _dequantize(graph: ir.Graph, weight: ir.Value, blocks: Blocks) -> None:
    """Put a DequantizeLinear between a quantized weight and its users: of blocks along K, or of E4M3 rows."""
    scales = initializer(graph, f"{weight.name}.scales", blocks.scales)
    assert scales.dtype is not None
    if blocks.zero_points is None:
        node = ir.node("DequantizeLinear", [weight, scales], {"axis": 0})
    else:
        suffix = SYMMETRIC if blocks.symmetric else ZERO_POINTS
        zero_points = initializer(graph, f"{weight.name}{suffix}", blocks.zero_points)
        node = ir.node("DequantizeLinear", [weight, scales, zero_points], {"axis": 1, "block_size": blocks.block_size})
    node.outputs[0].name, node.outputs[0].shape = f"{weight.name}.values", weight.shape
    node.outputs[0].dtype = scales.dtype
    for use in list(weight.uses()):
        if use.node is not node:
            use.node.replace_input_with(use.idx, node.outputs[0])
    graph.insert_before(graph[0], [node])


def refresh_from_trace(
    traced: TracedModel,
    plan: DropPlan,
    dtype: str,
    weights: Mapping[str, TensorPlace],
    kv_dtype: str | None = None,
    kv_scales: Mapping[str, TensorPlace] | None = None,
) -> onnx.ModelProto:
    """The refresh graph of a plan. The traced graph is left as it was.

    Args:
        dtype: of activations, and of the caches unless there is a `kv_dtype`.
        weights: where each parameter lies.
        kv_dtype: of caches of 8 bits.
        kv_scales: of these, `kv_scales.<layer>.key` and `.value`, float32 [Hkv, 1, D or 1]: entry · scale = value.
    """
    model = traced.graph.clone()
    graph = model.graph
    model.opset_imports.clear()
    model.opset_imports[""] = OPSET
    model.ir_version = IR_VERSION
    cache = traced.cache(dtype, kv_dtype)
    if traced.recurrence is not None:
        model.opset_imports[""] = RECURRENT_OPSET
    io = graph_io(StepKind.REFRESH, plan, cache, traced.hidden_size, traced.vocab_size)
    inputs = {str(value.name): value for value in graph.inputs}
    for spec in io.inputs:
        if spec.name not in inputs:
            inputs[spec.name] = typed_value(spec)
    values = {value.name: value for node in graph for value in node.outputs}
    presents: dict[str, ir.Value] = {"logits": graph.outputs[0]}
    masks = _Masks(inputs, plan)
    recurrences = None if traced.recurrence is None else Recurrences(inputs, traced.recurrence)
    for node in list(filter(_keeps_tokens, graph)):
        layer, (first, *_) = node.attributes["layer"].as_int(), node.outputs
        if is_recurrence(node):
            assert recurrences is not None
            presents |= recurrences.expand(graph, node)
            continue
        caches = _entries(graph, layer, inputs, masks, kv_scales or {}, first.type)
        if is_convolution(node):
            made = expand_convolution(graph, node, caches)
        else:
            made = _expand_cache_attention(graph, node, caches, masks)
        presents |= {f"present_{part}.{layer}": present for part, present in zip(_PARTS, made, strict=True)}
    for layer, middle in _streams_between_halves(graph, plan).items():
        middle.name = middle_name(layer)
        values[middle.name] = middle
    if plan.has_state:
        presents |= _state_outputs(graph, plan, inputs["logits_index"], values)
    for node in list(filter(is_mixture, graph)):
        expand_experts(graph, node)
    if masks.nodes:
        graph.insert_before(graph[0], masks.nodes)  # they read graph inputs only
    graph.inputs[:] = [inputs[spec.name] for spec in io.inputs]
    graph.outputs[:] = [named(presents[spec.name], spec) for spec in io.outputs]
    for name in traced.parameters:
        value, stored = graph.initializers[name], weights[name]
        if stored.blocks is not None:
            _dequantize(graph, value, stored.blocks)
        value.const_value = external(name, stored)
        value.type = ir.TensorType(value.const_value.dtype)  # its own: copies of a layer share those of the first
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    graph.name = "refresh"
    return ir.serde.serialize_model(model)
