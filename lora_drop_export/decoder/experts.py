"""transformers' experts interface: a mixture of experts as one node of the trace.

    lora_drop::Experts(x, index, weights, gate and up, down), attribute `experts`: E
    [T, d], int64 [T, K], [T, K], [E·2I, d], [E·d, I] → [T, d]

Expert e makes `down_e (silu(gate_e x) · up_e x)` of a token x, and the result is the sum over the token's K experts,
each times its weight. The two matrices have the experts' own one below the other, a row of gate and one of up in turns:
what an engine reads for one expert is one piece then. In the checkpoint they may lie otherwise (checkpoint/experts.py).
Experts that no step graph holds are refused where the modules are looked at (refusals.py).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import onnx_ir as ir
from lora_drop_runtime.errors import ModelError

from lora_drop_export.checkpoint.experts import ROWS

from .attention_interface import DOMAIN


def is_mixture(node: ir.Node) -> bool:
    """Whether a node of a trace is a mixture of experts."""
    return node.domain == DOMAIN and node.op_type == "Experts"


def _emit(module: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """One Experts node in place of a call; `gate_up_proj` [E, 2·I, d] has gate above up."""
    import torch

    if top_k_index.shape[1] == 0:
        raise ModelError(
            "The model's config cannot be used.",
            note="Its routers send a token to 0 experts; needed is 1 at least.",
            hint="Check config.json.",
        )
    (output,) = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Experts",
        (hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj),
        attrs={"experts": module.gate_up_proj.shape[0], "per_token": top_k_index.shape[1]},
        dtypes=(hidden_states.dtype,),
        shapes=(hidden_states.shape,),
        version=1,
    )
    return output


def register_experts(name: str) -> None:
    """Let mixtures of models with `experts_implementation=name` be nodes."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(name, _emit)


def name_experts(graph: ir.Graph) -> dict[str, Fraction]:
    """Give the matrices of experts the form and the name that they have in a bundle; returns the share of each that one
    token reads.
    """
    shares = {}
    for node in graph:
        if not is_mixture(node):
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
