"""Norms as onnxscript's fusion knows them, and as engines run what it makes.

It makes one RMSNormalization of x · (1 / √(mean x² + ε)) · weight. Gemma 4 writes the root as a power of −0.5.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def spell_reciprocal_roots(model: ir.Model) -> int:
    """Powers of −0.5 as Reciprocal(Sqrt(x)), in place; returns how many there were."""
    count = 0
    for node in list(model.graph):
        exponent = ir.convenience.get_const_tensor(node.inputs[1]) if node.op_type == "Pow" else None  # type: ignore[arg-type]
        if exponent is None or exponent.size != 1 or np.asarray(exponent.numpy(), np.float32).item() != -0.5:
            continue
        root = ir.node("Sqrt", [node.inputs[0]])
        reciprocal = ir.node("Reciprocal", [root.outputs[0]])
        old, new = node.outputs[0], reciprocal.outputs[0]
        for value in (root.outputs[0], new):
            value.type, value.shape = old.type, old.shape
        model.graph.insert_before(node, [root, reciprocal])
        old.replace_all_uses_with(new)
        model.graph.remove(node, safe=True)
        count += 1
    return count


def widen_normed(model: ir.Model) -> None:
    """Halves that are normed with weights in float32, as in Gemma, become float32 before: ONNX allows both dtypes in
    one RMSNormalization, but ONNX Runtime (1.32) loads none such in float16."""
    for node in list(model.graph):
        if node.op_type != "RMSNormalization":
            continue
        x, weight = node.inputs
        assert x is not None
        assert weight is not None
        if x.dtype != weight.dtype:
            cast = ir.node("Cast", [x], {"to": int(weight.dtype or ir.DataType.FLOAT)})
            cast.outputs[0].type, cast.outputs[0].shape = weight.type, x.shape
            model.graph.insert_before(node, cast)
            node.replace_input_with(0, cast.outputs[0])
