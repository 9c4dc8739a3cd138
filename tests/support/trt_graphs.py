"""Quantized weights in graphs for TensorRT: what the parser makes of them, and small ones over a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from lora_drop_runtime.bundle.bundle import Bundle
from lora_drop_runtime.plan.schedule import StepKind

from lora_drop_export.console import Console
from lora_drop_export.targets.trt.build import EngineBuilder
from lora_drop_export.targets.trt.options import BuilderOptions
from tests.support.bundles import Family, first_layers

RTX = "tensorrt-rtx"
QUANTIZED = Path(__file__).parents[1] / "export" / "checkpoint" / "quantized"
ADA = BuilderOptions(compute_capabilities=("8.9",))
LAYERS = 3  # the first ones of a family, of which one is dropped: builds of engines take most of the time
MATRICES = 7 * LAYERS + 2  # of llama: those of its layers, the embedding and the head


def of_family(name: str, dtype: str = "float32") -> Family:
    """Its first layers; one more of Gemma, so that layers with and without a window are kept."""
    return first_layers(name, 4 if name == "gemma2" else LAYERS, dtype)


def quantized_constants(bundle: Bundle, kind: StepKind) -> list[tuple[str, str]]:
    """Of each dequantization in the parsed network the dtypes of its input and of its output."""
    builder = EngineBuilder(RTX, bundle.root, ADA, Console())
    graph = onnx.load(bundle.root / bundle.target(RTX)[1].graphs[kind.value], load_external_data=False)
    network = builder.parse(graph)[1]
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = [layer for layer in layers if layer.type == builder.trt.LayerType.DEQUANTIZE]
    return [(layer.get_input(0).dtype.name, layer.get_output(0).dtype.name) for layer in found]


def dequantization(root: Path, inputs: Mapping[str, tuple[int, np.ndarray]], **attributes: int) -> onnx.ModelProto:
    """A graph of one DequantizeLinear; its inputs, name → ONNX's dtype and the bytes, lie in `root/data`."""
    tensors, begin = [], 0
    with (root / "data").open("wb") as file:
        for name, (kind, array) in inputs.items():
            tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", "data"), ("offset", begin), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            begin += file.write(array.tobytes())
    node = onnx.helper.make_node("DequantizeLinear", list(inputs), ["y"], **attributes)
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [], tensors))
