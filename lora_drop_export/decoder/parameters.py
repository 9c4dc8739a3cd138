"""Initializers of a traced graph: values for buffers, places for what a checkpoint gives."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir
from lora_drop_runtime.errors import ModelError


def _constant(tensor: Any, name: str) -> Any:
    """The value of a tensor that the model's code makes while it runs; on fake tensors it hangs on the fake."""
    raw = getattr(tensor, "raw", None)
    real = getattr(raw, "constant", raw)
    if real is None:
        raise ModelError(
            "The model makes a tensor whose value cannot be known while tracing.",
            note=f"It is {name}, of shape {tuple(tensor.shape.numpy())}.",
            hint="Use a model of a family that transformers knows.",
        )
    return real


def buffer_tensor(buffers: dict[str, Any], name: str, dtype: ir.DataType) -> ir.TensorProtocol:
    """A buffer's values, which no checkpoint gives."""
    array = buffers[name].float().numpy()
    if np.isnan(array).any():
        raise ModelError(
            "The model has a buffer whose values are unknown.",
            note=f"{name} is in no checkpoint and transformers does not initialise it.",
            hint="Use a model of a family that transformers knows.",
        )
    return ir.tensor(array.astype(dtype.numpy()), name=name)


def bind_initializers(model: ir.Model, buffers: dict[str, Any], stored: Collection[str]) -> None:
    """Give initializers their Hugging Face names; stored ones lose their fake data, the others get their values."""
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if value.name is None or not value.name.startswith("model."):
            continue  # a constant of the graph itself
        name = value.name.removeprefix("model.")
        if name in buffers:
            value.const_value = buffer_tensor(buffers, name, ir.DataType.FLOAT if tensor is None else tensor.dtype)
        elif name not in stored:
            value.const_value = ir.tensor(_constant(tensor, name), name=name)
        else:
            value.const_value = None
            if tensor is not None:
                value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        del model.graph.initializers[value.name]
        value.name = name
        model.graph.initializers[name] = value


def narrow_parameters(graph: ir.Graph, dtype: str) -> None:
    """Routers keep matrices and biases in float32 whatever the model's dtype is, and a bundle holds all in that one:
    they are widened where they are read.
    """
    if dtype == "float32":
        return
    half = ir.DataType[dtype.upper()]
    for value in graph.initializers.values():
        if value.const_value is not None or value.dtype != ir.DataType.FLOAT:
            continue
        cast, uses = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}), list(value.uses())
        wide = cast.outputs[0]
        wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
        for node, place in uses:
            if node is not cast:
                node.replace_input_with(place, wide)
        graph.insert_before(graph[0], [cast])
        value.type = ir.TensorType(half)  # layers that are alike share the one they had


def _static(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(value.shape.numpy())


def leave_places(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Parameters become references to a file that is not there yet; returns their shapes."""
    parameters = {}
    model.metadata_props.clear()
    for node in model.graph:  # stack traces with the paths of this machine
        node.metadata_props.clear()
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None
            parameters[name] = shape = _static(value)
            value.const_value = ir.ExternalTensor("unknown", 0, 0, value.dtype, shape=ir.Shape(shape), name=name)
    return parameters


def looked_up(model: ir.Model, parameters: dict[str, tuple[int, ...]]) -> frozenset[str]:
    initializers = model.graph.initializers
    return frozenset(
        name for name in parameters if all(node.op_type == "Gather" for node, _ in initializers[name].uses())
    )
