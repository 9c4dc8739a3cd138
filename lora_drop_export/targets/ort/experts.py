"""Mixtures of experts → MoE, or QMoE where the matrices are quantized: a call reads those that its tokens chose."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lora_drop_export.decoder.gates import Gate
from lora_drop_export.graphs.experts import Experts, replace_experts
from lora_drop_export.graphs.initializers import seen_as
from lora_drop_export.graphs.match import QuantizedBlocks
from lora_drop_export.graphs.nodes import Ops

from .expert_formats import check_activation, check_alike
from .linears import MICROSOFT

_BLOCKS = ".experts"  # ends the second names of matrices, a dimension for each expert
_SMALLEST = float(np.finfo(np.float32).tiny)


def _gate(gate: Gate) -> dict[str, Any]:
    """As the attributes of their SwiGLU have it, of rows of gate and up in turns."""
    check_activation(gate.activation)
    given = {"activation_alpha": gate.alpha, "activation_beta": gate.added}
    limit = {"swiglu_limit": gate.limit} if gate.limit else {}  # where it is left out there is none
    return {"activation_type": "swiglu", "swiglu_fusion": 1, **given, **limit}


def _in_floats(graph: ir.Graph, ops: Ops, experts: Experts) -> ir.Value:
    """MoE makes weights of its own of what the router gives, a softmax over the chosen ones: of the logarithms of ours
    it makes ours, divided by their sum."""
    (d, inner), count = experts.sizes, experts.count
    up = seen_as(graph, experts.gate_up, _BLOCKS, ir.DataType.FLOAT, [count, 2 * inner, d])
    down = seen_as(graph, experts.down, _BLOCKS, ir.DataType.FLOAT, [count, d, inner])
    positive = ops("Max", experts.dense, ops.constant(np.array(_SMALLEST, np.float32)))
    made = ops(
        "MoE",
        *(experts.x, ops("Log", positive), up, experts.biases[0], down, experts.biases[1]),
        domain=MICROSOFT,
        k=experts.per_token,
        normalize_routing_weights=1,
        **_gate(experts.gate),
    )
    return ops("Mul", made, ops("ReduceSum", experts.weights, ops.ints([-1]), keepdims=1))


def _quantized(
    graph: ir.Graph, ops: Ops, experts: Experts, blocks: tuple[QuantizedBlocks, QuantizedBlocks]
) -> ir.Value:
    up, down = blocks
    (d, inner), count = experts.sizes, experts.count
    inputs: dict[int, ir.Value | None] = {4: experts.biases[0], 7: experts.biases[1]}
    symmetric = up.symmetric and down.symmetric
    for place, weight, block, rows, columns in (
        (2, experts.gate_up, up, 2 * inner, d),
        (5, experts.down, down, d, inner),
    ):
        groups = columns // block.block_size
        inputs[place] = seen_as(graph, weight, _BLOCKS, ir.DataType.UINT8, [count, rows, columns * block.bits // 8])
        inputs[place + 1] = seen_as(graph, block.scales, _BLOCKS, ir.DataType.FLOAT, [count, rows, groups])
        if not symmetric:
            points = [count, rows, groups * block.bits // 8]
            inputs[11 + (place == 5)] = seen_as(graph, block.zero_points, _BLOCKS, ir.DataType.UINT8, points)
    return ops(
        "QMoE",
        *(experts.x, experts.dense, *(inputs.get(place) for place in range(2, 14)), experts.dense),
        domain=MICROSOFT,
        k=experts.per_token,
        expert_weight_bits=up.bits,
        block_size=up.block_size,
        accuracy_level=4,  # activations as int8, as in MatMulNBits
        normalize_routing_weights=0,
        weights_prepacked=0,
        **_gate(experts.gate),
    )


def lower_experts(graph: ir.Graph) -> None:
    """Raises ModelError where one of a layer's two matrices is stored otherwise than the other."""

    def lower(ops: Ops, experts: Experts) -> ir.Value:
        up, down = experts.blocks
        check_alike(up, down)
        if up is None or down is None:
            return _in_floats(graph, ops, experts)
        return _quantized(graph, ops, experts, (up, down))

    replace_experts(graph, lower)
