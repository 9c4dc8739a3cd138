"""Mixtures of experts → Experts, which the runtime builds out of what its OpenVINO has."""

from __future__ import annotations

import onnx_ir as ir
from lora_drop_runtime.bundle.paged_io import DOMAIN

from lora_drop_export.graphs.experts import match_experts
from lora_drop_export.graphs.nodes import Ops, replace_node

from .linears import weight_inputs


def lower_experts(graph: ir.Graph) -> None:
    for node in list(graph):
        experts = match_experts(node)
        if experts is None:
            continue
        ops = Ops()
        (up, quantized), (down, quantized_down) = (
            weight_inputs(graph, weight, blocks)
            for weight, blocks in zip((experts.gate_up, experts.down), experts.blocks, strict=True)
        )
        attributes = {"experts": experts.count, "quantized": quantized, "quantized_down": quantized_down}
        result = ops("Experts", experts.x, experts.index, experts.weights, *up, *down, domain=DOMAIN, **attributes)
        replace_node(graph, node, ops, result)
        graph.remove(node, safe=True)
