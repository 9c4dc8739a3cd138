"""Neutral step graphs → those that ONNX Runtime runs fast, on the CPU in float32, on a GPU in halves.

Enters: refresh.onnx and lora.onnx with external weights. Leaves, in float32: `steps.onnx`, whose input `lora_step`
chooses between them by an If: one session holds each weight once, also where ONNX Runtime packs it for its kernels.
In halves: a graph for each step, whose weights are inputs: two sessions read one copy in the GPU's memory, nothing
packs a second one, and no If keeps the provider from capturing a step as a CUDA graph.

    1. x Wᵀ [+ b]               → Gemm(transB=1) on [B·S, in] (the weight keeps its place on disk), or MatMulNBits
    2. linear layers that read  → one, and a Split, where their weights lie back to back in one file
       one tensor
    3. [B, S, ·] between Gemms  → [B·S, ·], so that no Reshape stands around each of them
    4. Add, RMSNormalization    → SkipSimplifiedLayerNormalization;  x · σ(x) → QuickGelu
    5. Gather of a quantized    → GatherBlockQuantized, on the same bytes under a second name: the rows that are looked
       table                      up are read from the file, the matrix product packs a copy of its own
    6. TensorScatter ×2 +       → com.microsoft.GroupQueryAttention: past and present share one buffer, the cost follows
       Attention                  the valid length, RoPE stays outside, so that cache slot ≠ position is exact
    7. the same for one token   → an If around it: TensorScatter ×2 + GroupQueryAttention over a sequence made of the
       of one row                 query heads that share K and V, which are then read once; where MIN_FOLD or more do,
                                  and once there are as many slots (the operator's own condition)
    8. heads whose size is no   → with zeros behind them, in the caches too, which GroupQueryAttention asks for
       multiple of 8
    9. RotaryEmbedding          → into the attention where q, k and v are one product, with tables over all positions;
                                  else, and for heads whose size is no multiple of 16, on [B, S, H·D], without the
                                  transposes around it
    10. logits                  → float32, whatever the dtype
    11. rows with fewer than S  → in float32: products, norms and the head over one packed sequence of the tokens that
        new tokens                there are, each attention with its query_seqlens over padded chunks, a GatherND on
                                  either side; a row without any keeps its caches and states (packing.py)
    12. int8 caches in halves   → keys divided by the scales of their channels, queries multiplied by them, values and
                                  outputs likewise, and GroupQueryAttention with one scale of 1: its fast kernel on CUDA
                                  knows one for a whole cache
    13. a mixture of experts    → MoE, or QMoE where it is quantized (experts.py)
    14. attention sinks         → GroupQueryAttention's head_sink; it is not folded then
    15. comparisons in bfloat16 → in float32
    16. LinearAttention         → com.microsoft.LinearAttention

Requires: the form that graphs/ makes. Ensures: no Attention or mask remains, and a TensorScatter without an
attention only where a LoRA step writes a dropped attention's cache (`fill`), or where that is dead: before a dropped
layer that repeats its state (`recurrent`, `anchor`, rank 0); with case 11 it is a ScatterND.
In half precision GroupQueryAttention takes S > 1 with a past only at B = 1, and the session runs such steps row by row:
no onnxruntime-gpu has query_seqlens yet.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir
from lora_drop_runtime.bundle.bundle import WeightInput
from lora_drop_runtime.plan.schedule import StepKind
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from lora_drop_export.graphs.match import linear_groups, match_linear
from lora_drop_export.graphs.nodes import Ops, float32_logits, rank, replace_node
from lora_drop_export.graphs.sinks import take_sinks
from lora_drop_export.graphs.weight_inputs import stored_weights_as_inputs

from .attention import lower_attention, pad_cache_write
from .elementwise import compare_in_float32, fuse_elementwise
from .experts import lower_experts
from .join import joined
from .lengths import Lengths
from .linears import MICROSOFT, fuse_linears, linear_product, lower_lookup
from .packing import Packing, keep_idle_caches, keep_idle_states
from .recurrence import lower_recurrences, take_tokens
from .rotations import Rotations
from .rows import Rows


def lower_step(proto: onnx.ModelProto, max_positions: int, ragged: bool = False) -> onnx.ModelProto:
    """One step alone, with its own inputs and outputs.

    Args:
        max_positions: tokens of the longest row.
        ragged: whether rows may have different numbers of new tokens, which are an input then.
    """
    model = ir.serde.deserialize_model(proto)
    graph = model.graph
    model.opset_imports[MICROSOFT] = 1
    lengths = Lengths(graph, ragged)
    packing = None
    if lengths.new_tokens is not None:
        take_tokens(graph, lengths.new_tokens)
    if lengths.new_tokens is not None and "logits_index" in lengths.inputs:
        packing = Packing(graph, lengths.new_tokens)
    sinks = take_sinks(graph)
    for node in list(graph):
        if node.op_type == "Gather":
            lower_lookup(graph, node)
    lower_experts(graph)
    rows = Rows(graph, packing)
    groups = {group[0].weight: group for group in linear_groups(graph)}
    for node in list(graph):  # in order, so that a layer finds the twins of the one before
        if node.op_type == "Reshape" and str(node.name).startswith("surrogate."):
            rows.take_in(node)
            continue
        linear = match_linear(node) if node.op_type == "MatMul" else None
        if linear is not None and linear.blocks is None and rank(linear.x) not in (2, 3):
            continue  # over heads, as in multi-head latent attention: there are no rows of tokens
        if linear is None or (linear.weight in groups and fuse_linears(graph, groups[linear.weight], rows)):
            continue
        if linear.last.outputs[0].uses() or linear.last.outputs[0].is_graph_output():  # else it was fused
            ops = Ops()
            replace_node(graph, linear.last, ops, linear_product(graph, ops, linear, rows))
    rows.settle()
    rotations = Rotations(proto, graph, max_positions)
    for node in list(graph):
        if node.op_type == "Attention":
            lower_attention(graph, node, lengths, rotations, packing, sinks.get(node))
    for node in list(graph):
        if node.op_type == "TensorScatter":
            pad_cache_write(graph, node)
    graph.sort()
    RemoveUnusedNodesPass()(model)
    if packing is not None:
        packing.convolve(graph)
        packing.recur(graph)
    lower_recurrences(model)
    fuse_elementwise(graph)
    compare_in_float32(graph)
    float32_logits(graph)
    if packing is not None:
        packing.unpack_logits(graph)
    if lengths.new_tokens is not None:
        keep_idle_caches(graph, lengths.new_tokens)
        keep_idle_states(graph, lengths.new_tokens)
    graph.sort()
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    assert not any(node.op_type in ("Attention", "DequantizeLinear") for node in graph)
    return ir.serde.serialize_model(model)


def ort_from_neutral(
    refresh: onnx.ModelProto, lora: onnx.ModelProto, max_positions: int, ragged: bool
) -> onnx.ModelProto:
    """Lower both steps and join them; the arguments are left as they were.

    Args:
        max_positions: tokens of the longest row.
        ragged: whether rows may have different numbers of new tokens.
    """
    return joined(lower_step(lora, max_positions, ragged), lower_step(refresh, max_positions, ragged))


def halves_from_neutral(
    steps: Mapping[StepKind, onnx.ModelProto], max_positions: int
) -> tuple[dict[StepKind, onnx.ModelProto], dict[str, WeightInput]]:
    """Lower both steps, a graph each; the arguments are left as they were.

    Args:
        max_positions: tokens of the longest row.

    Returns: the graphs, and where the bytes of the weights lie that are inputs of them.
    """
    graphs: dict[StepKind, onnx.ModelProto] = {}
    table: dict[str, WeightInput] = {}
    for kind, proto in steps.items():
        model = ir.serde.deserialize_model(lower_step(proto, max_positions))
        # Scales of caches stay: what is computed of them is computed once, when a session is opened
        for name, weight in stored_weights_as_inputs(model.graph, but=("kv_scales.",)).items():
            first = table.setdefault(name, weight)
            assert first == weight, name
        graphs[kind] = ir.serde.serialize_model(model)
    return graphs, table
