"""A short convolution in plain ONNX: cache writes, the few tokens before the new ones, and a sum of products.

    x [B, S, d] → Split → Unsqueeze → TensorScatter ×2      its halves [B, 1, S, d/2] join the layer's caches
    caches      → GatherND ×2, Concat, Where                the K − 1 tokens before, zeros before the text
    both        → Concat → (Slice, Mul) ×K, Add             y_t = Σ_j taps_j · x_{t − K + 1 + j} + bias
    y           → Mul                                       by the gate

The tokens before are read from the caches as they were: a step writes none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lora_drop_export.decoder.attention_interface import DOMAIN

from .cache_entries import CacheEntries
from .nodes import Ops

_PREFIX = "convolution."  # begins the name of the node that joins earlier and new tokens; those of the sum and of what
_SUM, _GATED = ".sum", ".gated"  # the gate makes of it end so
_END = int(np.iinfo(np.int64).max)


def is_convolution(node: ir.Node) -> bool:
    """Whether it is a convolution as traced (decoder/trace.py)."""
    return node.domain == DOMAIN and node.op_type == "CacheConvolution"


def _earlier(ops: Ops, caches: Sequence[CacheEntries], count: int) -> ir.Value:
    """What the caches hold of the `count` tokens before the new ones, [B, count, d]."""
    # Sub, not Add: sums of lengths are positions (targets/ort/packing.py)
    length = ops("Unsqueeze", caches[0].length, ops.ints([1]))
    places = ops("Sub", length, ops.ints([*range(count, 0, -1)]))  # [B, count]
    zero = ops.constant(np.array(0, np.int64))
    slots = ops("Unsqueeze", ops("Max", places, zero), ops.ints([2]))
    pairs = ops("Concat", ops("Mul", slots, zero), slots, axis=2)  # [B, count, 2]: the only head, the slot
    halves = [cache.read(ops, ops("GatherND", cache.past, pairs, batch_dims=1)) for cache in caches]
    known = ops("Unsqueeze", ops("GreaterOrEqual", places, zero), ops.ints([2]))
    tokens = ops("Concat", *halves, axis=2)
    return ops("Where", known, tokens, ops("CastLike", ops.constant(np.array(0, np.float32)), tokens))


def expand_convolution(graph: ir.Graph, node: ir.Node, caches: Sequence[CacheEntries]) -> list[ir.Value]:
    """Put plain nodes in the place of one; returns what becomes of its two caches [B, 1, C, d/2]."""
    x, gate, taps, *bias = node.inputs
    assert x is not None
    assert taps is not None
    width, _, size = (int(dim) for dim in taps.shape)  # type: ignore[union-attr, arg-type]
    layer, ops = node.attributes["layer"].as_int(), Ops()
    split = ir.node("Split", [x], {"axis": 2, "num_outputs": 2}, num_outputs=2)
    ops.nodes.append(split)
    presents, rounded = [], []
    for cache, half in zip(caches, split.outputs, strict=True):
        half.type, half.shape = x.type, ir.Shape([*x.shape[:2], width // 2])  # type: ignore[index]
        values = ops("Unsqueeze", half, ops.ints([1]))
        values.type = x.type
        present, entries = cache.write(ops, values)
        presents.append(present)
        if cache.scale is not None:
            rounded.append(ops("Squeeze", cache.read(ops, entries), ops.ints([1])))
    tokens = ops("Concat", *rounded, axis=2) if rounded else x
    tokens.type, tokens.shape = x.type, x.shape
    both = ops("Concat", _earlier(ops, caches, size - 1), tokens, axis=1)
    ops.nodes[-1].name = f"{_PREFIX}{layer}"
    y = None
    for tap in range(size):
        last = tap == size - 1
        begin, end, axis = (ops.ints([n]) for n in (tap, _END if last else tap + 1 - size, 1))
        column = ops("Slice", taps, *(ops.ints([n]) for n in (tap, tap + 1, 2)))  # [d, 1, 1]
        factor = ops("Reshape", column, ops.ints([width]))
        product = ops("Mul", ops("Slice", both, begin, end, axis), factor)
        y = product if y is None else ops("Add", y, product)
    assert y is not None
    if bias:
        y = ops("Add", y, bias[0])
    ops.nodes[-1].name = f"{_PREFIX}{layer}{_SUM}"
    y.type = x.type  # and no shape, lest one takes it for row-wise
    gated = ops("Mul", gate, y)
    ops.nodes[-1].name = f"{_PREFIX}{layer}{_GATED}"
    gated.type, gated.shape = node.outputs[0].type, node.outputs[0].shape
    node.outputs[0].replace_all_uses_with(gated)
    graph.insert_after(node, ops.nodes)
    graph.remove(node, safe=True)
    return presents


@dataclass(frozen=True)
class Convolution:
    """A convolution in a neutral graph.

    Attributes:
        layer: its number.
        join: the node that joins earlier and new tokens, of which the second is x [B, S, d].
        sum: the node that gives y.
        gated: the node that multiplies the gate and y.
    """

    layer: int
    join: ir.Node
    sum: ir.Node
    gated: ir.Node

    @property
    def bias(self) -> ir.Value | None:
        """[d]; None for none."""
        last = self.sum.inputs[1]
        return last if last is not None and last.is_initializer() else None

    @property
    def taps(self) -> ir.Value:
        """[d, 1, K]."""
        product = self.sum if self.bias is None else self.sum.inputs[0].producer()  # type: ignore[union-attr]
        factor = product.inputs[1].producer().inputs[1]  # type: ignore[union-attr]
        taps = factor.producer().inputs[0].producer().inputs[0]  # type: ignore[union-attr]
        assert taps is not None
        return taps


def convolutions(graph: ir.Graph) -> list[Convolution]:
    """Those of a neutral graph, in order."""
    named = {str(node.name): node for node in graph if str(node.name).startswith(_PREFIX)}
    joins = [name for name in named if not name.endswith((_SUM, _GATED))]
    return [
        Convolution(int(one.removeprefix(_PREFIX)), *(named[f"{one}{end}"] for end in ("", _SUM, _GATED)))
        for one in joins
    ]
