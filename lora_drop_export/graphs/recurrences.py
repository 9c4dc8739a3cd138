"""A gated delta rule in plain ONNX: entries of the last tokens, a convolution, and LinearAttention from the state.

    x, decay, β → Concat → ScatterND            the new tokens' entries [B, S, E] join those of the last ones
    recent      → GatherND, Where               K − 1 entries for the convolution, and those that are not in the state
    both        → Concat → Split                of P pending and S new tokens
    channels    → CausalConvWithState           q, k and v behind silu, q and k normed
    all         → LinearAttention → Slice       from the state before all of them; the S last are the new ones

A token that pads, and one that is in the state already, has decay 0 and β 0 and changes nothing. What is there before a
step is read as it was. LinearAttention and CausalConvWithState are ONNX's since opset 27.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from lora_drop_runtime.bundle.graph_io import Recurrence

from lora_drop_export.decoder.attention_interface import DOMAIN
from lora_drop_export.decoder.recurrences import NORM_EPS

from .nodes import Ops

OPSET = 27
TOKENS = "recurrence.tokens"  # name of the value that says how many new tokens each row has, int64 [B] or [1]
_PREFIX = "recurrence."  # begins the names of the nodes that join a layer's entries, and of some more:
_MIXED = ".mixed"  # with this end those of its result,
_OF_ROWS = (f"{_PREFIX}ids", f"{_PREFIX}length")  # and two that give `input_ids` and `len_kept`
_END = int(np.iinfo(np.int64).max)


def is_recurrence(node: ir.Node) -> bool:
    """Whether it is a gated delta rule as traced (decoder/trace.py)."""
    return node.domain == DOMAIN and node.op_type == "CacheRecurrence"


@dataclass(frozen=True)
class _Places:
    """What all layers of a graph share.

    Attributes:
        earlier: the slots of what lies before the new tokens, [B, P + K − 1, 1].
        is_there: bool [B, P + K − 1, 1], which of these a row has.
        is_new: bool [B, P + S, 1], which tokens come to the state.
        pending: P, [1].
        written: of each new token its row and its slot, [B, S, 2].
    """

    earlier: ir.Value
    is_there: ir.Value
    is_new: ir.Value
    pending: ir.Value
    written: ir.Value


def _range(ops: Ops, begin: ir.Value, end: ir.Value) -> ir.Value:
    """[end − begin], of values [1]."""
    one = ops.constant(np.array(1, np.int64))
    return ops("Range", ops("Squeeze", begin), ops("Squeeze", end), one)


@dataclass
class Recurrences:
    """Expands the gated delta rules of a graph in float32.

    Args:
        inputs: the graph's, by name.
    """

    inputs: Mapping[str, ir.Value]
    form: Recurrence
    _places: _Places | None = field(default=None)

    def _tokens(self, ops: Ops) -> ir.Value:
        """New tokens of each row, int64 [B]: the last place that has logits is the last token's."""
        last = ops("Gather", self.inputs["logits_index"], ops.constant(np.array(-1, np.int64)), axis=1)
        tokens = ops("Add", last, ops.constant(np.array(1, np.int64)))
        tokens.name, tokens.shape, tokens.type = TOKENS, ir.Shape(["batch"]), ir.TensorType(ir.DataType.INT64)
        return tokens

    def _shared(self, ops: Ops) -> _Places:
        form, none = self.form, ops.ints([0])
        ids, length = (ops("Identity", self.inputs[name]) for name in ("input_ids", "len_kept"))
        for node, name in zip(ops.nodes[-2:], _OF_ROWS, strict=True):
            node.name = name
        tokens = self._tokens(ops)
        begin, count = (ops("Unsqueeze", value, ops.ints([1])) for value in (length, tokens))  # [B, 1]
        in_state = ops("Unsqueeze", self.inputs["len_state"], ops.ints([1]))
        rows, width = (ops("Shape", ids, start=n, end=n + 1) for n in (0, 1))  # B, S
        pending = ops("Reshape", ops("ReduceMax", ops("Sub", begin, in_state), keepdims=0), ops.ints([1]))  # P
        taps = ops("Add", pending, ops.ints([form.taps - 1]))
        places = ops("Add", begin, _range(ops, ops("Neg", taps), none))  # [B, P + K − 1]
        recent = ops.ints([form.recent])
        earlier = ops("Mod", ops("Max", places, none), recent)
        is_there = ops("GreaterOrEqual", places, none)
        both = ops("Add", begin, _range(ops, ops("Neg", pending), width))  # [B, P + S]
        is_new = ops("And", ops("GreaterOrEqual", both, in_state), ops("Less", both, ops("Add", begin, count)))
        columns = _range(ops, none, width)  # [S]
        stays = ops("And", ops("Less", columns, count), ops("GreaterOrEqual", columns, ops("Sub", count, recent)))
        slots = ops("Where", stays, ops("Mod", ops("Add", begin, columns), recent), recent)  # [B, S]
        own = ops("Add", ops("Unsqueeze", _range(ops, none, rows), ops.ints([1])), ops("Mul", slots, none))
        pairs = ops("Concat", *(ops("Unsqueeze", part, ops.ints([2])) for part in (own, slots)), axis=2)
        earlier, is_there, is_new = (ops("Unsqueeze", part, ops.ints([2])) for part in (earlier, is_there, is_new))
        return _Places(earlier, is_there, is_new, pending, pairs)

    def expand(self, graph: ir.Graph, node: ir.Node) -> dict[str, ir.Value]:
        """Put plain nodes in the place of one; returns what becomes of its entries and of its state."""
        layer, form, ops = node.attributes["layer"].as_int(), self.form, Ops()
        x, decay, beta, taps, *bias = node.inputs
        assert x is not None
        none = ops.constant(np.array(0, np.float32))
        entries = ops("Concat", x, decay, beta, axis=2)
        ops.nodes[-1].name = f"{_PREFIX}{layer}"
        entries.type = x.type
        if self._places is None:
            self._places = self._shared(ops)
        shared, recent = self._places, self.inputs[f"past_recent.{layer}"]
        written = ops("ScatterND", recent, shared.written, entries)
        found = ops("GatherND", recent, shared.earlier, batch_dims=1)
        earlier = ops("Where", shared.is_there, found, none)
        both = ops("Concat", earlier, entries, axis=1)  # [B, K − 1 + P + S, E]
        widths = ops.ints([form.channels, form.heads, form.heads])
        split = ir.node("Split", [both, widths], {"axis": 2}, num_outputs=3)
        ops.nodes.append(split)
        channels, *changes = split.outputs
        begin = ops.ints([form.taps - 1])
        before = ops("Slice", channels, ops.ints([0]), begin, ops.ints([1]))
        after, *changes = (ops("Slice", part, begin, ops.ints([_END]), ops.ints([1])) for part in (channels, *changes))
        sides = [ops("Transpose", part, perm=[0, 2, 1]) for part in (after, before)]
        read = [sides[0], taps, bias[0] if bias else None, sides[1]]
        convolution = ir.node("CausalConvWithState", read, {"activation": "silu"}, num_outputs=2)
        ops.nodes.append(convolution)
        mixed = ops("Transpose", convolution.outputs[0], perm=[0, 2, 1])
        width = form.key_heads * form.key_dim
        parts = ir.node(
            "Split", [mixed, ops.ints([width, width, form.heads * form.value_dim])], {"axis": 2}, num_outputs=3
        )
        ops.nodes.append(parts)
        query, key = (self._normed(ops, part) for part in parts.outputs[:2])
        decay, beta = (ops("Where", shared.is_new, part, none) for part in changes)
        state = self.inputs[f"past_recurrence.{layer}"]
        attributes: dict[str, Any] = {
            "q_num_heads": form.heads,
            "kv_num_heads": form.heads,
            "scale": form.key_dim**-0.5,
            "update_rule": "gated_delta",
        }
        read = [query, key, parts.outputs[2], state, decay, beta]
        rule = ir.node("LinearAttention", read, attributes, num_outputs=2)
        ops.nodes.append(rule)
        result = ops("Slice", rule.outputs[0], shared.pending, ops.ints([_END]), ops.ints([1]))
        ops.nodes[-1].name = f"{_PREFIX}{layer}{_MIXED}"
        result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(result)
        graph.insert_after(node, ops.nodes)
        graph.remove(node, safe=True)
        return {f"present_recent.{layer}": written, f"present_recurrence.{layer}": rule.outputs[1]}

    def _normed(self, ops: Ops, part: ir.Value) -> ir.Value:
        """q or k [B, N, Hk·Dk] with heads of length 1, one for each head of the state, [B, N, H·Dk]."""
        form = self.form
        heads = ops("Reshape", part, ops.ints([0, 0, form.key_heads, form.key_dim]))
        squares = ops("ReduceSum", ops("Mul", heads, heads), ops.ints([-1]))
        eps = ops.constant(np.array(NORM_EPS, np.float32))
        normed = ops("Div", heads, ops("Sqrt", ops("Add", squares, eps)))
        group = form.heads // form.key_heads
        if group > 1:
            whole = ops("Unsqueeze", normed, ops.ints([3]))
            normed = ops("Expand", whole, ops.ints([1, 1, form.key_heads, group, form.key_dim]))
        return ops("Reshape", normed, ops.ints([0, 0, form.heads * form.key_dim]))


@dataclass(frozen=True)
class ExpandedRecurrence:
    """A gated delta rule in a neutral graph.

    Attributes:
        layer: its number.
        entries: the node that joins the new tokens' entries [B, S, E].
        mixed: the node that gives its result [B, S, H·Dv].
    """

    layer: int
    entries: ir.Node
    mixed: ir.Node


def reads_rows(node: ir.Node) -> bool:
    """Whether a node of recurrences reads ids or lengths of whole rows, whatever else is made of their tokens."""
    return node.name in _OF_ROWS


def recurrences(graph: ir.Graph) -> list[ExpandedRecurrence]:
    """Those of a neutral graph, in order."""
    named = {str(node.name): node for node in graph if str(node.name).startswith(_PREFIX)}
    ends = [name for name in named if name.endswith(_MIXED)]
    found = [(name.removesuffix(_MIXED), named[name]) for name in ends]
    return [ExpandedRecurrence(int(name.removeprefix(_PREFIX)), named[name], mixed) for name, mixed in found]
