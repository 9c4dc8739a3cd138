"""Graphs in bfloat16 → float32 around weights that stay as they are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from lora_drop_runtime.bundle.paged_io import DOMAIN

from lora_drop_export.graphs.nodes import Ops

from .weights import graphs_in

_OWN = {"Linear": (1,), "Lookup": (1,), "Experts": (3, 4)}  # the places of weights, which may have any dtype


def _widen_node(graph: ir.Graph, node: ir.Node) -> None:
    for made in node.outputs:
        if made.dtype == ir.DataType.BFLOAT16:
            made.dtype = ir.DataType.FLOAT
    if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BFLOAT16:
        node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    has_value = node.op_type in ("Constant", "ConstantOfShape") and "value" in node.attributes
    tensor = node.attributes["value"].as_tensor() if has_value else None
    if tensor is not None and tensor.dtype == ir.DataType.BFLOAT16:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float32)))
    for place, value in enumerate(node.inputs):
        if value is None or value.const_value is None or value.dtype != ir.DataType.BFLOAT16:
            continue
        if value.producer() is not None or (node.domain == DOMAIN and place in _OWN.get(node.op_type, ())):
            continue
        ops = Ops()
        wide = ops("Cast", value, to=int(ir.DataType.FLOAT))
        wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
        graph.insert_before(node, ops.nodes)
        node.replace_input_with(place, wide)


def widen(graph: ir.Graph) -> None:
    for inner in list(graphs_in(graph)):
        for node in list(inner):
            _widen_node(inner, node)
        for value in (*inner.inputs, *inner.outputs):
            if value.dtype == ir.DataType.BFLOAT16:
                value.dtype = ir.DataType.FLOAT
