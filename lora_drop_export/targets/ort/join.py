"""Both steps in one graph: an If on the input `lora_step`."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from lora_drop_runtime.bundle.graph_io import LORA_STEP, steps_name
from onnx import helper


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


def joined(lora: onnx.ModelProto, refresh: onnx.ModelProto) -> onnx.ModelProto:
    """If(lora_step): the LoRA step, else the refresh."""
    inputs = {value.name: value for value in refresh.graph.input}
    inputs |= {value.name: value for value in lora.graph.input if value.name not in inputs}
    outputs = {value.name: value for value in refresh.graph.output}
    weights: dict[str, onnx.TensorProto] = {}
    for form in (refresh, lora):
        for tensor in form.graph.initializer:
            first = weights.setdefault(tensor.name, tensor)
            assert first == tensor, tensor.name
    choice = helper.make_node(
        "If",
        [LORA_STEP],
        list(outputs),
        then_branch=_branch(lora.graph, "lora/", outputs),
        else_branch=_branch(refresh.graph, "refresh/", outputs),
    )
    which = helper.make_tensor_value_info(LORA_STEP, onnx.TensorProto.BOOL, [])
    graph = helper.make_graph(
        [choice],
        steps_name(value.name for value in lora.graph.output),
        [which, *inputs.values()],
        list(outputs.values()),
        list(weights.values()),
    )
    return helper.make_model(graph, opset_imports=refresh.opset_import, ir_version=refresh.ir_version)
