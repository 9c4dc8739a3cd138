"""Making graphsurgeon values, external initializers among them, and the ONNX versions of the neutral graphs."""

from __future__ import annotations

import onnx_ir as ir
from lora_drop_runtime.bundle.graph_io import TensorSpec
from lora_drop_runtime.bundle.safetensors_file import TensorPlace
from lora_drop_runtime.dtypes import BY_NAME
from lora_drop_runtime.plan.sites import ATTENTION, MLP, half_of, layer_of

OPSET = 24  # the first with TensorScatter
IR_VERSION = 11


def middle_name(layer: int) -> str:
    """The residual stream between a layer's halves, where one of them is dropped."""
    return f"hidden_states.{layer}.attn"


def stream_names(site: str) -> tuple[str, str]:
    """The residual stream at a site's input and at its output."""
    layer, half = layer_of(site), half_of(site)
    begin = middle_name(layer) if half == MLP else f"hidden_states.{layer}"
    return begin, middle_name(layer) if half == ATTENTION else f"hidden_states.{layer + 1}"


def external(name: str, stored: TensorPlace) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        stored.location,
        stored.offset_bytes,
        stored.size_bytes,
        ir.DataType(BY_NAME[stored.dtype].onnx),
        shape=ir.Shape(stored.shape),
        name=name,
    )


def initializer(graph: ir.Graph, name: str, stored: TensorPlace) -> ir.Value:
    tensor = external(name, stored)
    value = ir.Value(name=name, shape=ir.Shape(stored.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[name] = value
    return value


def typed_value(spec: TensorSpec) -> ir.Value:
    return ir.Value(
        name=spec.name,
        shape=ir.Shape(spec.shape),
        type=ir.TensorType(ir.DataType(BY_NAME[spec.dtype].onnx)),
    )


def named(value: ir.Value, spec: TensorSpec) -> ir.Value:
    value.name = spec.name
    value.shape = ir.Shape(spec.shape)
    value.dtype = ir.DataType(BY_NAME[spec.dtype].onnx)
    return value
