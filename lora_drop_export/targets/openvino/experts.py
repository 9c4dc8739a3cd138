"""Mixtures of experts → Experts, which the runtime builds out of what its OpenVINO has."""

from __future__ import annotations

from dataclasses import asdict

import onnx_ir as ir
from lora_drop_runtime.bundle.paged_io import DOMAIN

from lora_drop_export.graphs.experts import Experts, replace_experts
from lora_drop_export.graphs.nodes import Ops

from .linears import weight_inputs


def lower_experts(graph: ir.Graph) -> None:
    def lower(ops: Ops, experts: Experts) -> ir.Value:
        (up, quantized), (down, quantized_down) = (
            weight_inputs(graph, weight, blocks)
            for weight, blocks in zip((experts.gate_up, experts.down), experts.blocks, strict=True)
        )
        biases = [bias for bias in experts.biases if bias is not None]
        attributes = {"experts": experts.count, "quantized": quantized, "quantized_down": quantized_down}
        inputs = (experts.x, experts.index, experts.weights, *up, *down, *biases)
        return ops("Experts", *inputs, domain=DOMAIN, **attributes, **asdict(experts.gate))

    replace_experts(graph, lower)
