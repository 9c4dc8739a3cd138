"""A short convolution over paged caches: each channel of a token is mixed with those of the few tokens before it.

The operator for paged attention runs beside it and writes the caches, one half of the channels in the place of K, the
other in that of V; nobody reads what it attends to. Tokens of earlier steps are read from the caches, those of this
step as they come; before a row's first token there are zeros. What is computed of tokens is a node of its own: that of
a dropped layer lies in an If, and is not run without tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from openvino import opset13 as op

from lora_drop_runtime.bundle.paged_io import BLOCK

from .capped import column, counted, ints, rows_of

Node = Any
_CACHED, _NOWHERE = -1, -2


def before(node: Node) -> list[Any]:
    """The operator `Before` (bundle/paged_io.py)."""
    count = node.get_attribute("count")
    lens, begins, blocks, block_begins = (op.convert(node.get_input(n), "i64") for n in range(4))
    zero = ints(0)
    token = counted(op.gather(begins, ints(-1), zero))
    row = rows_of(token, begins)
    lags = ints([[*range(count, 0, -1)]])
    in_row = op.subtract(column(op.subtract(token, op.gather(begins, row, zero))), lags)  # from its first new one
    slot = op.add(in_row, column(op.gather(lens, row, zero)))
    missing = op.select(op.greater_equal(slot, zero), ints(_CACHED), ints(_NOWHERE))
    places = op.select(op.greater_equal(in_row, zero), op.subtract(column(token), lags), missing)
    slot = op.select(op.equal(places, ints(_CACHED)), slot, zero)
    block = op.add(column(op.gather(block_begins, row, zero)), op.divide(slot, ints(BLOCK)))
    parts = op.gather(blocks, block, zero), op.multiply(slot, zero), op.mod(slot, ints(BLOCK))
    slots = op.concat([op.unsqueeze(part, ints(2)) for part in parts], 2)
    return [places.output(0), slots.output(0)]


def earlier(node: Node) -> list[Any]:
    """The operator `Earlier` (bundle/paged_io.py)."""
    *caches, slots = (node.get_input(n) for n in range(3))
    return [op.concat([op.convert(op.gather_nd(cache, slots, 0), "f32") for cache in caches], 2).output(0)]


def convolution(node: Node, widened: Callable[[Any], Any]) -> list[Any]:
    """The operator `Convolution` (bundle/paged_io.py), [T, d]; `widened` gives a weight as float32."""
    gate, key, value, attended, cached, places, taps, *bias = (node.get_input(n) for n in range(node.get_input_size()))
    width, _, size = taps.get_partial_shape().to_shape()
    x, zero = op.concat([key, value], 1), op.constant(np.float32(0))
    kind = op.unsqueeze(places, ints(2))
    new = op.gather(x, op.maximum(places, ints(0)), ints(0))  # [T, n, d]
    old = op.select(op.equal(kind, ints(_CACHED)), cached, zero)
    factors = op.transpose(op.reshape(widened(taps), ints([width, size]), False), ints([1, 0]))
    first, last = op.variadic_split(factors, ints(0), ints([size - 1, 1])).outputs()
    parts = op.multiply(op.select(op.greater_equal(kind, ints(0)), new, old), first)
    mixed = op.add(op.reduce_sum(parts, ints([1]), False), op.multiply(x, last))
    if bias:
        mixed = op.add(mixed, widened(bias[0]))
    written = op.multiply(attended, zero)  # or nothing would write the caches
    return [op.multiply(gate, op.add(mixed, written)).output(0)]
