"""Recurrent states: what goes into the rules by which tokens change them, and these rules.

The plugin has kernels of its own for both, whose operators are in no opset and which Python cannot make (2026.4). Of
the delta rule's it makes one of a loop. That of Mamba 2 reads one place in a table of states and writes another;
OpenVINO's own transformation makes it of a loop in a model with an attention, from where it is taken and given other
inputs. Over such a table the delta rule's takes eight times as long for many tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

from lora_drop_runtime.bundle.graph_io import GATED_DELTA

from .capped import ints

Node = Any
Output = Any
_NORM_EPS = 1e-6  # of q and k


def _constant(value: float) -> Any:
    return op.constant(np.float32(value))


def _swish(x: Any) -> Any:
    return op.multiply(x, op.sigmoid(x))


def directions(node: Node, widened: Callable[[Any], Any]) -> list[Output]:
    """The operator `Directions` (bundle/paged_io.py); `widened` gives a weight as float32.

    All that it gives is computed last by an operator that makes no view, which must not leave an If.
    """
    entries, before, mixed, taps, *bias = (node.get_input(n) for n in range(node.get_input_size()))
    heads, key_heads, key_dim, value_dim = (
        node.get_attribute(name) for name in ("heads", "key_heads", "key_dim", "value_dim")
    )
    is_delta = node.get_attribute("rule") == GATED_DELTA
    width, _, count = taps.get_partial_shape().to_shape()
    size = entries.get_partial_shape()[2].get_length()
    both = op.concat([before, op.reshape(entries, ints([-1, size]), False)], 0)  # [M + T, E]
    factors = op.reshape(widened(taps), ints([width, count]), False)
    rows = [op.gather(mixed, ints(tap), ints(0)) for tap in range(count)]  # [N]
    x = op.slice(both, ints([0]), ints([width]), ints([1]), ints([1]))
    y = None
    for tap, row in enumerate(rows):
        product = op.multiply(op.gather(x, row, ints(0)), op.gather(factors, ints(tap), ints(1)))
        y = product if y is None else op.add(y, product)
    if bias:
        y = op.add(y, widened(bias[0]))
    directed, values = key_heads * key_dim, heads * value_dim
    widths = [directed, directed, values] if is_delta else [values, directed, directed]
    parts = op.variadic_split(y, ints(1), ints(widths)).outputs()
    query, key, value = parts if is_delta else parts[::-1]
    query, key = (_swish(op.reshape(part, ints([-1, key_heads, key_dim]), False)) for part in (query, key))
    if is_delta:
        query, key = (
            op.divide(
                part,
                op.sqrt(op.add(op.reduce_sum(op.power(part, _constant(2)), ints([2]), True), _constant(_NORM_EPS))),
            )
            for part in (query, key)
        )
    value = _swish(op.reshape(value, ints([-1, heads, value_dim]), False))
    own, begin = [], width
    for count in (size - width - heads, heads):  # decays are one for each head, or for each row of its state
        column = op.slice(both, ints([begin]), ints([begin + count]), ints([1]), ints([1]))
        begin += count
        own.append(op.gather(column, rows[-1], ints(0)))
    return [part.output(0) for part in (query, key, value, *own)]


def _parameter(name: str, shape: list[int], dtype: Any) -> Any:
    made = op.parameter(shape, dtype, name=name)
    made.output(0).set_names({name})
    return made


def _past(name: str, shape: list[int], empty: list[int], ids: Any, beams: Any) -> tuple[Any, Any]:
    """A variable, and what is read of it, which begins as zeros [1, *empty]."""
    from openvino.op.util import Variable, VariableInfo

    info = VariableInfo()
    info.data_shape, info.data_type, info.variable_id = ov.PartialShape(shape), ov.Type.f32, name
    variable = Variable(info)
    batch = op.gather(op.shape_of(ids), ints([0]), ints(0))
    zeros = op.broadcast(_constant(0), op.concat([batch, ints(empty)], 0))
    return variable, op.gather(op.read_value(zeros, variable), beams, ints(0))


class _Loop:
    """A loop over tokens, a dimension of what goes in and out, from a state.

    Args:
        axis: of the tokens.
        buffer: what it gives has this shape.
    """

    def __init__(self, axis: int, buffer: Any) -> None:
        self._axis, self._buffer = axis, buffer
        self.step = op.parameter([], np.int64)

    def run(self, inputs: list[tuple[Any, Any]], state: tuple[Any, Any, Any], out: Any, result: Any) -> Any:
        """What it leaves in the buffer.

        Args:
            inputs: parameters of the body, and what they are slices of.
            state: that parameter, what it begins with, and what becomes of it.
            out: the parameter that the buffer is, and `result` what comes there at a token.
        """
        inside, begin, after = state
        scattered = op.scatter_update(out, op.unsqueeze(self.step, ints(0)), result, ints(self._axis))
        truth = op.constant(np.array(True))
        own = [self.step, *(one for one, _ in inputs), inside, out]
        body = ov.Model([op.result(truth), op.result(after), op.result(scattered)], own, "body")
        count = op.gather(op.shape_of(self._buffer), ints(self._axis), ints(0))
        loop = op.loop(count, op.constant(np.array(True)))
        loop.set_function(body)
        loop.set_special_body_ports([0, 0])
        for one, whole in inputs:
            loop.set_sliced_input(one, whole.output(0), 0, 1, 1, -1, self._axis)
        begin = begin if isinstance(begin, ov.Output) else begin.output(0)
        loop.set_merged_input(inside, begin, after.output(0))
        zeros = op.broadcast(_constant(0), op.shape_of(self._buffer))
        loop.set_merged_input(out, zeros.output(0), scattered.output(0))
        found = loop.get_iter_value(scattered.output(0), -1)
        return found, loop.get_iter_value(after.output(0), -1)


def delta_rule(node: Node) -> list[Output]:
    """The operator `DeltaRule` (bundle/paged_io.py), as a loop in the form of which the plugin makes one kernel
    (fuse_gated_delta_net.cpp). Where each row of a state has a decay of its own, it runs as a loop."""
    query, key, value, decay, beta, states, grid = (node.get_input(n) for n in range(node.get_input_size()))
    heads, key_dim, value_dim = (states.get_partial_shape()[n].get_length() for n in (1, 2, 3))
    key_heads = key.get_partial_shape()[1].get_length()
    each = [key_dim] if decay.get_partial_shape()[1].get_length() > heads else []  # decays of a head

    def heads_first(x: Any, count: int, *size: int) -> Any:
        """[B, H, L, ..] of [N, ..], with a head of keys for each of values."""
        own = [count, *size]
        x = op.reshape(x, op.concat([grid, ints(own)], 0), False)
        x = op.reshape(x, ints([0, 0, *own]), True)  # what the sizes are is else not known before it runs
        if count < heads:
            x = op.gather(x, ints([n // (heads // count) for n in range(heads)]), ints(2))
        return op.transpose(x, ints([0, 2, 1, 3] if size else [0, 2, 1]))

    query, key = (heads_first(x, key_heads, key_dim) for x in (query, key))
    value, decay, beta = (
        heads_first(value, heads, value_dim),
        heads_first(decay, heads, *each),
        heads_first(beta, heads),
    )
    root = op.power(op.convert(op.gather(op.shape_of(query), ints(3), ints(0)), "f32"), _constant(0.5))
    loop = _Loop(2, value)
    q, k = (op.parameter([-1, heads, 1, key_dim], np.float32) for _ in range(2))
    v = op.parameter([-1, heads, 1, value_dim], np.float32)
    g, b = (op.parameter([-1, heads, 1, *of], np.float32) for of in (each, []))
    inside = op.parameter([-1, heads, key_dim, value_dim], np.float32)
    out = op.parameter([-1, heads, -1, value_dim], np.float32)
    k_column, q_column = (op.unsqueeze(op.squeeze(one, ints([2])), ints([-1])) for one in (k, q))
    left_of = op.squeeze(op.exp(g), ints([2])) if each else op.exp(g)  # [B, H, Dk or 1]
    gated = op.multiply(inside, op.unsqueeze(left_of, ints([-1])))
    known = op.reduce_sum(op.multiply(gated, k_column), ints([-2]), False)
    change = op.multiply(op.subtract(op.squeeze(v, ints([2])), known), b)
    after = op.add(gated, op.multiply(k_column, op.unsqueeze(change, ints([-2]))))
    told = op.reduce_sum(op.multiply(after, q_column), ints([-2]), True)
    inputs = [(q, op.divide(query, root)), (k, key), (v, value), (g, decay), (b, beta)]
    result, left = loop.run(inputs, (inside, states, after), out, told)
    flat = op.reshape(op.transpose(result, ints([0, 2, 1, 3])), ints([-1, heads, value_dim]), False)
    return [flat.output(0), left]


def _selective_loop(made: Callable[[list[int]], Any], state: Any, sizes: tuple[int, int, int, int]) -> Any:
    """Mamba 2's rule as OpenVINO knows it (fuse_ssm.cpp)."""
    heads, groups, key_dim, value_dim = sizes
    a, step, x = op.constant(np.full(heads, -1, np.float32)), made([heads]), made([heads, value_dim])
    b, c = (
        op.reshape(
            op.tile(op.unsqueeze(made([groups, key_dim]), ints(3)), ints([1, 1, 1, heads // groups, 1])),
            ints([0, 0, heads, key_dim]),
            True,
        )
        for _ in range(2)
    )
    decay = op.reshape(op.exp(op.multiply(a, step)), ints([0, 0, heads, 1, 1]), True)
    added = op.multiply(op.unsqueeze(op.multiply(op.unsqueeze(step, ints(-1)), b), ints(-2)), op.unsqueeze(x, ints(-1)))
    loop = _Loop(1, x)
    one_decay = op.parameter([-1, 1, heads, 1, 1], np.float32)
    one_added = op.parameter([-1, 1, heads, value_dim, key_dim], np.float32)
    one_c = op.parameter([-1, 1, heads, 1, key_dim], np.float32)
    inside = op.parameter([-1, heads, value_dim, key_dim], np.float32)
    out = op.parameter([-1, -1, heads, value_dim], np.float32)
    after = op.add(op.multiply(inside, op.squeeze(one_decay, ints(1))), op.squeeze(one_added, ints(1)))
    total = op.reduce_sum(op.multiply(after, op.squeeze(one_c, ints(1))), ints(-1), False)
    inputs = [(one_decay, decay), (one_added, added), (one_c, op.unsqueeze(c, ints(-2)))]
    return loop.run(inputs, (inside, state, after), out, op.unsqueeze(total, ints(1)))


def _paged_node(sizes: tuple[int, int, int, int]) -> Any:
    """OpenVINO's operator over a table of states, with inputs of no use.

    Args:
        sizes: heads, those of keys, and values of a key's and a value's.
    """
    from openvino._offline_transformations import paged_attention_transformation

    width, head = 1, 32
    heads, _, key_dim, value_dim = sizes
    named = ("input_ids", "attention_mask", "position_ids")
    ids, mask, positions = (_parameter(name, [-1, -1], np.int64) for name in named)
    beams = _parameter("beam_idx", [-1], np.int32)
    table = op.constant(np.zeros((2, width), np.float32))
    hidden = op.gather(table, op.convert(ids, "i32"), ints(0))

    def made(shape: list[int]) -> Any:
        """[B, T, *shape]."""
        weight = op.constant(np.zeros((math.prod(shape), width), np.float32))
        return op.reshape(op.matmul(hidden, weight, False, True), ints([0, 0, *shape]), True)

    def heads_first() -> Any:
        return op.transpose(made([1, head]), ints([0, 2, 1, 3]))

    query, caches, sinks = heads_first(), [], []
    for name in ("key", "value"):  # without an attention nothing is transformed
        variable, past = _past(name, [-1, 1, -1, head], [1, 0, head], ids, beams)
        caches.append(op.concat([past, heads_first()], 2))
        sinks.append(op.assign(caches[-1], variable))
    wide_mask = op.convert(op.unsqueeze(mask, ints([1, 2])), "f32")
    attended = op.scaled_dot_product_attention(query, *caches, wide_mask, None, False)
    merged = op.reshape(op.transpose(attended, ints([0, 2, 1, 3])), ints([0, 0, head]), True)
    state = [heads, value_dim, key_dim]
    variable, past = _past("state", [-1, *state], state, ids, beams)
    result, after = _selective_loop(made, past, sizes)
    sinks.append(op.assign(op.reshape(after, ints([0, 0, 0, 0]), True), variable))  # which takes no output of a loop
    model = ov.Model([op.result(merged), op.result(result)], sinks, [ids, mask, positions, beams], "one_state")
    paged_attention_transformation(model)
    (node,) = (one for one in model.get_ops() if one.get_type_name() == "PagedSelectiveSSM")
    return node


def selective_rule(node: Node) -> list[Output]:
    """The operator `SelectiveRule` (bundle/paged_io.py)."""
    query, key, value, _, beta, states, *tables, a = (node.get_input(n) for n in range(node.get_input_size()))
    (heads, value_dim), (key_heads, key_dim) = (
        [one.get_partial_shape()[n].get_length() for n in (1, 2)] for one in (value, key)
    )
    found = _paged_node((heads, key_heads, key_dim, value_dim))
    found.set_arguments([a, beta, key, value, query, states, *tables])
    return [found.output(0)]
