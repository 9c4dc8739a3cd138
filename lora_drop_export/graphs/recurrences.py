"""A recurrent state in plain ONNX: entries of the last tokens, a convolution, and LinearAttention from the state.

    x, decay, β → Concat → ScatterND            the new tokens' entries [B, S, E] join those of the last ones
    recent      → GatherND → Concat             K − 1 entries for the convolution, P that are not in the state, S new
    channels    → (Slice, Mul) ×K, Add, silu    q, k and v of P + S tokens
    q, k        → RMSNormalization              of length 1, by the gated delta rule
    all         → LinearAttention → Slice       from the state before all of them; the S last are the new ones

A token that pads, and one that is in the state already, has decay 0 and β 0 and changes nothing. What is there before a
step is read as it was. LinearAttention is ONNX's since opset 27.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from lora_drop_runtime.bundle.graph_io import GATED_DELTA, Recurrence

from lora_drop_export.decoder.attention_interface import DOMAIN
from lora_drop_export.decoder.recurrences import NORM_EPS

from .nodes import Ops

OPSET = 27
TOKENS = "recurrence.tokens"  # name of the value that says how many new tokens each row has, int64 [B] or [1]
_PREFIX = "recurrence."  # begins the names of the nodes that join a layer's entries, and of some more:
_SUM, _MIXED = ".sum", ".mixed"  # with these ends those of its convolution's sum and of its result,
_OF_ROWS = (f"{_PREFIX}ids", f"{_PREFIX}length")  # and two that give `input_ids` and `len_kept`
_END = int(np.iinfo(np.int64).max)


def is_recurrence(node: ir.Node) -> bool:
    """Whether it is what changes a recurrent state, as traced (decoder/trace.py)."""
    return node.domain == DOMAIN and node.op_type == "CacheRecurrence"


@dataclass(frozen=True)
class _Places:
    """What all layers of a graph share.

    Attributes:
        earlier: the slots of what lies before the new tokens, [B, P + K − 1, 1].
        is_new: bool [B, P + S, 1], which tokens come to the state.
        pending: P, [1].
        written: of each new token its row and its slot, [B, S, 2].
    """

    earlier: ir.Value
    is_new: ir.Value
    pending: ir.Value
    written: ir.Value


def _range(ops: Ops, begin: ir.Value, end: ir.Value) -> ir.Value:
    """[end − begin], of values [1]."""
    one = ops.constant(np.array(1, np.int64))
    return ops("Range", ops("Squeeze", begin), ops("Squeeze", end), one)


@dataclass
class Recurrences:
    """Expands what changes the recurrent states of a graph in float32.

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
        earlier = ops("Mod", places, recent)  # before a row's first token nothing is written, and is 0
        both = ops("Add", begin, _range(ops, ops("Neg", pending), width))  # [B, P + S]
        is_new = ops("And", ops("GreaterOrEqual", both, in_state), ops("Less", both, ops("Add", begin, count)))
        columns = _range(ops, none, width)  # [S]
        stays = ops("And", ops("Less", columns, count), ops("GreaterOrEqual", columns, ops("Sub", count, recent)))
        slots = ops("Where", stays, ops("Mod", ops("Add", begin, columns), recent), recent)  # [B, S]
        own = ops("Add", ops("Unsqueeze", _range(ops, none, rows), ops.ints([1])), ops("Mul", slots, none))
        pairs = ops("Concat", *(ops("Unsqueeze", part, ops.ints([2])) for part in (own, slots)), axis=2)
        earlier, is_new = (ops("Unsqueeze", part, ops.ints([2])) for part in (earlier, is_new))
        return _Places(earlier, is_new, pending, pairs)

    def expand(self, graph: ir.Graph, node: ir.Node) -> dict[str, ir.Value]:
        """Put plain nodes in the place of one; returns what becomes of its entries and of its state."""
        layer, form, ops = node.attributes["layer"].as_int(), self.form, Ops()
        x, decay, beta, taps, *rest = node.inputs
        is_delta = form.rule == GATED_DELTA
        skip = None if is_delta else rest.pop()
        assert x is not None
        assert taps is not None
        entries = ops("Concat", x, decay, beta, axis=2)
        ops.nodes[-1].name = f"{_PREFIX}{layer}"
        entries.type = x.type
        if self._places is None:
            self._places = self._shared(ops)
        shared, recent = self._places, self.inputs[f"past_recent.{layer}"]
        written = ops("ScatterND", recent, shared.written, entries)
        found = ops("GatherND", recent, shared.earlier, batch_dims=1)
        both = ops("Concat", found, entries, axis=1)  # [B, K − 1 + P + S, E]
        mixed = self._convolved(ops, layer, both, taps, *rest)
        axes, width = ops.ints([1, 2]), form.key_heads * form.key_dim
        changes = ops("Slice", both, ops.ints([form.taps - 1, form.channels]), ops.ints([_END, _END]), axes)
        changes = ops("Where", shared.is_new, changes, ops.constant(np.array(0, np.float32)))
        decay, beta = self._split(ops, changes, form.heads * form.decays, form.heads)
        if is_delta:
            directions, value = self._split(ops, mixed, 2 * width, form.heads * form.value_dim)
        else:
            value, directions = self._split(ops, mixed, form.heads * form.value_dim, 2 * width)
        query, key = self._directions(ops, directions)
        heads = None
        if not is_delta:  # β scales what is added
            heads = ops("Reshape", value, ops.ints([0, 0, form.heads, form.value_dim]))
            scaled = ops("Mul", heads, ops("Unsqueeze", beta, ops.ints([3])))
            value, beta = ops("Reshape", scaled, ops.ints([0, 0, form.heads * form.value_dim])), None
        state = self.inputs[f"past_recurrence.{layer}"]
        attributes: dict[str, Any] = {
            "q_num_heads": form.heads,
            "kv_num_heads": form.heads,
            "scale": form.key_dim**-0.5 if is_delta else 1.0,
            "update_rule": form.rule,
        }
        read = [query, key, value, state, decay, *((beta,) if beta is not None else ())]
        rule = ir.node("LinearAttention", read, attributes, num_outputs=2)
        ops.nodes.append(rule)
        out = rule.outputs[0]
        if heads is not None:
            through = ops("Mul", heads, ops("Unsqueeze", skip, ops.ints([1])))
            out = ops("Add", out, ops("Reshape", through, ops.ints([0, 0, form.heads * form.value_dim])))
        result = ops("Slice", out, shared.pending, ops.ints([_END]), ops.ints([1]))
        ops.nodes[-1].name = f"{_PREFIX}{layer}{_MIXED}"
        result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(result)
        graph.insert_after(node, ops.nodes)
        graph.remove(node, safe=True)
        return {f"present_recent.{layer}": written, f"present_recurrence.{layer}": rule.outputs[1]}

    def _split(self, ops: Ops, value: ir.Value, *widths: int) -> Sequence[ir.Value]:
        node = ir.node("Split", [value, ops.ints([*widths])], {"axis": -1}, num_outputs=len(widths))
        ops.nodes.append(node)
        return node.outputs

    def _convolved(
        self, ops: Ops, layer: int, both: ir.Value, taps: ir.Value, bias: ir.Value | None = None
    ) -> ir.Value:
        """silu(Σ_j taps_j · x_{t − K + 1 + j} + bias), [B, P + S, W]: for the few tokens of a step 3 to 9 times as fast
        in ONNX Runtime as its operator for it."""
        size, width, axes = self.form.taps, self.form.channels, ops.ints([1, 2])
        y = None
        for tap in range(size):
            begin, end = ops.ints([tap, 0]), ops.ints([_END if tap == size - 1 else tap + 1 - size, width])
            column = ops("Slice", taps, *(ops.ints([n]) for n in (tap, tap + 1, 2)))  # [W, 1, 1]
            product = ops("Mul", ops("Slice", both, begin, end, axes), ops("Reshape", column, ops.ints([width])))
            y = product if y is None else ops("Add", y, product)
        assert y is not None
        if bias is not None:
            y = ops("Add", y, bias)
        ops.nodes[-1].name = f"{_PREFIX}{layer}{_SUM}"
        return ops("Mul", y, ops("Sigmoid", y))

    def _directions(self, ops: Ops, both: ir.Value) -> Sequence[ir.Value]:
        """q and k [B, N, H·Dk], one for each head of the state, of both [B, N, 2·Hk·Dk]; Mamba's B is before its C."""
        form, is_delta = self.form, self.form.rule == GATED_DELTA
        count, size, group = form.key_heads, form.key_dim, form.heads // form.key_heads
        heads = ops("Reshape", both, ops.ints([0, 0, 2 * count, size]))
        if is_delta:
            # x / √(Σ x² + ε) is x / √(mean + ε / Dk) / √Dk
            scale = ops.constant(np.full(size, size**-0.5, np.float32))
            heads = ops("RMSNormalization", heads, scale, axis=-1, epsilon=NORM_EPS / size)
        if group > 1:
            whole = ops("Unsqueeze", heads, ops.ints([3]))
            heads = ops("Expand", whole, ops.ints([1, 1, 2 * count, group, size]))
        width = form.heads * size
        parts = self._split(ops, ops("Reshape", heads, ops.ints([0, 0, 2 * width])), width, width)
        return parts if is_delta else parts[::-1]


