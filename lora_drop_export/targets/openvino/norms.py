"""RMSNormalization → RMSNorm."""

from __future__ import annotations

import onnx_ir as ir
from lora_drop_runtime.bundle.paged_io import DOMAIN

from lora_drop_export.graphs.nodes import Ops, rank, replace_named


def lower_norms(graph: ir.Graph) -> None:
    """Those over the last axis."""
    for node in list(graph):
        if node.op_type != "RMSNormalization":
            continue
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        if axis not in (-1, (rank(node.inputs[0]) or 0) - 1):  # type: ignore[arg-type]
            continue
        ops = Ops()
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        replace_named(graph, node, ops, ops("RMSNorm", *node.inputs, domain=DOMAIN, epsilon=epsilon))
