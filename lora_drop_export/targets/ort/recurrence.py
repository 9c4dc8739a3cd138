"""Recurrent states → ONNX Runtime's own operator, which has a kernel for the CPU."""

from __future__ import annotations

import onnx_ir as ir

from lora_drop_export.graphs.nodes import Ops
from lora_drop_export.graphs.recurrences import TOKENS
from lora_drop_export.graphs.values import OPSET

from .linears import MICROSOFT


def take_tokens(graph: ir.Graph, new_tokens: ir.Value) -> None:
    """Let recurrent states read how many tokens each row has from the input that says it.

    Args:
        new_tokens: int32 [B].
    """
    made = next((value for node in graph for value in node.outputs if value.name == TOKENS), None)
    value = graph.initializers.get(TOKENS) if made is None else made
    if value is None:
        return
    ops = Ops()
    tokens = ops("Cast", new_tokens, to=int(ir.DataType.INT64))
    graph.insert_before(graph[0], ops.nodes)
    value.replace_all_uses_with(tokens)
    node = None if made is None else made.producer()
    while node is not None and not any(output.uses() for output in node.outputs):
        before = node.inputs[0]
        graph.remove(node, safe=True)
        node = None if before is None else before.producer()


def lower_recurrences(model: ir.Model) -> None:
    # Case 16
    for node in model.graph:
        if node.op_type == "LinearAttention":
            node.domain = MICROSOFT
    model.opset_imports[""] = OPSET  # of which the rest is
