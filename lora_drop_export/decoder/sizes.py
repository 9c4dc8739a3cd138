"""Sizes that the trace knows, where the graph asks for them.

Latent attention puts keys into a tensor by the numbers of its places: Gather(Shape(x), axis) → Range. ONNX Runtime
computes what comes of a Shape on the host, and a GPU's graph may have nothing there. onnxscript folds such a Gather
for a list of axes alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def spell_known_sizes(model: ir.Model) -> None:
    """Gather(Shape(x), axis) of a known size as a constant, in place."""
    for node in [n for n in model.graph if n.op_type == "Gather"]:
        shape, axis = node.inputs
        asked = shape.producer() if shape is not None else None
        tensor = ir.convenience.get_const_tensor(axis) if axis is not None else None
        if asked is None or asked.op_type != "Shape" or tensor is None or tensor.size != 1:
            continue
        x = asked.inputs[0]
        if x is None or x.shape is None or any(asked.attributes.get_int(end, 0) for end in ("start", "end")):
            continue
        size = x.shape[int(tensor.numpy().item())]
        if not isinstance(size, int):
            continue
        old = node.outputs[0]
        known = ir.node("Constant", [], {"value": ir.tensor(np.full(tensor.shape.numpy(), size, np.int64))})
        known.outputs[0].type, known.outputs[0].shape = old.type, old.shape
        model.graph.insert_before(node, known)
        old.replace_all_uses_with(known.outputs[0])
        model.graph.remove(node, safe=True)
