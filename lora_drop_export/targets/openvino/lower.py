"""Neutral step graphs → the one graph that OpenVINO runs, whatever the rows of a call and their numbers of new tokens.

Enters: refresh.onnx and lora.onnx with external weights. Leaves: `steps.onnx`, in which the kept layers stand once and
what a dropped site computes stands behind Ifs on the input `lora_step`. Nodes of the domain `lora_drop` are built by
the runtime out of what its OpenVINO has (engines/openvino/conversion.py); all others are plain ONNX.

    1. tokens                   the new tokens of all rows lie in one sequence [1, T], their positions beside them; no
                                padding (tokens.py)
    2. TensorScatter ×2 +       → PagedAttention over blocks of slots, which each row has a table of; the node stands at
       Attention                  top level, for an If would copy the caches (attention.py)
    3. x Wᵀ [+ b]               → Linear; those that read one tensor are one where their weights lie back to back
       mixtures of experts      → Experts
    4. looked-up tables         → Lookup, on the bytes of the matrix product's weight
    5. RMSNormalization,        → RMSNorm and Rotary, in the form that OpenVINO makes one kernel of
       RotaryEmbedding
    6. a dropped site           → If(norm, q, k, v | nothing), PagedAttention, If(the rest | surrogate) (sites.py)
    7. initializers             → Weight, which says where in the bundle the bytes lie (weights.py)
    8. bfloat16                 → float32 around weights that stay as they are: in what a step computes is a setting

Requires: the form that graphs/ makes. Ensures: no Attention, mask, TensorScatter or quantized weight of plain ONNX
remains but those of products over heads, as in multi-head latent attention.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from lora_drop_runtime.bundle.graph_io import Recurrence
from lora_drop_runtime.bundle.paged_io import DOMAIN, paged_steps_name
from lora_drop_runtime.plan.drop_plan import DropPlan
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from lora_drop_export.graphs.sinks import take_sinks
from lora_drop_export.graphs.values import OPSET

from .attention import lower_attention, rotate_tokens_first
from .experts import lower_experts
from .linears import lower_linears, lower_lookups
from .norms import lower_norms
from .recurrence import lower_recurrences
from .sites import put_behind_ifs
from .tokens import pack_tokens
from .weights import weights_as_nodes
from .widen import widen


def _leave_out_empty_scatters(graph: ir.Graph) -> None:
    """OpenVINO takes a constant without elements, as the places of an M-RoPE's empty section, for a scalar."""
    for node in list(graph):
        if node.op_type == "ScatterND" and node.inputs[1] is not None and node.inputs[0] is not None:
            places = ir.convenience.get_const_tensor(node.inputs[1])
            if places is not None and not places.size:
                node.outputs[0].replace_all_uses_with(node.inputs[0])


def openvino_from_neutral(
    refresh: onnx.ModelProto, lora: onnx.ModelProto, plan: DropPlan, recurrence: Recurrence | None = None
) -> onnx.ModelProto:
    """Lower both steps into one graph; the arguments are left as they were.

    Raises:
        ModelError: the model's recurrent states are of a kind that OpenVINO has no operator for.
    """
    copies = []
    for proto in (refresh, lora):  # onnx-ir's tensors are views of the protos, and renaming one renames the other
        copies.append(onnx.ModelProto())
        copies[-1].CopyFrom(proto)
    model, step = (ir.serde.deserialize_model(copy) for copy in copies)
    graph = model.graph
    model.opset_imports[DOMAIN] = 1
    graph.outputs[:] = graph.outputs[:1]  # caches are written in place; sites.py makes the states
    lower_attention(graph, plan, take_sinks(graph))
    lower_recurrences(graph, plan, recurrence)
    _leave_out_empty_scatters(graph)
    RemoveUnusedNodesPass()(model)
    pack_tokens(graph)
    lower_experts(graph)
    lower_linears(graph)
    lower_lookups(graph)
    lower_norms(graph)
    rotate_tokens_first(graph)
    RemoveUnusedNodesPass()(model)
    put_behind_ifs(graph, step.graph, plan)
    model.opset_imports[""] = OPSET  # LinearAttention, which came later, is gone
    widen(graph)
    graph.sort()
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    weights_as_nodes(graph)
    graph.name = paged_steps_name(plan.sites, plan.surrogate, plan.refresh_policy.fills)
    return ir.serde.serialize_model(model)