@dataclass(frozen=True)
class ExpandedRecurrence:
    """What changes a layer's recurrent state, in a neutral graph.

    Attributes:
        layer: its number.
        entries: the node that joins the new tokens' entries [B, S, E].
        sum: the node that gives what silu makes q, k and v of.
        mixed: the node that gives its result [B, S, H·Dv].
    """

    layer: int
    entries: ir.Node
    sum: ir.Node
    mixed: ir.Node

    @property
    def bias(self) -> ir.Value | None:
        """[W]; None for none."""
        last = self.sum.inputs[1]
        return last if last is not None and last.is_initializer() else None

    @property
    def taps(self) -> ir.Value:
        """[W, 1, K]."""
        product = self.sum if self.bias is None else self.sum.inputs[0].producer()  # type: ignore[union-attr]
        factor = product.inputs[1].producer().inputs[1]  # type: ignore[union-attr]
        taps = factor.producer().inputs[0].producer().inputs[0]  # type: ignore[union-attr]
        assert taps is not None
        return taps

    @property
    def skip(self) -> ir.Value | None:
        """[H]; None for none."""
        out = self.mixed.inputs[0].producer()  # type: ignore[union-attr]
        if out is None or out.op_type != "Add":
            return None
        through = out.inputs[1].producer().inputs[0].producer()  # type: ignore[union-attr]
        return through.inputs[1].producer().inputs[0]  # type: ignore[union-attr]


def reads_rows(node: ir.Node) -> bool:
    """Whether a node of recurrences reads ids or lengths of whole rows, whatever else is made of their tokens."""
    return node.name in _OF_ROWS


def recurrences(graph: ir.Graph) -> list[ExpandedRecurrence]:
    """Those of a neutral graph, in order."""
    named = {str(node.name): node for node in graph if str(node.name).startswith(_PREFIX)}
    begins = [name.removesuffix(_MIXED) for name in named if name.endswith(_MIXED)]
    return [
        ExpandedRecurrence(int(one.removeprefix(_PREFIX)), *(named[f"{one}{end}"] for end in ("", _SUM, _MIXED)))
        for one in begins
    ]
