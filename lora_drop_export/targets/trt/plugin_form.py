"""Cache write, RotaryEmbedding and Attention → one SkipWriteKVAttention plugin node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from lora_drop_export.graphs.values import IR_VERSION

PLUGIN_OP, PLUGIN_VERSION, PLUGIN_NAMESPACE = "SkipWriteKVAttention", "1", "lora_drop"


def _count(graph: gs.Graph, logits_index: gs.Tensor) -> gs.Tensor:
    """Tokens of each row that are no padding: one more than the last, which is the largest, place with logits."""
    last = gs.Variable("count.last", np.int64, ["batch"])
    count = gs.Variable("count", np.int64, ["batch"])
    axes, one = (gs.Constant(f"count.{name}", np.array(value, np.int64)) for name, value in (("axes", [1]), ("one", 1)))
    graph.nodes.append(gs.Node("ReduceMax", attrs={"keepdims": 0}, inputs=[logits_index, axes], outputs=[last]))
    graph.nodes.append(gs.Node("Add", inputs=[last, one], outputs=[count]))
    return count


def _producer(tensor: gs.Tensor, op: str) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs and tensor.inputs[0].op == op else None


def _attribute(node: gs.Node | None, name: str) -> Any:
    return None if node is None else node.attrs.get(name)


@dataclass(frozen=True)
class _HeadSource:
    """What the heads [B, H, S, D] of a query or key are made from: `rows` [B, S, H·D] or [B, H, S, D], norm, RoPE."""

    rows: gs.Tensor
    norm: gs.Node | None
    rotary: gs.Node | None

    def matches(self, other: _HeadSource) -> bool:
        """Whether one plugin call can do both: norms alike, the same RoPE tables."""
        same_norm = _attribute(self.norm, "epsilon") == _attribute(other.norm, "epsilon")
        tables = [[t.name for t in s.rotary.inputs[1:]] if s.rotary is not None else [] for s in (self, other)]
        return (self.norm is None) == (other.norm is None) and same_norm and tables[0] == tables[1]


def _head_source(heads: gs.Tensor) -> _HeadSource:
    """The norm may stand before the transpose, as in Qwen3, or after it, as in Gemma 3; it is the same per head.

    A norm in another dtype than the heads' (Gemma's, in half precision) stays outside.
    """
    rotary = _producer(heads, "RotaryEmbedding")
    heads = heads if rotary is None else rotary.inputs[0]  # [B, H, S, D]
    norm = _producer(heads, "RMSNormalization")
    transpose = _producer(heads if norm is None else norm.inputs[0], "Transpose")
    if transpose is not None and list(transpose.attrs["perm"]) == [0, 2, 1, 3]:
        split = transpose.inputs[0]  # [B, S, H, D]
        norm = _producer(split, "RMSNormalization") if norm is None else norm
        reshape = _producer(norm.inputs[0] if norm is not None and split.inputs[0] is norm else split, "Reshape")
        if reshape is not None and reshape.inputs[0].shape is not None and len(reshape.inputs[0].shape) == 3:
            return _HeadSource(reshape.inputs[0], norm, rotary)
    return _HeadSource(heads, None, rotary)


def _as_rows(graph: gs.Graph, tensor: gs.Tensor, width: int) -> gs.Tensor:
    """[B, H, S, D] as [B, S, H·D]; what is in rows already stays."""
    if len(tensor.shape) == 3:
        return tensor
    batch, heads, tokens, head_dim = tensor.shape
    swapped = gs.Variable(f"{tensor.name}.tokens_first", tensor.dtype, [batch, tokens, heads, head_dim])
    rows = gs.Variable(f"{tensor.name}.rows", tensor.dtype, [batch, tokens, width])
    shape = gs.Constant(f"{rows.name}.shape", np.array([0, 0, width], np.int64))
    graph.nodes.append(gs.Node("Transpose", attrs={"perm": [0, 2, 1, 3]}, inputs=[tensor], outputs=[swapped]))
    graph.nodes.append(gs.Node("Reshape", inputs=[swapped, shape], outputs=[rows]))
    return rows


def _attributes(
    node: gs.Node,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    *,
    is_refresh: bool,
    scaled: bool,
    sinks: bool,
    alias: bool,
) -> dict[str, Any]:
    """Of a plugin node that neither rotates nor norms."""
    return {
        "plugin_version": PLUGIN_VERSION,
        "plugin_namespace": PLUGIN_NAMESPACE,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rotary_dim": 0,
        "interleaved": 0,
        "window": window,
        "has_count": int(is_refresh),
        "has_norm": 0,
        "has_kv_scale": int(scaled),
        "has_sinks": int(sinks),
        "scale": float(node.attrs["scale"]),
        "softcap": float(node.attrs.get("softcap", 0.0)),
        "norm_epsilon": 0.0,
        "alias": int(alias),
    }


def _give_heads_back(graph: gs.Graph, heads_last: gs.Node, merged: gs.Variable, heads: int, head_dim: int) -> None:
    """Let the readers of a Transpose read the plugin's rows [B, S, H·D] in its place, as they are or by heads."""
    y = heads_last.outputs[0]  # [B, S, H, D]
    for use in list(y.outputs):
        if use.op == "Reshape" and list(use.outputs[0].shape or ())[2:] == [heads * head_dim]:
            for reader in list(use.outputs[0].outputs):
                reader.inputs = [merged if t is use.outputs[0] else t for t in reader.inputs]
    split = gs.Constant(f"{merged.name}.split", np.array([0, 0, heads, head_dim], np.int64))
    heads_last.outputs.clear()
    graph.nodes.append(gs.Node("Reshape", inputs=[merged, split], outputs=[y]))


