"""Nodes that a provider leaves to the CPU: a test of real sessions, where the CPU's provider has them all."""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime
import pytest
from lora_drop_runtime import NoDeviceError
from lora_drop_runtime.engines.ort.placement import RECORD, check_placement
from onnx import helper

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def opened(op: str, domain: str = "") -> Any:
    """A session of one node, of as many inputs as it needs."""
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    attributes = {"axis": 0} if op == "Concat" else {}
    node = helper.make_node(op, ["x"], ["y"], name="made", domain=domain, **attributes)
    graph = helper.make_graph([node], "one", values[:1], values[1:])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(RECORD, "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=[CPU])


def test_what_makes_shapes_may_run_on_the_cpu():
    check_placement(opened("Concat"), CUDA, "ort/lora.onnx")
    check_placement(opened("Cos"), CPU, "ort/lora.onnx")


@pytest.mark.parametrize(("op", "domain"), [("Cos", ""), ("QuickGelu", "com.microsoft")])
def test_any_other_node_on_the_cpu_is_named(op, domain):
    with pytest.raises(NoDeviceError, match="cannot run all of a graph") as refused:
        check_placement(opened(op, domain), CUDA, "ort/lora.onnx")
    assert f"ort/lora.onnx: {CUDA} leaves 1 nodes to the CPU, among them {op} 'made'." in refused.value.note
