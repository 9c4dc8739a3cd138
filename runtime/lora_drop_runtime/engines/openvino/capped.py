"""Attention with a soft cap on its scores, cap · tanh(score / cap), in plain operators over paged caches.

The operator for paged attention has no cap. It runs beside this and writes the caches; here the entries of earlier
steps are read from the blocks of the call, and those of this step as they come. What a token must not see is masked:
other rows, later tokens, slots behind a row's length, and with a window older ones. Entries that are no numbers reach
those alone that see them. The cost grows with rows × slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from openvino import opset13 as op

from lora_drop_runtime.bundle.paged_io import BLOCK

Node = Any
_NEVER = -1e30  # a score that softmax makes 0


def ints(values: Any) -> Any:
    """A constant of int64."""
    return op.constant(np.array(values, np.int64))


def column(value: Any) -> Any:
    """[n] as [n, 1]."""
    return op.unsqueeze(value, ints(1))


def counted(count: Any) -> Any:
    """0 … count − 1."""
    return op.range(ints(0), count, ints(1), "i64")


def rows_of(places: Any, begins: Any) -> Any:
    """The row of each place [n], of rows that begin at begins [b + 1]."""
    ends = op.unsqueeze(op.slice(begins, ints([1]), ints([2**31]), ints([1])), ints(0))  # [1, b]
    behind = op.convert(op.greater_equal(op.unsqueeze(places, ints(1)), ends), "i64")
    return op.reduce_sum(behind, ints([1]), False)


def _size(value: Any, axis: int) -> Any:
    return op.gather(op.shape_of(value), ints(axis), ints(0))


def _slots(block_begins: Any, count: Any) -> tuple[Any, Any]:
    """Row and place in it of each slot [n · 32] of a call's blocks."""
    block = counted(count)
    row = rows_of(block, block_begins)
    first = op.multiply(op.subtract(block, op.gather(block_begins, row, ints(0))), ints(BLOCK))
    place = op.add(op.unsqueeze(first, ints(1)), ints(np.arange(BLOCK)[None]))
    rows = op.add(op.unsqueeze(row, ints(1)), ints(np.zeros((1, BLOCK))))
    return op.reshape(rows, ints([-1]), False), op.reshape(place, ints([-1]), False)


def _mask(node: Node, tokens: Any, blocks: Any) -> Any:
    """Which slots, and which new tokens behind them, each token sees: [T, n · 32 + T]."""
    lens, begins, block_begins = (op.convert(node.get_input(n), "i64") for n in (5, 6, 7))
    token = counted(tokens)
    row = rows_of(token, begins)
    own = op.add(op.gather(lens, row, ints(0)), op.subtract(token, op.gather(begins, row, ints(0))))
    slot_row, slot = _slots(block_begins, blocks)
    valid = op.less(slot, op.gather(lens, slot_row, ints(0)))

    def line(value: Any) -> Any:
        return op.unsqueeze(value, ints(0))

    past = op.logical_and(op.equal(column(row), line(slot_row)), line(valid))
    new = op.logical_and(op.equal(column(row), line(row)), op.less_equal(line(token), column(token)))
    seen = op.concat([past, new], 1)
    window = node.get_attribute("window")
    if window:
        oldest = op.subtract(column(own), ints(window))
        seen = op.logical_and(seen, op.greater(line(op.concat([slot, own], 0)), oldest))
    return seen


def capped_attention(node: Node) -> list[Any]:
    """The operator `Capped` (bundle/paged_io.py); [T, H·D]."""
    query, key, value, past_key, past_value = (node.get_input(n) for n in range(5))
    heads, softcap = node.get_attribute("heads"), np.float32(node.get_attribute("softcap"))
    kv_heads, head_dim = (past_key.get_partial_shape()[n].get_length() for n in (1, 3))
    group = heads // kv_heads

    def entries(past: Any, new: Any) -> Any:
        """[Hkv, n · 32 + T, D]"""
        flat = op.transpose(op.convert(past, "f32"), ints([1, 0, 2, 3]))
        old = op.reshape(flat, ints([kv_heads, -1, head_dim]), False)
        split = op.transpose(op.reshape(new, ints([-1, kv_heads, head_dim]), False), ints([1, 0, 2]))
        return op.concat([old, split], 1)

    split = op.reshape(query, ints([-1, kv_heads, group, head_dim]), False)
    queries = op.transpose(split, ints([1, 2, 0, 3]))  # [Hkv, G, T, D]
    keys, values = (op.unsqueeze(entries(*pair), ints(1)) for pair in ((past_key, key), (past_value, value)))
    scale = op.constant(np.float32(node.get_attribute("scale")) / softcap)
    scores = op.multiply(op.tanh(op.multiply(op.matmul(queries, keys, False, True), scale)), op.constant(softcap))
    # A weight of 0 keeps out no NaN: it comes through the scores, which are masked, and the values are 0 there
    zero = op.constant(np.float32(0))
    broken = op.multiply(values, zero)
    values = op.select(op.equal(broken, zero), values, zero)
    scores = op.add(scores, op.unsqueeze(op.reduce_sum(broken, ints([3]), False), ints(2)))
    mask = _mask(node, _size(query, 0), _size(past_key, 0))
    weights = op.softmax(op.select(mask, scores, op.constant(np.float32(_NEVER))), 3)
    mixed = op.transpose(op.matmul(weights, values, False, False), ints([2, 0, 1, 3]))
    result = op.reshape(mixed, ints([-1, heads * head_dim]), False)
    written = op.multiply(node.get_input(8), op.constant(np.float32(0)))  # or nothing would write the caches
    return [op.add(result, written).output(0)]