def plugin_from_native(proto: onnx.ModelProto, windows: dict[str, int], alias: bool) -> onnx.ModelProto:
    # Case 6
    graph = gs.import_onnx(proto)
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    is_refresh = "logits_index" in inputs
    count = _count(graph, inputs["logits_index"]) if is_refresh else None
    for node in [n for n in graph.nodes if n.op == "Attention"]:
        query, present_key, present_value, _, *more = node.inputs  # scales of caches, two, and sinks
        scales, sinks = more[: len(more) // 2 * 2], more[len(more) // 2 * 2 :]
        writes = [present_key.inputs[0], present_value.inputs[0]]
        (past_key, key, length), (past_value, value, _) = writes[0].inputs, writes[1].inputs
        heads, head_dim, kv_heads = query.shape[1], query.shape[3], past_key.shape[1]
        attrs = _attributes(
            node,
            heads,
            kv_heads,
            head_dim,
            windows[node.outputs[0].name],
            is_refresh=is_refresh,
            scaled=bool(scales),
            sinks=bool(sinks),
            alias=alias,
        )
        extra = [] if count is None else [count]
        q, k, v = (_head_source(t) for t in (query, key, value))
        if q.matches(k):
            query, key = q.rows, k.rows
            if q.rotary is not None:
                attrs["rotary_dim"] = int(q.rotary.attrs.get("rotary_embedding_dim", 0)) or head_dim
                attrs["interleaved"] = int(q.rotary.attrs.get("interleaved", 0))
                extra += q.rotary.inputs[1:3]  # tables of each token, made for its true position
            if q.norm is not None and k.norm is not None:
                attrs["has_norm"] = 1
                attrs["norm_epsilon"] = float(q.norm.attrs.get("epsilon", 1e-5))
                extra += [q.norm.inputs[1], k.norm.inputs[1]]
        if v.rotary is None and v.norm is None:
            value = v.rows
        rows = [_as_rows(graph, t, n * head_dim) for t, n in ((query, heads), (key, kv_heads), (value, kv_heads))]
        (heads_last,) = node.outputs[0].outputs
        assert heads_last.op == "Transpose"
        merged = gs.Variable(f"{node.outputs[0].name}.rows", query.dtype, ["batch", "sequence", heads * head_dim])
        graph.nodes.append(
            gs.Node(
                PLUGIN_OP,
                name=f"{PLUGIN_OP}.{present_key.name.removeprefix('present_key.')}",
                domain=PLUGIN_NAMESPACE,
                attrs=attrs,
                inputs=[*rows, past_key, past_value, length, *extra, *scales, *sinks],
                outputs=[merged, present_key, present_value],
            )
        )
        for write in writes:
            write.outputs.clear()
        _give_heads_back(graph, heads_last, merged, heads, head_dim)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    result = gs.export_onnx(graph)
    result.ir_version = IR_VERSION
    del result.opset_import[:]
    result.opset_import.extend([onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid(PLUGIN_NAMESPACE, 1)])
    return result
