"""Linear layers of tokens that lie in rows [T, d], as beside experts, in the form of all others.

torch's exporter writes `x Wᵀ` of rows as a Gemm, and of [B, S, d] as a MatMul with a transposed initializer.
"""

from __future__ import annotations

import onnx_ir as ir

_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0.0, "transB": 1.0}  # x Wᵀ + b
_DEFAULTS = {"alpha": 1.0, "beta": 1.0, "transA": 0.0, "transB": 0.0}


def spell_products(model: ir.Model) -> None:
    """Gemm(x, W[, b], transB=1) as MatMul(x, Transpose(W))[ + b], in place."""
    for node in [n for n in model.graph if n.op_type == "Gemm"]:
        given = _DEFAULTS | {name: float(one.value) for name, one in node.attributes.items()}
        x, weight, *bias = node.inputs
        if given != _PLAIN or weight is None or not weight.is_initializer():
            continue
        old = node.outputs[0]
        turned = ir.node("Transpose", [weight], {"perm": [1, 0]})
        product = ir.node("MatMul", [x, turned.outputs[0]])
        made = [turned, product]
        if bias and bias[0] is not None:
            made.append(ir.node("Add", [product.outputs[0], bias[0]]))
        turned.outputs[0].type = old.type
        for result in made[1:]:
            result.outputs[0].type, result.outputs[0].shape = old.type, old.shape
        model.graph.insert_before(node, made)
        old.replace_all_uses_with(made[-1].outputs[0])
        made[-1].outputs[0].name = old.name
        model.graph.remove(node, safe=True)
