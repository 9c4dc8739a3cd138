"""A built engine as an EPContext node, for ONNX Runtime's RTX provider."""

from __future__ import annotations

import onnx

from lora_drop_export.graphs.values import IR_VERSION


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
