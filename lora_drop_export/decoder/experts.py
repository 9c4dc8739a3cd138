"""A mixture of experts as one node of the trace.

    lora_drop::Experts(x, index, weights, gate and up, down), attribute `experts`: E
    [T, d], int64 [T, K], [T, K], [E·2I, d], [E·d, I] → [T, d]

The two matrices have the experts' own one below the other, a row of gate and one of up in turns: what an engine reads
for one expert is one piece then. In the checkpoint they may lie otherwise (checkpoint/experts.py).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import onnx_ir as ir
from lora_drop_runtime.errors import ModelError

from lora_drop_export.checkpoint.experts import ROWS

from .attention_interface import DOMAIN
from .experts_interface import ExpertsCall


def emit_experts(call: ExpertsCall) -> Any:
    """One Experts node in place of a call."""
    import torch

    module = call.module
    if call.index.shape[1] == 0:
        raise ModelError(
            "The model's config cannot be used.",
            note="Its routers send a token to 0 experts; needed is 1 at least.",
            hint="Check config.json.",
        )
    (output,) = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Experts",
        (call.hidden, call.index, call.weights, module.gate_up_proj, module.down_proj),
        attrs={"experts": module.gate_up_proj.shape[0], "per_token": call.index.shape[1]},
        dtypes=(call.hidden.dtype,),
        shapes=(call.hidden.shape,),
        version=1,
    )
    return output


def name_experts(graph: ir.Graph) -> dict[str, Fraction]:
    """Give the matrices of experts the form and the name that they have in a bundle; returns the share of each that one
    token reads.
    """
    shares = {}
    for node in graph:
        if node.domain != DOMAIN or node.op_type != "Experts":
            continue
        for place in (3, 4):
            before = node.inputs[place]
            assert before is not None
            assert before.shape is not None
            sizes = [int(size) for size in before.shape]  # type: ignore[arg-type]
            name = f"{before.name}{ROWS}"
            made = ir.Value(name=name, shape=ir.Shape([math.prod(sizes[:2]), sizes[2]]), type=before.type)
            node.replace_input_with(place, made)
            graph.initializers.add(made)
            del graph.initializers[str(before.name)]
            shares[name] = Fraction(node.attributes["per_token"].as_int(), sizes[0])
    return shares


def _unviewed(value: ir.Value | None) -> ir.Value | None:
    """What Reshapes made a value of."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "Reshape":
        value = node.inputs[0]
    return value


def router_parameters(graph: ir.Graph) -> frozenset[str]:
    """Names of the matrices [E, ·] that decide which experts a token goes to."""
    found = set()
    for node in graph:
        if node.domain != DOMAIN or node.op_type != "Experts":
            continue
        count, tokens = node.attributes["experts"].as_int(), _unviewed(node.inputs[0])
        seen, todo = {tokens}, list(node.inputs[1:3])
        while todo:
            value = _unviewed(todo.pop())
            if value is None or value in seen:
                continue
            seen.add(value)
            if value.is_initializer() and value.shape is not None and len(value.shape) == 2:
                found |= {str(value.name)} if value.shape[0] == count else set()
            elif (producer := value.producer()) is not None:
                todo.extend(producer.inputs)
    return frozenset(found)
